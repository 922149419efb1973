"""Datasets from others, to others and from several: `millstream data import|export|merge`.

What is made appears under its name in one rename, complete; a command that fails or is killed leaves no dataset.
"""

from __future__ import annotations

import errno
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from tokenizers import Tokenizer

from configs.load import ConfigError
from data_pipeline import foreign
from data_pipeline import tokenizer as tokenizers
from data_pipeline.command import find_splits, options
from data_pipeline.errors import DataError
from data_pipeline.pieces import Pieces, count_inside, divide, end_with, pieces_of, set_aside, split_at, write_shards
from data_pipeline.progress import Progress
from data_pipeline.shards import Dataset, open_dataset, read_manifest, write_manifest, write_shard
from data_pipeline.store import LOCK, WRITING, locked, writing

USAGE = """\
usage: millstream data merge OUT DIR DIR ...
       millstream data import megatron|mds SRC OUT tokenizer=DIR [key=value ...]
       millstream data export arrow DIR OUT

  merge    datasets of one tokenizer, one after the other, as one
  import   SRC: PREFIX of PREFIX.bin and PREFIX.idx, or a folder with an index.json
             tokenizer=DIR               the tokenizer that the tokens were made with
             validation_fraction=0.01    of the documents, chosen by a hash of their tokens; 0: none
             documents=samples           what a document is, or end_of_text: what an end-of-text token ends
             shard_tokens=100000000      a shard is closed at the first document that passes this
             column=tokens               mds: the column with ids or text
             dtype=TYPE                  mds: the type of ids that are kept as bytes, uint16 or int64 for example
  export   a folder for datasets.load_from_disk, with a column input_ids"""
IMPORT_OPTIONS = {"tokenizer": "", "validation_fraction": 0.01, "documents": "samples", "shard_tokens": 100_000_000}
MDS_OPTIONS = {"column": "tokens", "dtype": ""}
REPORT = "stages.json"  # what is known about how a dataset was made
LARGEST_LIST = 2**31 - 1  # items of an Arrow list
NO_LENGTH_LIMIT = int(1e30)  # what transformers writes for tokenizers without one


def main() -> int:
    try:
        match sys.argv[1:]:
            case ["merge", out, _, _, *_]:
                merge(sys.argv[3:], Path(out), Console())
            case ["import", "megatron" | "mds" as kind, source, out, *words]:
                import_tokens(kind, Path(source), Path(out), words, Console())
            case ["export", "arrow", place, out]:
                export_arrow(place, Path(out), Console())
            case _:
                raise ConfigError(USAGE)
    except (ConfigError, DataError) as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{error.filename}: cannot be read ({error.strerror})", file=sys.stderr)
        return 1
    return 0


def merge(places: list[str], out: Path, console: Console) -> None:
    """Write the documents of all datasets, one dataset after the other, as one. Raises DataError.

    The places hold either splits, each of which is merged with its like, or one dataset each. Shards stay as they are
    but for their numbers; they are read and written anew, which compares every byte with its checksum.
    """
    splits = {place: find_splits(place) for place in places}
    names = list(dict.fromkeys(name for found in splits.values() for name in found))
    if "" in names and len(names) > 1:
        alone = next(place for place, found in splits.items() if "" in found)
        raise DataError(
            f"{alone}: is one split, others hold several; give data.dir of all of them, or one split of each"
        )
    datasets = {
        name: {found[name]: open_dataset(found[name]) for found in splits.values() if name in found} for name in names
    }
    refuse_other_tokenizers({place: dataset for found in datasets.values() for place, dataset in found.items()})
    total = sum(shard["bytes"] for found in datasets.values() for one in found.values() for shard in one.shards)
    with making(out) as aside, Progress(console) as progress, progress.phase("merge", total) as advance:
        for name, found in datasets.items():
            merge_split(without_repeated(found, progress), aside / name, advance)
    print_splits(out, console)


def refuse_other_tokenizers(datasets: dict[str, Dataset]) -> None:
    first_place, first = next(iter(datasets.items()))
    for place, dataset in datasets.items():
        if (dataset.tokenizer_fingerprint, dataset.vocab_size) != (first.tokenizer_fingerprint, first.vocab_size):
            raise DataError(
                f"{place}: was built with another tokenizer (fingerprint {dataset.tokenizer_fingerprint}, vocabulary "
                f"{dataset.vocab_size}) than {first_place} ({first.tokenizer_fingerprint}, {first.vocab_size}); build "
                f"it again with data.build.tokenizer={{type: pretrained, path: {first.path}}}"
            )


def without_repeated(datasets: dict[str, Dataset], progress: Progress) -> dict[str, Dataset]:
    """Of datasets with the same tokens the first one: two corpora may have one validation set."""
    kept: dict[str, Dataset] = {}
    place_of: dict[str, str] = {}
    for place, dataset in datasets.items():
        if dataset.fingerprint in place_of:
            progress.say(f"{place}: holds the same as {place_of[dataset.fingerprint]} and is taken once")
        else:
            kept[place], place_of[dataset.fingerprint] = dataset, place
    return kept


