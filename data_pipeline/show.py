"""Look at a dataset: `millstream data inspect|head|verify DIR`; DIR is data.dir or one of its splits."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from configs.load import ConfigError, load_pretrain
from configs.schema import PretrainConfig
from data_pipeline.errors import DataError
from data_pipeline.parts import SPLITS
from data_pipeline.shards import Dataset, open_dataset, verify_dataset
from data_pipeline.tokenizer import load_tokenizer

USAGE = "usage: millstream data inspect|head|verify DIR [documents=N] [picture=FILE.png]"
BAR_WIDTH = 40  # characters of the longest bar


def main() -> int:
    try:
        match sys.argv[1:]:
            case ["inspect", place, *words]:
                inspect(place, options(words, documents=2, picture=""), Console(highlight=False))
            case ["head", place, *words]:
                head(place, options(words, documents=5), Console(highlight=False))
            case ["verify", place]:
                return verify(place, Console(highlight=False))
            case _:
                raise ConfigError(USAGE)
    except (ConfigError, DataError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def options(words: list[str], **defaults: int | str) -> dict[str, int | str]:
    """`key=value` words over defaults of the same types. Raises ConfigError."""
    values = dict(defaults)
    for word in words:
        key, _, value = word.partition("=")
        if key not in defaults:
            raise ConfigError(f"{word}: known here: {', '.join(f'{name}=' for name in defaults)}")
        if isinstance(defaults[key], int):
            if not value.isdigit():
                raise ConfigError(f"{word}: expected a number")
            values[key] = int(value)
        else:
            values[key] = value
    return values


def find_splits(place: str) -> list[Path]:
    """The dataset directories that `place` stands for. Raises DataError where there is none."""
    root = Path(place)
    if (root / "manifest.json").is_file():
        return [root]
    found = [root / name for name in SPLITS if (root / name / "manifest.json").is_file()]
    if not found:
        raise DataError(f"{place}: holds no finished dataset; make it with `millstream data build CONFIG`")
    return found


def inspect(place: str, chosen: dict[str, int | str], console: Console) -> None:
    """Sizes, lengths of documents and samples of each split; of a configuration also its mixture and its packing."""
    if place.endswith((".yaml", ".yml")):
        config = load_pretrain(place)
        show_order(config, console)
        places = [source.dir for source in config.data.mixture.values()] or [config.data.dir]
    else:
        places = [place]
    datasets = [open_dataset(directory) for name in places for directory in find_splits(name)]
    console.print(sizes_table(datasets))
    for dataset in datasets:
        show_lengths(dataset, console)
    if chosen["picture"]:
        draw_lengths(datasets, Path(str(chosen["picture"])))
        console.print(f"{chosen['picture']} shows the lengths")
    for dataset in datasets:
        show_documents(dataset, spread(dataset, int(chosen["documents"])), console, 300)
    for dataset in datasets:
        if (dataset.path / "card.html").exists():
            console.print(f"{dataset.path / 'card.html'} describes how it was built")
            break


def head(place: str, chosen: dict[str, int | str], console: Console) -> None:
    """The first documents, whole."""
    dataset = open_dataset(find_splits(place)[0])
    show_documents(dataset, range(min(int(chosen["documents"]), dataset.num_documents)), console, None)


def verify(place: str, console: Console) -> int:
    """Read every byte of every file and compare it with its checksum; exit code 1 if something is wrong."""
    faults = [fault for directory in find_splits(place) for fault in verify_dataset(directory)]
    for fault in faults:
        print(fault, file=sys.stderr)
    if not faults:
        console.print(f"{place}: every byte is as it was written")
    return 1 if faults else 0


def sizes_table(datasets: list[Dataset]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("dataset")
    for column in ("documents", "tokens", "shards", "MB", "vocabulary", "longest", "mean", "median"):
        table.add_column(column, justify="right", no_wrap=True)
    for dataset in datasets:
        found = lengths(dataset)
        table.add_row(
            escape(str(dataset.path)),
            f"{dataset.num_documents:,}",
            f"{dataset.num_tokens:,}",
            str(len(dataset.shards)),
            f"{sum(shard['bytes'] for shard in dataset.shards) / 1e6:,.1f}",
            f"{dataset.vocab_size:,}",
            f"{found.max():,}",
            f"{found.mean():,.0f}",
            f"{int(np.median(found)):,}",
        )
    return table


def lengths(dataset: Dataset) -> np.ndarray:
    """Tokens of every document, (documents,) int64."""
    return np.concatenate([dataset.document_lengths(shard) for shard in range(len(dataset.shards))])


def histogram(found: np.ndarray) -> list[tuple[int, int, int]]:
    """(power of two, documents of at least that many tokens and fewer than twice as many, their tokens)."""
    powers = np.frexp(found.astype(np.float64))[1] - 1
    return [
        (1 << power, int((powers == power).sum()), int(found[powers == power].sum()))
        for power in range(int(powers.min()), int(powers.max()) + 1)
    ]


def show_lengths(dataset: Dataset, console: Console) -> None:
    rows = histogram(lengths(dataset))
    most = max(documents for _, documents, _ in rows)
    table = Table(box=box.SIMPLE_HEAD, title=f"tokens a document: {escape(str(dataset.path))}", title_justify="left")
    for column in ("from", "documents", "share of tokens"):
        table.add_column(column, justify="right")
    table.add_column("")
    for low, documents, tokens in rows:
        bar = "█" * -(-BAR_WIDTH * documents // most) if documents else ""
        table.add_row(f"{low:,}", f"{documents:,}", f"{100 * tokens / dataset.num_tokens:.1f} %", bar)
    console.print(table)


def draw_lengths(datasets: list[Dataset], file: Path) -> None:
    """The same as a picture: documents and tokens by length, one row of panels a dataset."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(datasets), 2, figsize=(10, 3 * len(datasets)), squeeze=False)
    for (left, right), dataset in zip(panels, datasets, strict=True):
        rows = histogram(lengths(dataset))
        labels = [f"{low:,}" for low, _, _ in rows]
        for axes, column, title in ((left, 1, "documents"), (right, 2, "tokens")):
            axes.bar(labels, [row[column] for row in rows], color="#4477aa")
            axes.set_title(f"{dataset.path.name}: {title} by length", fontsize=10)
            axes.set_xlabel("tokens a document, from")
            axes.tick_params(axis="x", labelrotation=60, labelsize=8)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def spread(dataset: Dataset, count: int) -> list[int]:
    """Numbers of `count` documents, evenly over the dataset."""
    count = min(count, dataset.num_documents)
    return [(2 * number + 1) * dataset.num_documents // (2 * count) for number in range(count)]


def show_documents(
    dataset: Dataset, numbers: Iterator[int] | range | list[int], console: Console, limit: int | None
) -> None:
    """Decoded documents, each with its number and length; `limit`: characters shown."""
    tokenizer = load_tokenizer(dataset.path)
    for number in numbers:
        start, stop = dataset.document(number)
        text = tokenizer.decode(dataset.tokens(start, stop).tolist(), skip_special_tokens=limit is not None)
        console.rule(f"[dim]{escape(str(dataset.path))}, document {number:,}: {stop - start:,} tokens", align="left")
        shortened = text if limit is None or len(text) <= limit else text[:limit] + " ..."
        console.print(shortened, markup=False)


def show_order(config: PretrainConfig, console: Console) -> None:
    """What a run of this configuration sees: each source's share and epochs, and what packing cuts and pads."""


if __name__ == "__main__":
    sys.exit(main())
