"""A table of chunks gives what was told about them, whatever their length and however often it has to forget."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.chunk_table import PADDING, ChunkTable, KeyTable

UINT16 = np.dtype(np.uint16)


def ids_of_bytes(chunks: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """A chunk's ids are its bytes and its length, so every chunk has ids of its own; b"" would have one id."""
    ids = [number for chunk in chunks for number in (*chunk, len(chunk))]
    return np.array(ids, UINT16), np.array([len(chunk) + 1 for chunk in chunks])


def look_up(table: ChunkTable, chunks: list[bytes]) -> list[list[int]]:
    data = np.frombuffer(b"".join(chunks) + bytes(PADDING), np.uint8)
    ends = np.cumsum([len(chunk) for chunk in chunks], dtype=np.int64)
    ids, counts = table.look_up(data, ends - [len(chunk) for chunk in chunks], ends)
    assert ids.dtype == table.dtype and len(ids) == counts.sum()
    return [part.tolist() for part in np.split(ids, np.cumsum(counts)[:-1])]


# few different bytes, NUL among them, so that chunks repeat and begin alike; lengths on both sides of 8, 15, 16, 31
CHUNKS = st.lists(st.binary(min_size=1, max_size=40) | st.text("a\0b", min_size=1, max_size=34).map(str.encode))


@settings(max_examples=200, deadline=None)
@given(st.lists(CHUNKS.filter(bool), min_size=1, max_size=4))
def test_every_chunk_gets_its_own_ids(calls):
    table = ChunkTable(ids_of_bytes, UINT16, slots=64)
    for chunks in calls:
        chunks = chunks[:40]  # a table takes at most its load at once
        assert look_up(table, chunks) == [[*chunk, len(chunk)] for chunk in chunks]


def test_a_chunk_is_asked_for_once():
    asked: list[bytes] = []

    def ids_of(chunks: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        asked.extend(chunks)
        return ids_of_bytes(chunks)

    table = ChunkTable(ids_of, UINT16)
    chunks = [b"the", b"a much longer chunk", b"the", b"cat", b"a much longer chunk", b"the"]
    for _ in range(3):
        look_up(table, chunks)
    assert sorted(asked) == [b"a much longer chunk", b"cat", b"the"]


def test_chunk_that_is_too_long_for_a_key_is_asked_for_every_time():
    asked: list[bytes] = []

    def ids_of(chunks: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        asked.extend(chunks)
        return ids_of_bytes(chunks)

    table = ChunkTable(ids_of, UINT16)
    for _ in range(2):
        assert look_up(table, [b"x" * 32]) == [[*b"x" * 32, 32]]
    assert asked == [b"x" * 32] * 2


def test_full_table_forgets_and_stays_right():
    table = ChunkTable(ids_of_bytes, UINT16, slots=256)
    most = 0
    for start in range(0, 20_000, 50):
        chunks = [str(number).encode() for number in range(start, start + 50)]
        assert look_up(table, chunks) == [[*chunk, len(chunk)] for chunk in chunks]
        most = max(most, table.tables[0].num_keys)
    assert 100 <= most <= 192  # three quarters of the slots


def test_error_of_the_tokenizer_leaves_no_chunk_without_ids():
    fails = True

    def ids_of(chunks: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        if fails:
            raise RuntimeError("no ids today")
        return ids_of_bytes(chunks)

    table = ChunkTable(ids_of, UINT16)
    with pytest.raises(RuntimeError, match="no ids today"):
        look_up(table, [b"one", b"two"])
    fails = False
    assert look_up(table, [b"two", b"one"]) == [[*b"two", 3], [*b"one", 3]]


def test_keys_in_the_same_slot_are_told_apart():
    table = KeyTable(2, 16)
    keys = np.array([[1, 2, 3, 1, 4, 5, 6, 7, 8], [9, 9, 9, 9, 9, 9, 9, 9, 9]], np.uint64)
    table._first_slots = lambda keys: np.full(keys.shape[1], 14)  # type: ignore[method-assign]
    slots = table.add(keys)
    assert slots[0] == slots[3] and len(set(slots.tolist())) == 8
    table.rows[slots, -1] = np.arange(9)
    assert table.find(keys).tolist() == [3, 1, 2, 3, 4, 5, 6, 7, 8]
    assert table.find(np.array([[99], [9]], np.uint64)).tolist() == [-1]