def merge_split(datasets: dict[str, Dataset], directory: Path, advance: Callable[[int], None]) -> None:
    directory.mkdir(exist_ok=True)
    entries: list[dict[str, Any]] = []
    for dataset in datasets.values():
        for number, shard in enumerate(dataset.shards):
            path = directory / f"shard-{len(entries):05d}.tokens"
            entries.append(write_shard(path, pieces_of(dataset, number), dataset.vocab_size))
            advance(shard["bytes"])
    first = next(iter(datasets.values()))
    copy_tokenizer(first, directory)
    merged = [
        {
            "dir": place,
            "fingerprint": dataset.fingerprint,
            "documents": dataset.num_documents,
            "tokens": dataset.num_tokens,
            "stages": read_report(dataset),
        }
        for place, dataset in datasets.items()
    ]
    write_json(directory / REPORT, {"merged": merged})
    built_from = f"merge of {', '.join(dataset.fingerprint for dataset in datasets.values())}"
    write_manifest(directory, entries, first.vocab_size, first.tokenizer_fingerprint, built_from)


def import_tokens(kind: str, source: Path, out: Path, words: list[str], console: Console) -> None:
    """Write a dataset of Megatron or MDS as one of ours; the words are those of USAGE. Raises DataError, ConfigError.

    For GPT every document ends with the end-of-text token, which is appended where it is not there; BERT's have none.
    """
    chosen = import_options(kind, words)
    tokenizer, end = load_tokenizer(Path(chosen["tokenizer"]))
    if end is None and chosen["documents"] == "end_of_text":
        raise ConfigError(
            f"documents=end_of_text: the tokenizer of {chosen['tokenizer']} is BERT's, which ends no texts"
        )
    limit, fraction, vocab_size = chosen["shard_tokens"], chosen["validation_fraction"], tokenizer.get_vocab_size()
    num_bytes, read = open_source(kind, source, tokenizer, chosen)
    inside = Counter[int]()
    with making(out) as aside, tempfile.TemporaryFile(dir=aside) as held_out:
        (aside / "train").mkdir()
        with Progress(console) as progress, progress.phase("import", num_bytes) as advance:
            pieces = read(advance)
            if end is not None:
                pieces = split_at(pieces, end) if chosen["documents"] == "end_of_text" else pieces
                pieces = count_inside(end_with(pieces, end), end, inside)
            entries = {"train": write_shards(aside / "train", divide(pieces, fraction, held_out), limit, vocab_size)}
            if fraction:
                (aside / "validation").mkdir()
                entries["validation"] = write_shards(aside / "validation", set_aside(held_out), limit, vocab_size)
        for name, shards in entries.items():
            if not shards:
                raise DataError(
                    f"{source}: no document fell into the {name} split with validation_fraction={fraction}; set it "
                    + ("lower" if name == "train" else "higher, or to 0 for no such split")
                )
            tokenizers.save_tokenizer(tokenizer, aside / name, NO_LENGTH_LIMIT)
            write_json(aside / name / REPORT, {"imported": {"format": kind, "source": str(source)} | chosen})
            fingerprint = tokenizers.fingerprint(tokenizer)
            write_manifest(aside / name, shards, vocab_size, fingerprint, f"import of {kind} {source}")
    print_splits(out, console)
    if end is not None and inside[end]:
        console.print(
            f"{inside[end]:,} end-of-text tokens stand inside of documents; if each ends one, import again with "
            f"documents=end_of_text"
        )


def import_options(kind: str, words: list[str]) -> dict[str, Any]:
    chosen = options(words, IMPORT_OPTIONS if kind == "megatron" else IMPORT_OPTIONS | MDS_OPTIONS)
    faults = []
    if not chosen["tokenizer"]:
        faults.append("tokenizer=DIR is missing: the folder of the tokenizer that the tokens were made with")
    if not 0 <= chosen["validation_fraction"] < 1:
        faults.append(f"validation_fraction={chosen['validation_fraction']}: expected 0 or more and less than 1")
    if chosen["documents"] not in ("samples", "end_of_text"):
        faults.append(f"documents={chosen['documents']}: expected samples or end_of_text")
    if not chosen["shard_tokens"]:
        faults.append("shard_tokens=0: expected 1 or more")
    if chosen.get("dtype") and chosen["dtype"] not in foreign.MDS_DTYPES.values():
        faults.append(f"dtype={chosen['dtype']}: expected one of {', '.join(foreign.MDS_DTYPES.values())}")
    if faults:
        raise ConfigError("\n".join(faults))
    return chosen


def load_tokenizer(folder: Path) -> tuple[Tokenizer, int | None]:
    """The tokenizer and, unless it is BERT's, the id that ends a document. Raises DataError."""
    try:
        tokenizer = tokenizers.load_tokenizer(folder)
    except DataError:
        raise
    except Exception as error:  # tokenizers and protobuf have no class for what they raise
        raise DataError(
            f"tokenizer={folder}: cannot be read ({error}); give a folder as transformers saves it"
        ) from error
    return tokenizer, None if tokenizers.is_bert(tokenizer) else tokenizers.end_of_text_id(tokenizer)


