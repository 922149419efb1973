"""Import, export and merge: the same documents on both sides, and nothing left where that cannot be."""

from __future__ import annotations

import fcntl
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers

from configs.load import ConfigError
from configs.schema import TokenizerConfig
from data_pipeline import foreign
from data_pipeline.exchange import export_arrow, import_tokens, merge
from data_pipeline.samples import open_samples
from data_pipeline.shards import DataError, Dataset, open_dataset, read_manifest, verify_dataset, write_manifest
from data_pipeline.shards import write_shard as write_one
from data_pipeline.tokenizer import encoder, fingerprint, load_tokenizer, make_tokenizer, save_tokenizer
from tests.conftest import ROOT
from tests.data_pipeline.token_datasets import gpt_config, lengths, write_dataset

FOREIGN = Path(__file__).parent / "data" / "foreign"
MEGATRON = json.loads((FOREIGN / "megatron.json").read_text())
MDS = json.loads((FOREIGN / "mds.json").read_text())
END = 0  # in the fixtures and in the tokenizer here
WORDS = sorted({word for text in MDS["str"] for word in text.split()})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """The folder of a tokenizer whose vocabulary holds the fixtures' ids, up to 99,999."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = ["<|endoftext|>", *WORDS, *(f"word{number}" for number in range(99_999 - len(WORDS)))]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="word0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def bert_tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    made = make_tokenizer(TokenizerConfig(type="wordpiece", vocab_size=1200), [" ".join(WORDS)] * 2, folder)
    made.add_tokens([f"word{number}" for number in range(1200)])
    save_tokenizer(made, folder, 512)
    return folder


def bring_in(kind: str, source: Path, out: Path, tokenizer: Path, *words: str) -> Path:
    """Import `source`, all of it for training unless `words` say something else."""
    import_tokens(kind, source, out, [f"tokenizer={tokenizer}", "validation_fraction=0", *words], Console(quiet=True))
    return out


def documents(dataset: Dataset) -> list[list[int]]:
    ranges = [dataset.document(number) for number in range(dataset.num_documents)]
    return [dataset.tokens(start, stop).tolist() for start, stop in ranges]


def documents_of(folder: Path) -> list[list[int]]:
    assert verify_dataset(folder) == []
    return documents(open_dataset(folder))


def with_end(found: Iterable[list[int]]) -> list[list[int]]:
    return [document if document[-1] == END else [*document, END] for document in found if document]


def error_of(call: Callable[..., Any], *given: Any, kind: type[Exception] = DataError, **named: Any) -> str:
    with pytest.raises(kind) as caught:
        call(*given, **named)
    return str(caught.value)


def said(call: Callable[..., Any], *given: Any) -> str:
    """What a command prints on a terminal of 80 columns."""
    console = Console(width=80, force_terminal=False, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    call(*given, console)
    return console.export_text()


# Import


@pytest.mark.parametrize("name", MEGATRON)
def test_imported_megatron_dataset_has_its_documents(name, tmp_path, tokenizer):
    out = bring_in("megatron", FOREIGN / "megatron" / name, tmp_path / "out", tokenizer)
    assert [path.name for path in out.iterdir()] == ["train"]
    assert documents_of(out / "train") == with_end(MEGATRON[name])


@pytest.mark.parametrize("name", [name for name in MDS if name not in ("br", "str")])
def test_imported_mds_dataset_has_its_documents(name, tmp_path, tokenizer):
    words = ["dtype=uint16", "shard_tokens=100"]
    out = bring_in("mds", FOREIGN / "mds" / name, tmp_path / "out", tokenizer, *words)
    assert documents_of(out / "train") == with_end(MDS[name])
    assert len(read_manifest(out / "train")["shards"]) > 1


def test_imported_text_has_the_ids_of_the_tokenizer(tmp_path, tokenizer):
    out = bring_in("mds", FOREIGN / "mds" / "str", tmp_path / "out", tokenizer, "column=text")
    encode = encoder(load_tokenizer(tokenizer))
    assert documents_of(out / "train") == with_end(ids.tolist() for ids in encode(MDS["str"]))
    assert load_tokenizer(out / "train").decode(documents_of(out / "train")[3]) == f"{MDS['str'][3]} <|endoftext|>"


def test_documents_that_end_are_kept_as_they_are(tmp_path, tokenizer):
    out = bring_in("megatron", FOREIGN / "megatron" / "ended", tmp_path / "out", tokenizer)
    assert documents_of(out / "train") == MEGATRON["ended"]


def test_rows_of_running_text_are_divided_at_end_of_text(tmp_path, tokenizer):
    out = bring_in("mds", FOREIGN / "mds" / "rows", tmp_path / "out", tokenizer, "documents=end_of_text")
    tokens = [token for row in MDS["rows"] for token in row]
    whole = [[*document, END] for document in MDS["bytes"]]  # what make.py cut into rows
    found = documents_of(out / "train")
    assert [token for document in found for token in document][: len(tokens)] == tokens
    assert found[:-1] == whole[: len(found) - 1]


def test_ends_inside_of_documents_are_mentioned(tmp_path, tokenizer):
    words = [f"tokenizer={tokenizer}", "validation_fraction=0"]
    rows = FOREIGN / "mds" / "rows"
    inside = sum(row[:-1].count(END) for row in MDS["rows"])
    text = said(import_tokens, "mds", rows, tmp_path / "rows", words)
    assert f"{inside} end-of-text tokens stand inside of documents" in text and "documents=end_of_text" in text
    text = said(import_tokens, "mds", rows, tmp_path / "divided", [*words, "documents=end_of_text"])
    assert "inside of documents" not in text


def test_documents_for_bert_are_kept_as_they_are(tmp_path, bert_tokenizer):
    out = bring_in("megatron", FOREIGN / "megatron" / "sequences", tmp_path / "out", bert_tokenizer)
    assert documents_of(out / "train") == [document for document in MEGATRON["sequences"] if document]


def test_splits_hold_all_documents_and_the_same_ones_from_any_format(tmp_path, tokenizer):
    found = {}
    for name in ("bytes", "gz", "parts"):
        words = ["validation_fraction=0.3", "dtype=uint16"]
        out = bring_in("mds", FOREIGN / "mds" / name, tmp_path / name, tokenizer, *words)
        found[name] = documents_of(out / "train"), documents_of(out / "validation")
    train, validation = found["bytes"]
    assert found["gz"] == found["parts"] == (train, validation)
    assert sorted(train + validation) == sorted(with_end(MDS["bytes"])) and len(validation) > 2


def test_imported_dataset_can_be_trained_on(tmp_path, tokenizer):
    out = bring_in("megatron", FOREIGN / "megatron" / "int32", tmp_path / "out", tokenizer, "validation_fraction=0.2")
    samples = open_samples(gpt_config(out, train={"global_batch_size": 4}), "train")
    (row, *_) = samples.micro_batches(0, 0, 1)
    assert {name: array.shape for name, array in row.items()} == {"tokens": (1, 17)}
    assert row["tokens"].dtype == np.uint32 and row["tokens"].max() > 65_535


def test_end_of_text_tells_documents_apart_only_where_it_stands_at_their_ends_alone(tmp_path, tokenizer):
    rows = FOREIGN / "mds" / "rows"
    inside = open_dataset(bring_in("mds", rows, tmp_path / "samples", tokenizer) / "train")
    assert any(END in document[:-1] for document in documents(inside)) and inside.document_end_id is None
    ended = bring_in("megatron", FOREIGN / "megatron" / "ended", tmp_path / "ended", tokenizer)
    assert open_dataset(ended / "train").document_end_id == END


def test_origin_is_kept(tmp_path, tokenizer):
    source = FOREIGN / "megatron" / "int32"
    out = bring_in("megatron", source, tmp_path / "out", tokenizer, "validation_fraction=0.2")
    for name in ("train", "validation"):
        imported = json.loads((out / name / "stages.json").read_text())["imported"]
        assert (imported["format"], imported["source"]) == ("megatron", str(source))
        assert imported["validation_fraction"] == 0.2


def write_megatron(dataset: Dataset, prefix: Path) -> None:
    """Megatron's layout, ids of int32, written from its description."""
    sizes = np.concatenate([dataset.document_lengths(shard) for shard in range(len(dataset.shards))])
    starts = 4 * (np.cumsum(sizes) - sizes)
    head = struct.pack("<9sQBQQ", foreign.MEGATRON_HEADER, 1, 4, len(sizes), len(sizes) + 1)
    index = sizes.astype("<i4").tobytes() + starts.astype("<i8").tobytes() + np.arange(len(sizes) + 1).tobytes()
    prefix.with_suffix(".idx").write_bytes(head + index)
    prefix.with_suffix(".bin").write_bytes(dataset.tokens(0, dataset.num_tokens).astype("<i4").tobytes())


