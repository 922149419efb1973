"""Look at a dataset: `millstream data inspect|head|verify`, of data.dir, of one of its splits or of an address."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from configs.batch_sizes import samples_before
from configs.load import ConfigError, load_pretrain
from configs.schema import PretrainConfig
from data_pipeline import mixture
from data_pipeline.command import find_splits, open_splits, options
from data_pipeline.errors import DataError
from data_pipeline.packing import packing_report
from data_pipeline.parts import SPLITS
from data_pipeline.progress import Progress
from data_pipeline.remote_sources import is_remote
from data_pipeline.samples import Samples, mixture_stages, open_samples, tokens_before
from data_pipeline.shards import Dataset, verify_dataset
from data_pipeline.tokenizer import load_tokenizer
from data_pipeline.tokenizer_report import show_tokenizer_report

USAGE = """\
usage: millstream data inspect DIR|CONFIG [documents=2] [seq_len=N] [picture=FILE.png]
       millstream data head DIR [documents=5]
       millstream data verify DIR

  inspect  sizes, lengths of documents, how the tokenizer fits, some documents; with seq_len what both packings would
           do. Of a configuration also its mixture; further words are settings, as for pretrain
  head     the first documents, whole
  verify   compare every byte with its checksum"""
BAR_WIDTH = 30  # characters of the longest bar
SHOWN_CHARACTERS = 400  # of a document that is not shown whole
# Epochs up to which repeated data is about as good as new data (Muennighoff et al. 2023, "Scaling data-constrained
# language models", section 6)
USEFUL_EPOCHS = 4
# A terminal obeys control characters, and a document may hold any
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | dict.fromkeys(
    range(127, 160), 0xFFFD
)


def main() -> int:
    console = Console(highlight=False, emoji=False, markup=False)
    try:
        match sys.argv[1:]:
            case ["inspect", place, *words]:
                inspect(place, words, console)
            case ["head", place, *words]:
                head(place, words, console)
            case ["verify", place]:
                return verify(place, console)
            case _:
                raise ConfigError(USAGE)
    except (ConfigError, DataError) as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{error.filename}: cannot be read ({error.strerror})", file=sys.stderr)
        return 1
    return 0


def inspect(place: str, words: list[str], console: Console) -> None:
    """Print what USAGE says. Raises DataError, ConfigError."""
    settings = [word for word in words if "." in word.partition("=")[0]]
    chosen = options([word for word in words if word not in settings], {"documents": 2, "seq_len": 0, "picture": ""})
    seq_lens = [chosen["seq_len"]] if chosen["seq_len"] else []
    if place.endswith((".yaml", ".yml")):
        config = load_pretrain(place, settings)
        datasets = configured(config)
        shown = {label: dataset for label, dataset in datasets.items() if not label.endswith("/validation")}
        show_run(config, console)
        if config.model.architecture == "gpt":
            seq_lens = seq_lens or sorted({config.train.seq_len, *(phase.seq_len for phase in config.train.phases)})
    elif settings:
        raise ConfigError(f"{settings[0]}: settings go with a configuration, {place} is none")
    else:
        shown = datasets = labelled(place, open_splits(place))
    show_sizes(datasets, console)
    for label, dataset in shown.items():
        show_lengths(label, dataset, console)
    for seq_len in seq_lens:
        show_packing(shown, seq_len, console)
    show_tokenizers(shown, console)
    if chosen["picture"]:
        draw_lengths(shown, Path(chosen["picture"]))
        console.print(f"{chosen['picture']} shows the lengths\n", soft_wrap=True)
    for label, dataset in shown.items():
        show_documents(label, dataset, spread(dataset, chosen["documents"]), console, SHOWN_CHARACTERS)
    cards = [dataset.path / "card.html" for dataset in datasets.values() if (dataset.path / "card.html").exists()]
    if cards:
        console.print(f"{cards[0]} says how it was made", soft_wrap=True)


def head(place: str, words: list[str], console: Console) -> None:
    """Print the first documents, whole. Raises DataError, ConfigError."""
    chosen = options(words, {"documents": 5})
    label, dataset = next(iter(labelled(place, open_splits(place)).items()))
    show_documents(label, dataset, range(min(chosen["documents"], dataset.num_documents)), console, None)


def verify(place: str, console: Console) -> int:
    """Compare every byte with its checksum; prints all faults and returns 1 if there are any. Raises DataError."""
    if is_remote(place):
        raise DataError(
            f"{place}: only a folder can be verified; shards at an address are compared with their checksums whenever "
            f"they are transferred"
        )
    root = Path(place)
    folders = [root / name for name in SPLITS if (root / name).is_dir()]
    if (root / "manifest.json").is_file() or not folders:
        folders = [Path(split) for split in find_splits(place).values()]
    faults = []
    total = sum(path.stat().st_size for folder in folders for path in folder.iterdir() if path.is_file())
    with Progress(console) as progress, progress.phase("verify", total) as advance:
        for folder in folders:
            faults += verify_dataset(folder, advance)
    for fault in faults:
        print(fault, file=sys.stderr)
    if faults:
        print(f"{place}: {len(faults)} faults", file=sys.stderr)
        return 1
    console.print(f"{place}: all {total:,} bytes are as they were written", soft_wrap=True)
    return 0


def labelled(place: str, datasets: dict[str, Dataset]) -> dict[str, Dataset]:
    """The datasets by the last part of their place, which is the split."""
    return {split.rstrip("/").rpartition("/")[2] or place: dataset for split, dataset in datasets.items()}


def configured(config: PretrainConfig) -> dict[str, Dataset]:
    """The datasets of a configuration: by split, or by source and split."""
    data = config.data
    if not data.mixture:
        return labelled(data.dir, open_splits(data.dir, data.cache))
    return {
        f"{name}/{label}": dataset
        for name, source in sorted(data.mixture.items())
        for label, dataset in labelled(source.dir, open_splits(source.dir, data.cache)).items()
    }


def table_of(title: str, *columns: str) -> Table:
    """A table whose first column is to the left and all others to the right."""
    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 0, 0, 1), title=Text(title, "bold"), title_justify="left"
    )
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    return table


def show_sizes(datasets: dict[str, Dataset], console: Console) -> None:
    table = table_of("sizes", "", "documents", "tokens", "shards", "bytes")
    for label, dataset in datasets.items():
        num_bytes = sum(shard["bytes"] for shard in dataset.shards)
        counts = (dataset.num_documents, dataset.num_tokens, len(dataset.shards), num_bytes)
        table.add_row(Text(label), *(f"{count:,}" for count in counts))
    console.print(table)
    vocabularies = {f"vocabulary of {dataset.vocab_size:,}, ids of {dataset.dtype}" for dataset in datasets.values()}
    console.print(f"\n{'; '.join(sorted(vocabularies))}\n")


def length_counts(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """(lengths in tokens, ascending, how many documents have each); memory for one shard's documents."""
    totals: dict[int, int] = {}
    for shard in range(len(dataset.shards)):
        lengths, counts = np.unique(dataset.document_lengths(shard), return_counts=True)
        for length, count in zip(lengths.tolist(), counts.tolist(), strict=True):
            totals[length] = totals.get(length, 0) + count
    ascending = sorted(totals)
    return np.array(ascending), np.array([totals[length] for length in ascending])