def open_source(
    kind: str, source: Path, tokenizer: Tokenizer, chosen: dict[str, Any]
) -> tuple[int, Callable[[Callable[[int], None]], Pieces]]:
    """(bytes of its files, function that reads it and reports how many bytes it has read) of a dataset to import."""
    vocab_size = tokenizer.get_vocab_size()
    if kind == "megatron":
        _, tokens_file = foreign.megatron_files(source)
        return tokens_file.stat().st_size, lambda advance: foreign.read_megatron(source, vocab_size, advance)
    shards = foreign.open_mds(source)
    dtype = np.dtype(chosen["dtype"]) if chosen["dtype"] else None
    encode_flat = tokenizers.flat_encoder(tokenizer)

    def encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        return encode_flat(texts, None)

    return sum(shard.described.bytes for shard in shards), lambda advance: foreign.read_mds(
        shards, vocab_size, chosen["column"], dtype, encode, advance
    )


def export_arrow(place: str, out: Path, console: Console) -> None:
    """Write a dataset so that `datasets.load_from_disk` gives a column `input_ids`, a row a document.

    Ids keep their type, uint16 or uint32, in which transformers' Trainer takes them. Raises DataError.
    """
    datasets = {name: open_dataset(split) for name, split in find_splits(place).items()}
    total = sum(shard["bytes"] for dataset in datasets.values() for shard in dataset.shards)
    with making(out) as aside, Progress(console) as progress, progress.phase("export", total) as advance:
        for name, dataset in datasets.items():
            (aside / name).mkdir(exist_ok=True)
            write_arrow(dataset, aside / name, name, advance)
            copy_tokenizer(dataset, aside)  # beside both splits, for AutoTokenizer
        if "" not in datasets:
            write_json(aside / "dataset_dict.json", {"splits": list(datasets)})
    print_sizes(
        {str(out / name): (dataset.num_documents, dataset.num_tokens) for name, dataset in datasets.items()}, console
    )


def write_arrow(dataset: Dataset, folder: Path, split: str, advance: Callable[[int], None]) -> None:
    """The files of one `datasets.Dataset`: a stream of record batches for each shard, straight out of its memory."""
    import datasets
    import pyarrow

    features = datasets.Features({"input_ids": datasets.List(datasets.Value(dataset.dtype.name))})
    item_type = pyarrow.from_numpy_dtype(dataset.dtype)
    names = [f"data-{number:05d}-of-{len(dataset.shards):05d}.arrow" for number in range(len(dataset.shards))]
    for number, name in enumerate(names):
        with writing(folder / name) as file, pyarrow.ipc.new_stream(file, features.arrow_schema) as stream:
            for tokens, lengths in pieces_of(dataset, number):
                if len(tokens) > LARGEST_LIST:
                    raise DataError(f"{dataset.path}: a document of {len(tokens):,} tokens is more than Arrow can hold")
                starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
                items = pyarrow.Array.from_buffers(item_type, len(tokens), [None, pyarrow.py_buffer(tokens)])
                lists = pyarrow.ListArray.from_arrays(starts, items)
                stream.write_batch(pyarrow.record_batch([lists], schema=features.arrow_schema))
        advance(dataset.shards[number]["bytes"])
    datasets.DatasetInfo(features=features).write_to_directory(str(folder))
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": dataset.fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": split or None,
    }
    write_json(folder / "state.json", state)


@contextmanager
def making(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` when all went well, and is removed otherwise. Raises DataError."""
    aside = out.with_name(f"{WRITING}{out.name}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with locked(out.with_name(f"{LOCK}{out.name}"), wait=False):
            if out.exists():
                raise DataError(f"{out}: exists already; choose another name, or remove it first")
            shutil.rmtree(aside, ignore_errors=True)  # of a command that was killed
            aside.mkdir()
            try:
                yield aside
                aside.rename(out)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    except BlockingIOError as error:
        raise DataError(f"{out}: another command is writing it; wait for it, or choose another name") from error
    except OSError as error:
        cure = "make room" if error.errno == errno.ENOSPC else "mend that, or choose another place"
        raise DataError(f"{out}: could not be made ({error}); {cure}") from error


def copy_tokenizer(dataset: Dataset, directory: Path) -> None:
    for entry in dataset.manifest["files"]:
        if entry["file"] != REPORT and not entry["file"].endswith(".html"):
            shutil.copyfile(dataset.path / entry["file"], directory / entry["file"])


def read_report(dataset: Dataset) -> Any:
    path = dataset.path / REPORT
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_json(path: Path, content: object) -> None:
    with writing(path) as file:
        file.write(json.dumps(content).encode())


def print_splits(out: Path, console: Console) -> None:
    manifests = {split: read_manifest(Path(split)) for split in find_splits(str(out)).values()}
    print_sizes({split: (found["documents"], found["tokens"]) for split, found in manifests.items()}, console)


def print_sizes(sizes: dict[str, tuple[int, int]], console: Console) -> None:
    for place, (documents, tokens) in sizes.items():
        line = f"{place}: {documents:,} documents, {tokens:,} tokens"
        console.print(line, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