def test_round_trip_gives_the_same_dataset(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(foreign, "PIECE_DOCUMENTS", 7)
    loaded = load_tokenizer(tokenizer)
    folder = tmp_path / "own"
    folder.mkdir()
    rng = np.random.default_rng(0)
    entries = []
    for number in range(3):
        sizes = rng.integers(2, 50, 40)
        tokens = rng.integers(1, 100_000, sizes.sum())
        tokens[np.cumsum(sizes) - 1] = END
        name = folder / f"shard-{number:05d}.tokens"
        entries.append(write_one(name, [(tokens, sizes)], loaded.get_vocab_size()))
    write_manifest(folder, entries, loaded.get_vocab_size(), fingerprint(loaded), "test")
    own = open_dataset(folder)
    write_megatron(own, tmp_path / "theirs")
    out = bring_in("megatron", tmp_path / "theirs", tmp_path / "out", tokenizer, "shard_tokens=900")
    assert documents_of(out / "train") == documents(own)
    assert read_manifest(out / "train")["tokenizer_fingerprint"] == own.tokenizer_fingerprint


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "tokenizer=DIR is missing"),
        (["tokenizer=x", "validation_fraction=1"], "validation_fraction=1.0: expected 0 or more"),
        (["tokenizer=x", "validation_fraction=-1"], "validation_fraction=-1.0: expected 0 or more"),
        (["tokenizer=x", "validation_fraction=nan"], "validation_fraction=nan: expected 0 or more"),
        (["tokenizer=x", "documents=rows"], "documents=rows: expected samples or end_of_text"),
        (["tokenizer=x", "shard_tokens=0"], "shard_tokens=0: expected 1 or more"),
        (["tokenizer=x", "dtype=float32"], "dtype=float32: expected one of uint8"),
        (["tokenizer=x", "tokeniser=y"], "did you mean tokenizer="),
    ],
)
def test_options_that_cannot_be_are_named(words, expected, tmp_path):
    given = ("mds", FOREIGN / "mds" / "rows", tmp_path / "out", words, Console(quiet=True))
    assert expected in error_of(import_tokens, *given, kind=ConfigError)


