"""Text to a dataset directory: the same bytes for any number of workers, nothing finished is ever overwritten."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from configs.load import load_pretrain
from data_pipeline import build
from data_pipeline.shards import DataError, open_dataset

QUIET = Console(quiet=True)


@pytest.fixture
def corpus(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    words = np.array(["the", "a", "sun", "moon", "river", "stone", "bird", "king", "runs", "sings", "slowly", "."])
    records = [{"text": " ".join(rng.choice(words, rng.integers(5, 60)))} for _ in range(400)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "config.yaml").write_text(
        f"run_dir: unused\ndata:\n  dir: {tmp_path}/data\n  build:\n    sources: [{tmp_path}/corpus.jsonl]\n"
        "    validation_fraction: 0.1\n    tokenizer: {vocab_size: 300}\n    num_workers: 1\n"
    )
    return tmp_path / "config.yaml"


def make(config: Path, *overrides: str) -> Path:
    settings = load_pretrain(config, list(overrides))
    build.build(settings, QUIET)
    return Path(settings.data.dir)


def content(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def error_of(config: Path, *overrides: str) -> str:
    with pytest.raises(DataError) as caught:
        make(config, *overrides)
    return str(caught.value)


def test_result_is_byte_identical_for_any_number_of_workers(corpus, monkeypatch):
    monkeypatch.setattr(build, "CHUNK_CHARACTERS", 2000)  # dozens of pieces of work
    shards = "data.build.shard_tokens=2000"
    one = content(make(corpus, shards, f"data.dir={corpus.parent}/one"))
    three = content(make(corpus, shards, f"data.dir={corpus.parent}/three", "data.build.num_workers=3"))
    assert one == three
    assert sum(name.endswith(".tokens") for name in one) > 3


def test_every_document_is_in_exactly_one_split_with_its_end_token(corpus):
    root = make(corpus)
    texts = {json.loads(line)["text"] for line in (corpus.parent / "corpus.jsonl").open()}
    found = []
    for name in ("train", "validation"):
        data, tokenizer = open_dataset(root / name), build.tokenizers.load_tokenizer(root / name)
        starts = [*data.document_starts(0, data.num_tokens).tolist(), data.num_tokens]
        for start, stop in itertools.pairwise(starts):
            ids = data.tokens(start, stop).tolist()
            assert ids[-1] == tokenizer.token_to_id("<|endoftext|>")
            found.append(tokenizer.decode(ids[:-1]))
    assert sorted(found) == sorted(texts)
    assert 0.04 < open_dataset(root / "validation").num_documents / len(texts) < 0.18


def test_tail_split_holds_out_the_end_of_each_document(tmp_path, corpus):
    (tmp_path / "long.txt").write_text("abcdefghij" * 100)
    root = make(
        corpus,
        f"data.build.sources=[{tmp_path}/long.txt]",
        "data.build.split_by=tail",
        "data.build.tokenizer.type=characters",
    )
    assert open_dataset(root / "train").num_tokens == 900 + 1
    assert open_dataset(root / "validation").num_tokens == 100 + 1


def test_own_validation_sources_are_the_validation_split(tmp_path, corpus):
    (tmp_path / "held.txt").write_text("held out text")
    root = make(corpus, f"data.build.validation_sources=[{tmp_path}/held.txt]")
    assert open_dataset(root / "validation").num_documents == 1
    assert open_dataset(root / "train").num_documents == 400


def test_second_build_of_the_same_does_nothing(corpus):
    root = make(corpus)
    times = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    make(corpus)
    assert times == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_finished_dataset_of_other_settings_is_kept_and_named(corpus):
    root = make(corpus)
    before = content(root)
    message = error_of(corpus, "data.build.tokenizer.vocab_size=310")
    assert str(root) in message and "other sources or settings" in message
    assert content(root) == before


def test_foreign_folder_is_kept(corpus):
    root = corpus.parent / "data"
    root.mkdir()
    (root / "thesis.doc").write_text("years of work")
    assert "is not empty and not a dataset" in error_of(corpus)
    assert (root / "thesis.doc").read_text() == "years of work"


def test_unfinished_directory_is_built_again(corpus):
    root = make(corpus)
    whole = content(root)
    (root / "train/manifest.json").unlink()
    make(corpus)
    assert content(root) == whole


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", "the sources hold no text at all"), ('{"text": "  "}\n', "the sources hold no text at all")],
)
def test_empty_corpus_is_an_error(tmp_path, corpus, text, expected):
    (tmp_path / "corpus.jsonl").write_text(text)
    assert expected in error_of(corpus)
    assert not (tmp_path / "data").exists()


def test_corpus_too_small_to_be_split_says_what_to_set(tmp_path, corpus):
    (tmp_path / "corpus.jsonl").write_text('{"text": "only one document"}\n')
    message = error_of(corpus)
    assert "no document fell into the" in message and "data.build.split_by=tail" in message


def test_broken_record_stops_the_build_and_leaves_nothing_or_is_skipped(tmp_path, corpus):
    with (tmp_path / "corpus.jsonl").open("a") as file:
        file.write("{broken\n")
    assert f"{tmp_path}/corpus.jsonl:401: is not valid JSON" in error_of(corpus)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "corpus.jsonl"]
    root = make(corpus, "data.build.on_error=skip")
    assert sum(open_dataset(root / name).num_documents for name in ("train", "validation")) == 400


def test_large_vocabulary_is_stored_as_uint32(tmp_path, corpus):
    letters = [chr(0x4E00 + i) for i in range(20_000)] + [chr(0xAC00 + i) for i in range(11_000)]
    letters += [chr(0x20000 + i) for i in range(40_000)]
    (tmp_path / "wide.txt").write_text("".join(letters), encoding="utf-8")
    root = make(
        corpus,
        f"data.build.sources=[{tmp_path}/wide.txt]",
        f"data.build.validation_sources=[{tmp_path}/wide.txt]",
        "data.build.tokenizer.type=characters",
    )
    data = open_dataset(root / "train")
    assert data.vocab_size == len(letters) + 2
    tokenizer = build.tokenizers.load_tokenizer(root / "train")
    assert tokenizer.decode(data.tokens(0, data.num_tokens - 1).tolist()) == "".join(letters)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_full_disk_is_named_and_leaves_nothing_half_written(tmp_path, corpus):
    import subprocess

    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.decode().strip()}")
    try:
        message = error_of(corpus, f"data.dir={small}/data")
        assert "No space left on device" in message and "make room or choose another data.dir" in message
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)