def histogram(lengths: np.ndarray, counts: np.ndarray) -> list[tuple[int, int, int]]:
    """(power of two, documents of at least that many tokens and fewer than twice as many, their tokens)."""
    powers = np.frexp(lengths.astype(np.float64))[1] - 1
    rows = []
    for power in range(int(powers[0]), int(powers[-1]) + 1):
        here = powers == power
        rows.append((1 << power, int(counts[here].sum()), int((lengths * counts)[here].sum())))
    return rows


def show_lengths(label: str, dataset: Dataset, console: Console) -> None:
    lengths, counts = length_counts(dataset)
    median = lengths[np.searchsorted(np.cumsum(counts), (dataset.num_documents + 1) // 2)]
    mean = dataset.num_tokens / dataset.num_documents
    title = f"{label}: {mean:,.0f} tokens a document, median {median:,}, longest {lengths[-1]:,}"
    table = table_of(title, "tokens", "documents", "share of tokens")
    table.columns[0].justify = "right"
    table.add_column("")
    rows = histogram(lengths, counts)
    most = max(documents for _, documents, _ in rows)
    for low, documents, tokens in rows:
        bar = "█" * -(-BAR_WIDTH * documents // most)
        span = f"{low:,} – {2 * low - 1:,}" if low > 1 else "1"
        table.add_row(span, f"{documents:,}", f"{100 * tokens / dataset.num_tokens:.1f} %", f" {bar}")
    console.print(table)
    console.print()


def draw_lengths(datasets: dict[str, Dataset], file: Path) -> None:
    """The same as a picture: documents and tokens by length, a row of panels for each dataset. Raises DataError."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, panels = pyplot.subplots(len(datasets), 2, figsize=(10, 3 * len(datasets)), squeeze=False)
    for (left, right), (label, dataset) in zip(panels, datasets.items(), strict=True):
        rows = histogram(*length_counts(dataset))
        for axes, column, what in ((left, 1, "documents"), (right, 2, "tokens")):
            axes.bar([f"{low:,}" for low, _, _ in rows], [row[column] for row in rows], color="#4477aa")
            axes.set_title(f"{label}: {what} by length of the document", fontsize=10)
            axes.set_xlabel("tokens of the document, from this number to twice as many", fontsize=8)
            axes.tick_params(labelsize=8)
            axes.tick_params(axis="x", labelrotation=45)
            axes.yaxis.set_major_locator(ticker.MaxNLocator(integer=True))
            axes.yaxis.set_major_formatter(ticker.EngFormatter(sep=""))
            axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    try:
        figure.savefig(file, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: a kind of picture that matplotlib does not know
        raise DataError(f"picture={file}: cannot be written ({error}); name a .png or .svg file") from error
    pyplot.close(figure)


def show_tokenizers(datasets: dict[str, Dataset], console: Console) -> None:
    """How each tokenizer fits the text that it was used for, by language, where the build has left its report."""
    shown: list[object] = []  # both splits have the same one
    for dataset in datasets.values():
        file = dataset.path / "stages.json"
        report = json.loads(file.read_bytes()).get("tokenizer") if file.is_file() else None
        if report and report not in shown:
            shown.append(report)
            show_tokenizer_report(report, console)
            console.print()


def show_packing(datasets: dict[str, Dataset], seq_len: int, console: Console) -> None:
    table = table_of(f"rows of {seq_len:,} tokens", "", "data.packing", "rows", "documents cut", "padding")
    table.columns[1].justify = "left"
    for label, dataset in datasets.items():
        report = packing_report(dataset, seq_len)
        for name in ("concatenate", "best_fit"):
            found = report[name]
            shares = [f"{100 * found[share]:.2f} %" for share in ("truncated", "padding")]
            table.add_row(Text(label if name == "concatenate" else ""), name, f"{found['rows']:,}", *shares)
    console.print(table)
    console.print()


def spread(dataset: Dataset, count: int) -> list[int]:
    """Numbers of `count` documents, evenly over the dataset."""
    count = min(count, dataset.num_documents)
    return [(2 * number + 1) * dataset.num_documents // (2 * count) for number in range(count)]


def show_documents(label: str, dataset: Dataset, numbers: Iterable[int], console: Console, limit: int | None) -> None:
    """Decoded documents, each with its number and length; `limit`: characters shown, none: all, special tokens too."""
    tokenizer = load_tokenizer(dataset.path)
    for number in numbers:
        start, stop = dataset.document(number)
        shown = stop if limit is None else min(stop, start + limit)  # a token has a character, about, or more
        text = tokenizer.decode(dataset.tokens(start, shown).tolist(), skip_special_tokens=limit is not None)
        if limit is not None and (len(text) > limit or shown < stop):
            text = text[:limit].rstrip() + " ..."
        console.rule(Text(f"{label}, document {number:,}, {stop - start:,} tokens", "dim"), align="left", style="dim")
        console.print(Text(text.translate(VISIBLE)), soft_wrap=limit is None)
        console.print()


def show_run(config: PretrainConfig, console: Console) -> None:
    """How often a run of the configuration sees each source, and what part it is of what is seen."""
    samples, train = open_samples(config, "train"), config.train
    place = samples_before(train, train.num_steps)
    names = sorted(config.data.mixture) or [config.data.dir]
    sizes = np.array([[rows.num_rows for rows in phase.rows] for phase in samples.phases])  # (phases, sources)
    drawn = draws(samples, train.num_steps)  # (phases, sources)
    epochs = (drawn / sizes).sum(axis=0)
    title = f"{train.num_steps:,} steps: {place:,} samples, {tokens_before(train, train.num_steps):,} tokens"
    rows_of = [f"rows of {phase.seq_len:,}" for phase in samples.phases]
    shares_of = ["first step", "last step", "all steps"] if config.data.mixture else []
    table = table_of(title, "source", *rows_of, "drawn", "epochs", *shares_of)
    shares = [*weights_at_ends(config, sizes[0].tolist()), drawn.sum(axis=0) / place]
    for source, name in enumerate(names):
        counts = [f"{count:,}" for count in [*sizes[:, source], drawn[:, source].sum()]]
        percents = [f"{100 * share[source]:.1f} %" for share in shares[: len(shares_of)]]
        table.add_row(Text(name), *counts, f"{epochs[source]:.2f}", *percents)
    console.print(table)
    console.print()
    if (epochs > USEFUL_EPOCHS).any():
        repeated = [f"{names[source]} is seen {epochs[source]:.1f} times" for source in np.argsort(-epochs)]
        console.print(
            f"warning: {', '.join(repeated[: (epochs > USEFUL_EPOCHS).sum()])}. Beyond {USEFUL_EPOCHS} epochs repeated "
            f"text teaches less and less (Muennighoff et al. 2023): add text, train for fewer steps"
            + (" or lower its weight\n" if config.data.mixture else "\n")
        )


def draws(samples: Samples, num_steps: int) -> np.ndarray:
    """Samples that a run of num_steps draws in each phase from each source, (phases, sources) int64."""
    steps = [min(phase.first_step, num_steps) for phase in samples.phases] + [num_steps]

    def before(step: int) -> np.ndarray:
        place = samples.places_before(step)
        return np.array([place]) if samples.mixture is None else mixture.counts(samples.mixture, place)

    return np.diff([before(step) for step in steps], axis=0)


def weights_at_ends(config: PretrainConfig, num_rows: list[int]) -> list[np.ndarray]:
    """The sources' shares in the first and in the last step, (sources,) each."""
    stages = mixture_stages(config, num_rows)
    last_place = samples_before(config.train, config.train.num_steps) - 1
    last = [weights for first, weights in stages if first <= last_place][-1]
    return [np.array(weights) / sum(weights) for weights in (stages[0][1], last)]


if __name__ == "__main__":
    sys.exit(main())