def test_options_of_mds_are_not_megatrons(tmp_path):
    given = ("megatron", FOREIGN / "megatron" / "int32", tmp_path / "out", ["tokenizer=x", "column=a"], Console())
    assert "column=a: known here are tokenizer=" in error_of(import_tokens, *given, kind=ConfigError)


def test_bert_knows_no_end_of_text(tmp_path, bert_tokenizer):
    given = ("mds", FOREIGN / "mds" / "rows", tmp_path / "out", bert_tokenizer, "documents=end_of_text")
    assert "documents=end_of_text: " in error_of(bring_in, *given, kind=ConfigError)


@pytest.mark.parametrize("content", [None, "{}", "\xff"])
def test_tokenizer_that_is_none_is_named(tmp_path, content):
    (tmp_path / "t").mkdir()
    if content is not None:
        (tmp_path / "t" / "tokenizer.json").write_text(content, encoding="latin-1")
    message = error_of(bring_in, "mds", FOREIGN / "mds" / "rows", tmp_path / "out", tmp_path / "t")
    assert f"{tmp_path}/t" in message


def test_failed_import_leaves_nothing(tmp_path, bert_tokenizer):
    given = ("megatron", FOREIGN / "megatron" / "int32", tmp_path / "out", bert_tokenizer)
    assert "int32.bin: holds the token id 99999" in error_of(bring_in, *given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fraction", "split", "cure"), [("0.0001", "validation", "higher"), ("0.99", "train", "lower")]
)
def test_split_without_documents_is_refused(tmp_path, tokenizer, fraction, split, cure):
    source = FOREIGN / "megatron" / "modes"  # three documents
    words = ["megatron", source, tmp_path / "out", tokenizer, f"validation_fraction={fraction}"]
    message = error_of(bring_in, *words)
    assert f"{source}: no document fell into the {split} split" in message and cure in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["import", "merge", "export"])
