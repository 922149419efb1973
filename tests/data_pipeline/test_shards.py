"""The dataset directory: what is written is read back, and what was damaged is named and never returned."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import shards
from data_pipeline.shards import (
    BLOCK_BYTES,
    DataError,
    open_dataset,
    read_manifest,
    token_dtype,
    write_manifest,
    write_shard,
)
from tests.conftest import ROOT


def piece(documents: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([np.array(document) for document in documents]), np.array([len(d) for d in documents])


def write(directory: Path, shards: list[list[list[int]]], vocab_size: int = 1000) -> Path:
    """Each shard in pieces of two documents."""
    directory.mkdir()
    entries = []
    for number, documents in enumerate(shards):
        pieces = [piece(documents[first : first + 2]) for first in range(0, len(documents), 2)]
        entries.append(write_shard(directory / f"shard-{number:05d}.tokens", pieces, vocab_size))
    (directory / "tokenizer.json").write_text("{}")
    write_manifest(directory, entries, vocab_size, "tokenizer", "built from")
    return directory


@pytest.fixture
def directory(tmp_path) -> Path:
    return write(tmp_path / "data", [[[1, 2, 3], [4]], [[5, 6], [7, 8, 9], [10]]])


@pytest.fixture
def large(tmp_path) -> Path:
    """Two shards of many blocks; token i is i % 50_000."""
    rows = [[[*range(30_000)], [*range(30_000, 50_000)]], [[*range(40_000)], [*range(40_000, 50_000)]]]
    return write(tmp_path / "large", rows, 50_000)


def error_of(directory: Path) -> str:
    """What reading all of it says."""
    with pytest.raises(DataError) as caught:
        data = open_dataset(directory)
        data.tokens(0, data.num_tokens)
        data.document_starts(0, data.num_tokens)
    return str(caught.value)


def flip(file: Path, byte: int) -> None:
    content = bytearray(file.read_bytes())
    content[byte] ^= 1
    file.write_bytes(content)


def test_tokens_and_documents_of_all_shards_are_one_row(directory):
    data = open_dataset(directory)
    assert (data.num_tokens, data.num_documents) == (10, 5)
    assert data.tokens(0, 10).tolist() == list(range(1, 11))
    assert data.document_starts(0, 10).tolist() == [0, 3, 4, 6, 9]


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (2, 5), (3, 4), (4, 4), (4, 10), (5, 6), (9, 10), (10, 10)])
def test_any_piece_is_that_piece_of_the_whole(directory, start, stop):
    data = open_dataset(directory)
    assert data.tokens(start, stop).tolist() == list(range(start + 1, stop + 1))
    assert data.tokens(start, stop).dtype == np.uint16
    assert data.document_starts(start, stop).tolist() == [s for s in (0, 3, 4, 6, 9) if start <= s < stop]


@pytest.mark.parametrize("length", [1, 3, 7])
def test_gathered_rows_and_their_documents_are_those_of_single_reads(directory, length):
    data = open_dataset(directory)
    starts = np.arange(0, 11 - length)
    for _ in range(2):  # first touch, then again
        assert data.gather(starts, length).tolist() == [data.tokens(s, s + length).tolist() for s in starts.tolist()]
    expected = [(r, c - s) for r, s in enumerate(starts) for c in (0, 3, 4, 6, 9) if s <= c < s + length]
    rows, columns = data.document_starts_many(starts, length)
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == expected


def test_rows_that_come_from_a_slow_disk_are_the_same(large, monkeypatch):
    monkeypatch.setattr(shards, "SLOW_SECONDS", 0.0)  # as if the first row had taken long: the others are asked for
    starts = np.array([90_000, 10, 49_990, 70_000])
    rows = open_dataset(large).gather(starts, 50)
    assert rows.tolist() == [[i % 50_000 for i in range(start, start + 50)] for start in starts.tolist()]


@pytest.mark.parametrize(("start", "stop"), [(5, 11), (-1, 2)])
def test_piece_beyond_the_ends_is_an_error(directory, start, stop):
    data = open_dataset(directory)
    expected = rf"tokens \[{start}, {stop}\) of a dataset of 10"
    for read in (data.tokens, data.document_starts):
        with pytest.raises(IndexError, match=expected):
            read(start, stop)
    for gather in (data.gather, data.document_starts_many):
        with pytest.raises(IndexError, match=expected):
            gather(np.array([0, start]), stop - start)


def test_vocabulary_over_65536_is_stored_as_uint32_without_a_wrap(tmp_path):
    ids = [0, 65_535, 65_536, 70_000]
    data = open_dataset(write(tmp_path / "big", [[ids]], 70_001))
    assert data.tokens(0, 4).dtype == np.uint32
    assert data.tokens(0, 4).tolist() == ids
    assert token_dtype(65_536) == np.uint16 and token_dtype(65_537) == np.uint32


@pytest.mark.parametrize("token", [1000, -1])
def test_id_outside_of_the_vocabulary_is_refused(tmp_path, token):
    with pytest.raises(DataError, match=f"token id {token} does not fit the vocabulary of 1000"):
        write_shard(tmp_path / "s", [piece([[1, token, 2]])], 1000)
    assert not list(tmp_path.iterdir())


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_what_is_read_is_what_was_written_however_it_is_divided(tmp_path_factory, data):
    """Random shards, pieces, documents and windows, against lists."""
    vocab_size = data.draw(st.sampled_from([300, 70_000]))  # uint16, uint32
    documents = st.integers(1, 40).flatmap(lambda n: st.lists(st.integers(0, vocab_size - 1), min_size=n, max_size=n))
    shards = data.draw(st.lists(st.lists(documents, min_size=1, max_size=7), min_size=1, max_size=4))
    opened = open_dataset(write(tmp_path_factory.mktemp("any") / "data", shards, vocab_size))
    flat = [token for shard in shards for document in shard for token in document]
    first = [0, *itertools.accumulate(len(document) for shard in shards for document in shard)][:-1]
    length = data.draw(st.integers(1, len(flat)))
    starts = data.draw(st.lists(st.integers(0, len(flat) - length), max_size=9))
    for _ in range(2):  # first use, then again
        rows = opened.gather(np.array(starts, np.int64), length)
        assert rows.shape == (len(starts), length) and rows.dtype == token_dtype(vocab_size)
        assert rows.tolist() == [flat[start : start + length] for start in starts]
        found = opened.document_starts_many(np.array(starts, np.int64), length)
        expected = [(i, f - start) for i, start in enumerate(starts) for f in first if start <= f < start + length]
        assert list(zip(*(part.tolist() for part in found), strict=True)) == expected
    assert opened.tokens(0, len(flat)).tolist() == flat
    assert opened.num_documents == len(first)
    assert [opened.document(number)[0] for number in range(len(first))] == first


def test_millions_of_tiny_documents_are_written_in_little_memory(tmp_path):
    """5 million documents of 2 tokens in one shard: the ends alone take 40 MB, of which one piece is in memory."""
    code = (
        "import re, sys, numpy as np; from pathlib import Path; from data_pipeline.shards import write_shard\n"
        # not getrusage: its peak begins with that of the process that started this one
        "peak = lambda: int(re.search(r'VmHWM:\\s*(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "before = peak()\n"
        "pieces = ((np.ones(20_000, np.int64), np.full(10_000, 2)) for _ in range(500))\n"
        "entry = write_shard(Path(sys.argv[1]), pieces, 100)\n"
        "print(entry['documents'], (peak() - before) / 1024)"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path / "s")], cwd=ROOT, capture_output=True, text=True)
    documents, megabytes = ran.stdout.split()
    assert int(documents) == 5_000_000
    assert float(megabytes) < 20


@pytest.mark.parametrize(("soft", "hard", "expected"), [(60, 4096, "5050"), (60, 60, "ulimit -n")])
def test_more_shards_than_open_files_are_allowed(tmp_path, soft, hard, expected):
    write(tmp_path / "data", [[[number, 1]] for number in range(101)])
    code = (
        "import resource, sys; from data_pipeline.shards import DataError, open_dataset\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))\n"
        "data = open_dataset(sys.argv[1])\n"
        "try: print(data.tokens(0, 202)[::2].sum())\n"
        "except DataError as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path / "data")], cwd=ROOT, capture_output=True, text=True)
    assert expected in ran.stdout


@pytest.mark.parametrize(("tokens", "lengths"), [([1, 2], [1]), ([1, 2], [2, 0]), ([1], [])])
def test_pieces_whose_lengths_cannot_be_are_refused(tmp_path, tokens, lengths):
    with pytest.raises(ValueError, match=f"a piece of {len(tokens)} tokens"):
        write_shard(tmp_path / "s", [(np.array(tokens, np.int64), np.array(lengths, np.int64))], 1000)
    assert not list(tmp_path.iterdir())


def test_empty_pieces_are_passed_over_and_an_empty_shard_is_refused(tmp_path):
    empty = np.array([], np.int64), np.array([], np.int64)
    assert write_shard(tmp_path / "s", [empty, piece([[1, 2]]), empty], 10)["documents"] == 1
    with pytest.raises(ValueError, match="no tokens to write"):
        write_shard(tmp_path / "t", [empty], 10)


def test_truncated_shard_is_named_with_both_sizes(directory):
    shard = directory / "shard-00001.tokens"
    shard.write_bytes(shard.read_bytes()[:-8])
    message = error_of(directory)
    assert str(shard) in message and "40 bytes, the manifest says 48" in message and "truncated" in message


def test_damaged_block_is_named_and_the_others_can_be_read(large):
    flip(large / "shard-00001.tokens", 2 * BLOCK_BYTES + 5)
    data = open_dataset(large)
    first = 50_000 + 2 * BLOCK_BYTES // 2
    assert data.tokens(0, first).tolist()[-10:] == [*range(first - 50_010, first - 50_000)]
    for read in (lambda: data.tokens(first - 1, first + 1), lambda: data.gather(np.array([first - 1]), 2)):
        with pytest.raises(DataError, match=r"shard-00001.tokens: is damaged between bytes 32768 and 49151; copy it"):
            read()


def test_damaged_document_ends_are_never_used(large):
    flip(large / "shard-00000.tokens", 100_000 + 1)
    data = open_dataset(large)
    with pytest.raises(DataError, match=r"shard-00000.tokens: is damaged between bytes 98304 and 100015"):
        data.document_starts(0, 10)


def test_damaged_checksums_are_named(large):
    flip(large / "shard-00000.tokens", -1)
    assert "shard-00000.tokens: is damaged between bytes 100016 and 100071" in error_of(large)


def test_missing_shard_is_named(directory):
    (directory / "shard-00001.tokens").unlink()
    assert open_dataset(directory).tokens(0, 4).tolist() == [1, 2, 3, 4]  # opening and others do not need it
    assert "shard-00001.tokens: cannot be read (No such file or directory)" in error_of(directory)


def test_changed_tokenizer_is_named_when_opened(directory):
    (directory / "tokenizer.json").write_text("[]")
    with pytest.raises(DataError, match=r"tokenizer.json: is damaged or was changed after the build"):
        open_dataset(directory)


def test_directory_without_manifest_is_unfinished(directory):
    (directory / "manifest.json").unlink()
    assert "unfinished" in error_of(directory)


def test_missing_directory_says_how_to_make_it(tmp_path):
    assert "millstream data build" in error_of(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("old", "new"),
    [('"vocab_size": 1000', '"vocab_size": 1001'), ("built from", "built From"), ("\n}", "\n }"), ("\n}\n", "\n}")],
)
def test_changed_manifest_is_noticed(directory, old, new):
    file = directory / "manifest.json"
    file.write_text(file.read_text().replace(old, new))
    assert "manifest.json: was changed after the build" in error_of(directory)


def test_damaged_manifest_is_named(directory):
    (directory / "manifest.json").write_text("{")
    assert "manifest.json: is damaged" in error_of(directory)


def test_older_format_says_what_is_read(directory):
    (directory / "manifest.json").write_text(json.dumps({"format": 1, "shards": []}))
    assert "is of format 1, this version reads 2; build the dataset again" in error_of(directory)


@pytest.mark.parametrize("name", ["../outside.tokens", "/etc/passwd", "..", "inside/shard.tokens"])
def test_file_outside_of_the_directory_is_not_opened(directory, name):
    entries = read_manifest(directory)["shards"]
    entries[0]["file"] = name
    write_manifest(directory, entries, 1000, "tokenizer", "built from")
    assert f"shards.0.file={name!r}: is outside of the directory" in error_of(directory)


def test_fingerprint_follows_content_and_not_place(directory, tmp_path):
    same = write(tmp_path / "same", [[[1, 2, 3], [4]], [[5, 6], [7, 8, 9], [10]]])
    other = write(tmp_path / "other", [[[1, 2, 3], [4]], [[5, 6], [7, 8, 9], [11]]])
    prints = [read_manifest(d)["fingerprint"] for d in (directory, same, other)]
    assert prints[0] == prints[1] != prints[2]


def test_shard_is_the_same_however_it_is_cut_into_pieces(tmp_path):
    documents = [[i] * (i % 900 + 1) for i in range(300)]
    whole = write_shard(tmp_path / "whole", [piece(documents)], 1000)
    cut = write_shard(tmp_path / "cut", (piece([document]) for document in documents), 1000)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "cut").read_bytes()
    assert whole | {"file": ""} == cut | {"file": ""}
    assert whole["bytes"] == (tmp_path / "whole").stat().st_size > 5 * BLOCK_BYTES


@pytest.mark.parametrize(
    ("shards", "expected"),
    [
        ([[[1, 2, 0], [0], [3, 0]], [[4, 0]]], 0),
        ([[[1, 2, 999], [3, 4, 5, 999], [999]]], 999),
        ([[[1, 2, 0], [0, 3, 0]]], None),  # also inside of a document
        ([[[1, 2, 0], [5, 0], [3, 0], [4, 0, 1]]], None),  # the last document does not end with it
        ([[[1, 0], [2, 0]], [[1, 5], [2, 5]]], None),  # each shard has another one
        ([[[1, 0], [2, 0]], [[1, 0, 2], [2]]], None),
    ],
)
def test_id_that_ends_every_document_and_is_nowhere_else_is_known(tmp_path, shards, expected):
    data = open_dataset(write(tmp_path / "data", shards))
    assert data.document_end_id == expected and "document_end_id" in data.manifest


def test_older_manifest_that_does_not_say_what_ends_documents_is_of_the_same_dataset(tmp_path):
    directory = write(tmp_path / "data", [[[1, 2, 0], [3, 0]]])
    manifest = read_manifest(directory)
    assert manifest.pop("document_end_id") == 0
    del manifest["checksum"]
    text = json.dumps(manifest, indent=1).removesuffix("\n}").encode()
    (directory / "manifest.json").write_bytes(text + shards._last_lines(text))
    data = open_dataset(directory)
    assert data.document_end_id is None
    content = {key: value for key, value in manifest.items() if key != "fingerprint"}
    assert data.fingerprint == shards._fingerprint(content)  # the samples keep their order


def test_rows_can_be_gathered_from_anywhere_and_written_to(directory):
    data = open_dataset(directory)
    rows = data.gather(np.array([2, 0, 6, 3]), 4)  # over the end of a shard, twice; the second time all is checked
    assert rows.tolist() == [[3, 4, 5, 6], [1, 2, 3, 4], [7, 8, 9, 10], [4, 5, 6, 7]]
    rows[:] = 0
    assert data.gather(np.array([0, 6]), 4).tolist() == [[1, 2, 3, 4], [7, 8, 9, 10]]
    assert data.gather(np.array([], np.int64), 4).shape == (0, 4)


def test_documents_are_found_by_their_number(directory):
    data = open_dataset(directory)
    assert [data.document(number) for number in range(5)] == [(0, 3), (3, 4), (4, 6), (6, 9), (9, 10)]
    assert [data.document_lengths(shard).tolist() for shard in range(2)] == [[3, 1], [2, 3, 1]]
    with pytest.raises(IndexError, match="a dataset of 5 documents has no number 5"):
        data.document(5)
