"""Tokens of parts: read as they were written, from any document to any other; cut into shards without reading all."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.part_tokens import cut_shards, read_documents, read_index, write_index, write_tokens

Documents = list[list[int]]
# Parts; a part is blocks; a block is a split and lengths of its documents.
blocks = st.tuples(st.sampled_from(["train", "validation"]), st.lists(st.integers(1, 9), max_size=6))
corpora = st.lists(st.lists(blocks, max_size=5), max_size=4)


@pytest.fixture(scope="module")
def write(tmp_path_factory) -> Callable[[list[list[tuple[str, list[int]]]]], tuple[list[Path], list[Documents]]]:
    """Writes parts of numbered tokens; returns their files and each one's documents of the train split."""
    folder = tmp_path_factory.mktemp("tokens")

    def write_parts(corpus):
        paths, expected = [], []
        next_token = 0
        for number, part in enumerate(corpus):
            batches, documents = [], []
            for split, lengths in part:
                tokens = np.arange(next_token, next_token + sum(lengths), dtype=np.uint16)
                next_token += sum(lengths)
                batches.append((split, tokens, np.array(lengths, np.int64)))
                stops = np.cumsum([0, *lengths]).tolist()
                documents += [tokens[a:b].tolist() for a, b in pairwise(stops) if split == "train"]
            paths.append(folder / str(number))
            with paths[-1].open("wb") as file:
                write_index(file, write_tokens(file, batches))
            expected.append(documents)
        return paths, expected

    return write_parts


def read(path: Path, first: int, after: int) -> Documents:
    found: Documents = []
    for tokens, lengths in read_documents(path, "train", first, after):
        stops = np.cumsum([0, *lengths]).tolist()
        assert stops[-1] == len(tokens) and len(lengths)
        found += [tokens[a:b].tolist() for a, b in pairwise(stops)]
    return found


@given(st.lists(blocks, max_size=5), st.data())
def test_any_documents_are_read_as_they_were_written(write, part, data):
    (path,), (expected,) = write([part])
    after = data.draw(st.integers(0, len(expected)))
    first = data.draw(st.integers(0, after))
    assert read(path, first, after) == expected[first:after]


@given(corpora, st.integers(1, 40))
@settings(max_examples=300)
def test_shards_end_with_the_document_that_fills_them_and_hold_every_document_once(write, corpus, shard_tokens):
    paths, documents = write(corpus)
    shards: list[Documents] = [[]]
    for document in (document for part in documents for document in part):
        shards[-1].append(document)
        if sum(map(len, shards[-1])) >= shard_tokens:
            shards.append([])
    found = list(cut_shards(paths, "train", shard_tokens))
    assert [
        [document for part, first, after in stretches for document in read(paths[part], first, after)]
        for stretches, _ in found
    ] == [shard for shard in shards if shard]
    assert [num_tokens for _, num_tokens in found] == [sum(map(len, shard)) for shard in shards if shard]


def test_index_counts_documents_tokens_and_lengths_of_each_split(write):
    (path,), _ = write([[("train", [1, 2, 3]), ("validation", [9]), ("train", [4, 7, 8])]])
    assert read_index(path)["splits"] == {
        "train": {"documents": 6, "tokens": 25, "longest": 8, "lengths": {"1": 1, "2": 2, "4": 2, "8": 1}},
        "validation": {"documents": 1, "tokens": 9, "longest": 9, "lengths": {"8": 1}},
    }


def test_large_ids_are_kept(tmp_path):
    with (tmp_path / "part").open("wb") as file:
        write_index(file, write_tokens(file, [("train", np.array([70_000, 3], np.uint32), np.array([2]))]))
    assert read(tmp_path / "part", 0, 1) == [[70_000, 3]]