def test_what_exists_is_not_overwritten(tmp_path, tokenizer, command):
    data = bring_in("megatron", FOREIGN / "megatron" / "int32", tmp_path / "data", tokenizer)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    calls = {
        "import": lambda: bring_in("megatron", FOREIGN / "megatron" / "int32", tmp_path / "out", tokenizer),
        "merge": lambda: merge([str(data), str(data)], tmp_path / "out", Console(quiet=True)),
        "export": lambda: export_arrow(str(data), tmp_path / "out", Console(quiet=True)),
    }
    assert f"{tmp_path}/out: exists already" in error_of(calls[command])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out"]
    assert (tmp_path / "out" / "mine").read_text() == "precious"


def test_what_a_killed_command_has_left_is_removed(tmp_path, tokenizer):
    (tmp_path / ".writing-out" / "train").mkdir(parents=True)
    (tmp_path / ".writing-out" / "train" / "shard-00007.tokens").write_bytes(b"half")
    (tmp_path / ".lock-out").touch()
    out = bring_in("megatron", FOREIGN / "megatron" / "int32", tmp_path / "out", tokenizer)
    assert documents_of(out / "train") and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_commands_do_not_write_one_dataset(tmp_path, tokenizer):
    with (tmp_path / ".lock-out").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        message = error_of(bring_in, "megatron", FOREIGN / "megatron" / "int32", tmp_path / "out", tokenizer)
    assert f"{tmp_path}/out: another command is writing it" in message and not (tmp_path / "out").exists()


def test_place_that_cannot_be_written_is_named(tmp_path, tokenizer):
    (tmp_path / "file").touch()
    message = error_of(bring_in, "megatron", FOREIGN / "megatron" / "int32", tmp_path / "file" / "out", tokenizer)
    assert message.startswith(f"{tmp_path}/file/out: could not be made (")


