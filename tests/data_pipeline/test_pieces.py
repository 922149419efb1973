"""Pieces of documents: the same documents however they are cut, against plain lists."""

from __future__ import annotations

import tempfile
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import pieces
from data_pipeline.pieces import count_inside, divide, end_with, pieces_of, set_aside, split_at, stretches, write_shards
from data_pipeline.shards import DataError, open_dataset, write_manifest
from tests.data_pipeline.token_datasets import lengths, write_dataset

END, VOCAB_SIZE = 0, 9
DOCUMENTS = st.lists(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=8), max_size=20)
CUTS = st.sets(st.integers(1, 19))


def cut(documents: list[list[int]], cuts: set[int]) -> pieces.Pieces:
    """The documents in pieces that end before the documents with these numbers."""
    edges = [0, *sorted(place for place in cuts if place < len(documents)), len(documents)]
    for first, stop in pairwise(edges):
        if some := documents[first:stop]:
            yield np.array(list(chain(*some)), np.uint16), np.array([len(document) for document in some])


def joined(found: pieces.Pieces) -> list[list[int]]:
    result = []
    for tokens, sizes in found:
        assert len(sizes) and sizes.min() > 0 and sizes.sum() == len(tokens)
        result += [part.tolist() for part in np.split(tokens, np.cumsum(sizes)[:-1])]
    return result


@given(DOCUMENTS, CUTS)
def test_end_is_appended_where_it_is_not_there(documents, cuts):
    expected = [document if document[-1] == END else [*document, END] for document in documents]
    assert joined(end_with(cut(documents, cuts), END)) == expected


@given(DOCUMENTS, CUTS)
def test_documents_end_after_every_end(documents, cuts):
    expected: list[list[int]] = [[]]
    for token in (token for document in documents for token in document):
        expected[-1].append(token)
        if token == END:
            expected.append([])
    assert joined(split_at(cut(documents, cuts), END)) == [document for document in expected if document]


def test_documents_that_never_end_are_refused(monkeypatch):
    monkeypatch.setattr(pieces, "LONGEST_DOCUMENT", 1000)
    endless = ((np.ones(100, np.uint16), np.array([100])) for _ in range(10**9))
    with pytest.raises(DataError, match="the id 0 ends no document within 1,000 tokens; use documents=samples"):
        list(split_at(endless, END))


@given(DOCUMENTS, CUTS)
def test_ends_inside_of_documents_are_counted(documents, cuts):
    counts = Counter[int]()
    assert joined(count_inside(cut(documents, cuts), END, counts)) == documents
    assert counts[END] == sum(document[:-1].count(END) for document in documents)


@settings(deadline=None)
@given(DOCUMENTS, CUTS, st.sampled_from([0.0, 0.3, 0.99]))
def test_every_document_is_on_one_side_with_all_that_are_like_it(documents, cuts, fraction):
    with tempfile.TemporaryFile() as aside:
        kept = joined(divide(cut(documents, cuts), fraction, aside))
        held_out = joined(set_aside(aside))
    assert not {tuple(document) for document in kept} & {tuple(document) for document in held_out}
    is_kept = {tuple(document) for document in kept}
    assert kept == [document for document in documents if tuple(document) in is_kept]
    assert held_out == [document for document in documents if tuple(document) not in is_kept]
    assert fraction or not held_out


def test_side_of_a_document_depends_on_its_tokens_alone():
    documents = [np.random.default_rng(number).integers(0, VOCAB_SIZE, 20).tolist() for number in range(300)]
    sides = []
    for order in (documents, documents[::-1]):
        with tempfile.TemporaryFile() as aside:
            sides.append(sorted(joined(divide(cut(order, {7, 11, 12}), 0.5, aside))))
    assert sides[0] == sides[1] and 100 < len(sides[0]) < 200


@pytest.mark.parametrize("fraction", [0.01, 0.25])
def test_about_the_fraction_is_held_out(fraction):
    tokens = np.random.default_rng(0).integers(0, 50_000, 200_000).astype(np.uint16)
    with tempfile.TemporaryFile() as aside:
        list(divide(iter([(tokens, np.full(20_000, 10))]), fraction, aside))
        held_out = sum(len(sizes) for _, sizes in set_aside(aside))
    deviation = (20_000 * fraction * (1 - fraction)) ** 0.5
    assert abs(held_out - 20_000 * fraction) < 4 * deviation


@settings(deadline=None, max_examples=50)
@given(DOCUMENTS, CUTS, st.integers(1, 30))
def test_shards_hold_the_documents_and_end_with_the_one_that_fills_them(documents, cuts, shard_tokens):
    expected: list[list[list[int]]] = []
    for document in documents:
        if not expected or sum(map(len, expected[-1])) >= shard_tokens:
            expected.append([])
        expected[-1].append(document)
    with tempfile.TemporaryDirectory() as folder:
        entries = write_shards(Path(folder), cut(documents, cuts), shard_tokens, VOCAB_SIZE)
        assert [entry["file"] for entry in entries] == [f"shard-{n:05d}.tokens" for n in range(len(expected))]
        write_manifest(Path(folder), entries, VOCAB_SIZE, "none", "test")
        dataset = open_dataset(folder)
        assert [joined(pieces_of(dataset, shard)) for shard in range(len(entries))] == expected


def test_pieces_of_a_dataset_do_not_depend_on_their_size(tmp_path, monkeypatch):
    shards = [lengths(0, 50), lengths(1, 3), [500]]
    dataset = write_dataset(tmp_path / "data", shards)
    for size in (1, 100, 10_000):
        monkeypatch.setattr(pieces, "PIECE_TOKENS", size)
        found = [joined(pieces_of(dataset, shard)) for shard in range(3)]
        assert [[len(document) for document in of_shard] for of_shard in found] == shards
        tokens = [token for of_shard in found for document in of_shard for token in document]
        assert tokens == list(range(dataset.num_tokens))


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 60))
def test_stretches_hold_at_most_their_size_or_one_document(sizes, limit):
    starts = np.cumsum([0, *sizes])
    before, pieces.PIECE_TOKENS = pieces.PIECE_TOKENS, limit
    try:
        found = list(stretches(starts))
    finally:
        pieces.PIECE_TOKENS = before
    assert [number for low, high in found for number in range(low, high)] == list(range(len(sizes)))
    for low, high in found:
        assert starts[high] - starts[low] <= limit or high == low + 1
        assert high == len(sizes) or starts[high + 1] - starts[low] > limit  # and no less than there is room for
