"""The dataset directory: what is written is read back, and what was damaged is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.shards import DataError, open_dataset, read_manifest, token_dtype, write_manifest, write_shard


def write(directory: Path, shards: list[list[list[int]]], vocab_size: int = 1000) -> Path:
    directory.mkdir()
    entries = []
    for number, documents in enumerate(shards):
        arrays = [np.array(document) for document in documents]
        entries.append(write_shard(directory / f"shard-{number:05d}.tokens", arrays, vocab_size))
    write_manifest(directory, entries, vocab_size, "tokenizer", "built from")
    return directory


@pytest.fixture
def directory(tmp_path) -> Path:
    return write(tmp_path / "data", [[[1, 2, 3], [4]], [[5, 6], [7, 8, 9], [10]]])


def error_of(directory: Path) -> str:
    with pytest.raises(DataError) as caught:
        open_dataset(directory)
    return str(caught.value)


def test_tokens_and_documents_of_all_shards_are_one_row(directory):
    data = open_dataset(directory)
    assert (data.num_tokens, data.num_documents) == (10, 5)
    assert data.tokens(0, 10).tolist() == list(range(1, 11))
    assert data.document_starts(0, 10).tolist() == [0, 3, 4, 6, 9]


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (2, 5), (3, 4), (4, 4), (4, 10), (5, 6), (9, 10)])
def test_any_piece_is_that_piece_of_the_whole(directory, start, stop):
    data = open_dataset(directory)
    if start < stop:
        assert data.tokens(start, stop).tolist() == list(range(start + 1, stop + 1))
    assert data.document_starts(start, stop).tolist() == [s for s in (0, 3, 4, 6, 9) if start <= s < stop]


def test_piece_beyond_the_end_is_an_error(directory):
    with pytest.raises(IndexError, match=r"tokens \[5, 11\) of a dataset of 10"):
        open_dataset(directory).tokens(5, 11)


def test_vocabulary_over_65536_is_stored_as_uint32_without_a_wrap(tmp_path):
    ids = [0, 65_535, 65_536, 70_000]
    data = open_dataset(write(tmp_path / "big", [[ids]], 70_001))
    assert data.tokens(0, 4).dtype == np.uint32
    assert data.tokens(0, 4).tolist() == ids
    assert token_dtype(65_536) == np.uint16 and token_dtype(65_537) == np.uint32


def test_id_outside_of_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(DataError, match="token id 1000 does not fit the vocabulary of 1000"):
        write_shard(tmp_path / "s", [np.array([1000])], 1000)
    assert not list(tmp_path.iterdir())


def test_truncated_shard_is_named_with_both_sizes(directory):
    shard = directory / "shard-00001.tokens"
    shard.write_bytes(shard.read_bytes()[:-8])
    message = error_of(directory)
    assert str(shard) in message and "32 bytes, the manifest says 40" in message and "truncated" in message


def test_altered_shard_is_named(directory):
    shard = directory / "shard-00000.tokens"
    content = bytearray(shard.read_bytes())
    content[2] ^= 1
    shard.write_bytes(content)
    assert f"{shard}: is damaged" in error_of(directory)


def test_missing_shard_is_named(directory):
    (directory / "shard-00001.tokens").unlink()
    assert "shard-00001.tokens: is missing" in error_of(directory)


def test_directory_without_manifest_is_unfinished(directory):
    (directory / "manifest.json").unlink()
    assert "unfinished" in error_of(directory)


def test_missing_directory_says_how_to_make_it(tmp_path):
    assert "millstream data build" in error_of(tmp_path / "nothing")


def test_changed_manifest_is_noticed(directory):
    file = directory / "manifest.json"
    file.write_text(file.read_text().replace('"vocab_size": 1000', '"vocab_size": 1001'))
    assert "was changed after the build" in error_of(directory)


def test_damaged_manifest_is_named(directory):
    (directory / "manifest.json").write_text("{")
    assert "manifest.json: is damaged" in error_of(directory)


def test_shard_outside_of_the_directory_is_not_opened(directory):
    outside = directory.parent / "outside.tokens"
    outside.write_bytes((directory / "shard-00000.tokens").read_bytes())
    manifest = read_manifest(directory)
    manifest["shards"][0]["file"] = "../outside.tokens"
    entries = manifest["shards"]
    write_manifest(directory, entries, 1000, "tokenizer", "built from")
    assert "outside of the directory" in error_of(directory)


def test_fingerprint_follows_content_and_not_place(directory, tmp_path):
    same = write(tmp_path / "same", [[[1, 2, 3], [4]], [[5, 6], [7, 8, 9], [10]]])
    other = write(tmp_path / "other", [[[1, 2, 3], [4]], [[5, 6], [7, 8, 9], [11]]])
    prints = [json.loads((d / "manifest.json").read_text())["fingerprint"] for d in (directory, same, other)]
    assert prints[0] == prints[1] != prints[2]