def test_full_disk_is_named_and_leaves_nothing(tmp_path, tokenizer):
    limited = (
        "import resource, sys; from data_pipeline import exchange; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300)); sys.exit(exchange.main())"
    )
    words = ["import", "megatron", FOREIGN / "megatron" / "joined", tmp_path / "out", f"tokenizer={tokenizer}"]
    ran = subprocess.run([sys.executable, "-c", limited, *words], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 1 and f"{tmp_path}/out: could not be made ([Errno 27] File too large" in ran.stderr
    assert "Traceback" not in ran.stderr and list(tmp_path.iterdir()) == []


PEAK = """
import re, sys
from data_pipeline import exchange
status = exchange.main()
print(re.search("VmHWM: *([0-9]+)", open("/proc/self/status").read().replace("\\t", " "))[1])
sys.exit(status)
"""


def peak_memory(*words: object) -> int:
    """Most memory that a command has in use, in kB."""
    ran = subprocess.run([sys.executable, "-c", PEAK, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return int(ran.stdout.splitlines()[-1])


def test_memory_does_not_grow_with_the_dataset(tmp_path, tokenizer):
    imports, exports = [], []
    for millions in (4, 24):
        tokens = np.random.default_rng(0).integers(1, 60_000, millions * 1_000_000).astype(np.uint16)
        sizes = np.full(millions * 10_000, 100)
        index = struct.pack("<9sQBQQ", foreign.MEGATRON_HEADER, 1, 8, len(sizes), len(sizes) + 1)
        index += sizes.astype("<i4").tobytes() + (np.arange(len(sizes)) * 200).tobytes()
        source, out = tmp_path / f"source{millions}", tmp_path / f"out{millions}"
        source.with_suffix(".idx").write_bytes(index + np.arange(len(sizes) + 1).tobytes())
        source.with_suffix(".bin").write_bytes(tokens.tobytes())
        options = [f"tokenizer={tokenizer}", "shard_tokens=2000000"]
        imports.append(peak_memory("import", "megatron", source, out, *options))
        exports.append(peak_memory("export", "arrow", out, tmp_path / f"arrow{millions}"))
    assert imports[1] - imports[0] < 24_000, imports  # the larger one has 48 MB of tokens and 5 MB of index,
    assert exports[1] - exports[0] < 30_000, exports  # and 96 MB of shards


# Merge


def test_merged_dataset_has_the_documents_one_dataset_after_the_other(tmp_path, tokenizer):
    first = bring_in("megatron", FOREIGN / "megatron" / "int32", tmp_path / "1", tokenizer, "validation_fraction=0.3")
    second = bring_in(
        "mds", FOREIGN / "mds" / "rows", tmp_path / "2", tokenizer, "validation_fraction=0.3", "shard_tokens=90"
    )
    third = bring_in("megatron", FOREIGN / "megatron" / "uint16", tmp_path / "3", tokenizer)
    merge([str(first), str(second), str(third)], tmp_path / "out", Console(quiet=True))
    for name, parts in (("train", [first, second, third]), ("validation", [first, second])):
        assert documents_of(tmp_path / "out" / name) == sum((documents_of(part / name) for part in parts), [])  # noqa: RUF017
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3", "out"]


def test_merged_shards_are_the_same_bytes(tmp_path):
    parts = [tmp_path / "a", tmp_path / "b"]
    write_dataset(parts[0], [lengths(0, 30), lengths(1, 400)])
    write_dataset(parts[1], [lengths(2, 5)], first=7)
    merge([str(part) for part in parts], tmp_path / "out", Console(quiet=True))
    own = [*sorted(parts[0].glob("*.tokens")), *parts[1].glob("*.tokens")]
    merged = sorted((tmp_path / "out").glob("*.tokens"))
    assert [file.name for file in merged] == [f"shard-{number:05d}.tokens" for number in range(3)]
    assert [file.read_bytes() for file in merged] == [file.read_bytes() for file in own]
    assert verify_dataset(tmp_path / "out") == []


def test_merged_dataset_knows_what_ends_documents_if_all_have_the_same(tmp_path):
    for number, (name, end_id) in enumerate({"a": 59_999, "b": 59_999, "c": 59_998, "d": None}.items()):
        write_dataset(tmp_path / name, [[5, 9], [7]], 100 * number, end_id=end_id)
    for others, expected in (("b", 59_999), ("c", None), ("d", None)):
        out = tmp_path / f"a and {others}"
        merge([str(tmp_path / "a"), str(tmp_path / others)], out, Console(quiet=True))
        assert open_dataset(out).document_end_id == expected


def test_merged_dataset_says_what_it_is_made_of(tmp_path, tokenizer):
    parts = [
        bring_in("megatron", FOREIGN / "megatron" / name, tmp_path / name, tokenizer) for name in ("int32", "uint16")
    ]
    merge([str(part) for part in parts], tmp_path / "out", Console(quiet=True))
    merged = json.loads((tmp_path / "out" / "train" / "stages.json").read_text())["merged"]
    assert [part["dir"] for part in merged] == [f"{part}/train" for part in parts]
    manifests = [read_manifest(part / "train") for part in parts]
    for key in ("fingerprint", "documents", "tokens"):
        assert [part[key] for part in merged] == [manifest[key] for manifest in manifests]
    assert merged[1]["stages"]["imported"]["source"] == str(FOREIGN / "megatron" / "uint16")
    assert load_tokenizer(tmp_path / "out" / "train").get_vocab_size() == 100_000


def test_datasets_of_different_tokenizers_are_not_merged(tmp_path, tokenizer, bert_tokenizer):
    source = FOREIGN / "megatron" / "ended"
    parts = [str(bring_in("megatron", source, tmp_path / path.name, path)) for path in (tokenizer, bert_tokenizer)]
    message = error_of(merge, parts, tmp_path / "out", Console(quiet=True))
    assert f"{parts[1]}/train: was built with another tokenizer" in message and f"than {parts[0]}/train" in message
    assert not (tmp_path / "out").exists()


def test_split_and_whole_dataset_are_not_merged(tmp_path, tokenizer):
    whole = bring_in("megatron", FOREIGN / "megatron" / "ended", tmp_path / "a", tokenizer)
    message = error_of(merge, [str(whole), str(whole / "train")], tmp_path / "out", Console(quiet=True))
    assert f"{whole}/train: is one split" in message


def test_what_is_there_twice_is_taken_once(tmp_path):
    write_dataset(tmp_path / "a" / "train", [[3, 4]])
    write_dataset(tmp_path / "b" / "train", [[5]], first=50)
    write_dataset(tmp_path / "a" / "validation", [[6]])
    shutil.copytree(tmp_path / "a" / "validation", tmp_path / "b" / "validation")  # both were built with the same one
    text = said(merge, [f"{tmp_path}/a", f"{tmp_path}/b"], tmp_path / "out")
    assert "b/validation: holds the same as" in text.replace("\n", "")
    assert [read_manifest(tmp_path / "out" / name)["tokens"] for name in ("train", "validation")] == [12, 6]


def test_damaged_dataset_is_not_merged(tmp_path):
    write_dataset(tmp_path / "a", [lengths(0, 30)])
    write_dataset(tmp_path / "b", [lengths(1, 30), lengths(2, 30)])
    shard = tmp_path / "b" / "shard-00001.tokens"
    content = bytearray(shard.read_bytes())
    content[50] ^= 1
    shard.write_bytes(content)
    message = error_of(merge, [f"{tmp_path}/a", f"{tmp_path}/b"], tmp_path / "out", Console(quiet=True))
    assert f"{shard}: is damaged" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


# Export


def column(found: Any) -> list[list[int]]:
    return found["input_ids"][:]


@pytest.mark.parametrize("piece_tokens", [1 << 20, 50])
def test_exported_dataset_has_our_documents(tmp_path, monkeypatch, piece_tokens):
    import datasets

    monkeypatch.setattr("data_pipeline.pieces.PIECE_TOKENS", piece_tokens)
    own = write_dataset(tmp_path / "own", [lengths(0, 30), [1], lengths(1, 200)])
    export_arrow(str(tmp_path / "own"), tmp_path / "out", Console(quiet=True))
    found = datasets.load_from_disk(str(tmp_path / "out"))
    assert column(found) == documents(own)
    assert found.features == {"input_ids": datasets.List(datasets.Value("uint16"))}
    assert found.num_rows == own.num_documents and found[31]["input_ids"] == documents(own)[31]


def test_exported_splits_are_a_dataset_dict(tmp_path, tokenizer):
    import datasets

    data = bring_in("megatron", FOREIGN / "megatron" / "int32", tmp_path / "data", tokenizer, "validation_fraction=0.3")
    export_arrow(str(data), tmp_path / "out", Console(quiet=True))
    found = datasets.load_from_disk(str(tmp_path / "out"))
    assert list(found) == ["train", "validation"]
    assert {name: column(found[name]) for name in found} == {name: documents_of(data / name) for name in found}
    assert str(found["validation"].split) == "validation"
    assert found["train"].features["input_ids"].feature.dtype == "uint32"
    assert fingerprint(load_tokenizer(tmp_path / "out")) == fingerprint(load_tokenizer(tokenizer))


def test_damaged_dataset_is_not_exported(tmp_path):
    write_dataset(tmp_path / "own", [lengths(0, 30)])
    shard = tmp_path / "own" / "shard-00000.tokens"
    shard.write_bytes(bytes(shard.stat().st_size))
    message = error_of(export_arrow, str(tmp_path / "own"), tmp_path / "out", Console(quiet=True))
    assert f"{shard}: is damaged" in message and not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("format", [None, "torch"])
def test_trainer_takes_an_exported_dataset(tmp_path, format):
    import datasets
    import transformers

    write_dataset(tmp_path / "own", [lengths(0, 30)])
    export_arrow(str(tmp_path / "own"), tmp_path / "out", Console(quiet=True))
    vocabulary = Tokenizer(models.WordLevel({"<|endoftext|>": 0}, unk_token="<|endoftext|>"))
    padding = transformers.PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<|endoftext|>")
    config = transformers.GPT2Config(vocab_size=60_000, n_embd=8, n_layer=1, n_head=1, n_positions=64)
    trainer = transformers.Trainer(
        model=transformers.GPT2LMHeadModel(config),
        args=transformers.TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True
        ),
        train_dataset=datasets.load_from_disk(str(tmp_path / "out")).with_format(format),
        data_collator=transformers.DataCollatorForLanguageModeling(padding, mlm=False),
    )  # fmt: skip
    assert 10 < trainer.train().training_loss < 12  # log(60,000) = 11


# The command


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher.cli", "data", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_commands_end_with_what_they_made(tmp_path, tokenizer):
    source = FOREIGN / "megatron" / "int32"
    ran = run("import", "megatron", source, tmp_path / "a", f"tokenizer={tokenizer}", "validation_fraction=0.3")
    assert ran.returncode == 0 and f"{tmp_path}/a/train: " in ran.stdout and f"{tmp_path}/a/validation: " in ran.stdout
    bring_in("megatron", FOREIGN / "megatron" / "uint16", tmp_path / "b", tokenizer)
    ran = run("merge", tmp_path / "c", tmp_path / "a", tmp_path / "b")
    assert ran.returncode == 0 and f"{tmp_path}/c/train: " in ran.stdout
    ran = run("export", "arrow", tmp_path / "c", tmp_path / "d")
    assert ran.returncode == 0 and f"{tmp_path}/d/train: " in ran.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["import", "csv", "a", "b"], "usage: millstream data merge"),
        (["export", "parquet", "a", "b"], "usage: millstream data merge"),
        (["merge", "a", "b"], "usage: millstream data merge"),
        (["merge", "a", "b", "c"], "b: holds no finished dataset"),
        (["merge", "a", "b", "c" * 300], "b: holds no finished dataset"),
        (["export", "arrow", "a" * 300, "b"], "cannot be read (File name too long)"),
        (["import", "mds", "a", "b", "tokenizer=c"], "c: holds no tokenizer"),
    ],
)
def test_commands_that_cannot_be_end_with_one_message(words, expected):
    ran = run(*words)
    assert ran.returncode == 1 and expected in ran.stderr and "Traceback" not in ran.stderr
