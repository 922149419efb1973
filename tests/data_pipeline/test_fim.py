"""Fill in the middle: against the slow obvious way, the paper's forms and shares, what must not change of a row."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import FimConfig
from data_pipeline import chance
from data_pipeline.fim import NUM_CHANCES, FimIds, fill_in_middle, fill_in_rows
from data_pipeline.pack import IGNORE_INDEX, gpt_rows, pad_rows

IDS = FimIds(prefix=1, middle=2, suffix=3, end=0)
FIRST = 10  # ordinary ids are from here on
ALWAYS = FimConfig(probability=1.0, spm_share=0.0)


def make_rows(seed: int, num_rows: int, width: int, longest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of one stream of documents, every one ended by its id: tokens, and where documents start."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, num_rows * width)
    ends = np.cumsum(lengths)[np.cumsum(lengths) < num_rows * width + longest]
    tokens = FIRST + np.arange(ends[-1])
    tokens[ends - 1] = IDS.end
    starts = ends[ends < num_rows * width]
    return tokens[: num_rows * width].reshape(num_rows, width), *np.divmod(starts, width)


def keys_of(num_rows: int) -> np.ndarray:
    return chance.row_keys(7, np.arange(num_rows))


def documents_of(width: int, num_rows: int, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    starts = np.union1d(rows * width + columns, np.arange(0, num_rows * width, width))
    return starts, np.diff(starts, append=num_rows * width)


def run(tokens: np.ndarray, rows: np.ndarray, columns: np.ndarray, fim: FimConfig, keys: np.ndarray) -> np.ndarray:
    documents = documents_of(tokens.shape[1], len(tokens), rows, columns)
    return fill_in_middle(tokens, *documents, keys, fim, IDS)


def slow_document(document: list[int], chances: list[float], fim: FimConfig) -> list[int]:
    end = document[-1:] if document[-1] == IDS.end else []
    text = document[: len(document) - len(end)]
    if chances[0] >= fim.probability or len(text) < 6:
        return document
    text = text[:-3]
    first, second = sorted(int(cut * (len(text) + 1)) for cut in chances[2:])
    prefix, middle, suffix = text[:first], text[first:second], text[second:]
    if chances[1] < fim.spm_share:
        return [IDS.prefix, IDS.suffix, *suffix, IDS.middle, *prefix, *middle, *end]
    return [IDS.prefix, *prefix, IDS.suffix, *suffix, IDS.middle, *middle, *end]


@given(
    st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 50), st.integers(1, 80), st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([0.0, 0.5, 1.0]),
)  # fmt: skip
def test_rows_are_those_of_the_slow_obvious_way(seed, num_rows, width, longest, probability, spm_share):
    tokens, rows, columns = make_rows(seed, num_rows, width, longest)
    fim, keys = FimConfig(probability=probability, spm_share=spm_share), keys_of(num_rows)
    made = run(tokens, rows, columns, fim, keys)
    for row in range(num_rows):
        inner = [0, *(column for column in columns[rows == row].tolist() if column), width]
        expected = []
        for number, (start, stop) in enumerate(itertools.pairwise(inner)):
            chances = chance.uniform(keys[row], NUM_CHANCES * number + np.arange(NUM_CHANCES)).tolist()
            expected += slow_document(tokens[row, start:stop].tolist(), chances, fim)
        assert made[row].tolist() == expected


def parts(document: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Prefix, middle and suffix of a rearranged document without its end, of either form."""
    at = document.index(IDS.middle)
    if document[1] == IDS.suffix:
        prefix_and_middle, suffix = document[at + 1 :], document[2:at]
        return prefix_and_middle, [], suffix
    between = document.index(IDS.suffix)
    return document[1:between], document[at + 1 :], document[between + 1 : at]


@pytest.mark.parametrize("spm_share", [0.0, 1.0])
def test_parts_in_their_old_order_are_the_document_without_its_last_three_tokens(spm_share):
    tokens = FIRST + np.arange(200 * 40).reshape(200, 40)
    tokens[:, -1] = IDS.end
    none = np.empty(0, np.int64)
    made = run(tokens, none, none, FimConfig(probability=1.0, spm_share=spm_share), keys_of(200))
    for before, after in zip(tokens.tolist(), made.tolist(), strict=True):
        assert after[0] == IDS.prefix and after[-1] == IDS.end
        prefix, middle, suffix = parts(after[:-1])
        assert prefix + middle + suffix == before[:-4]


def test_every_pair_of_cuts_is_equally_likely():
    """Bavarian et al. 2022, section 3: two places, drawn independently of each other."""
    kept, count = 4, 50_000
    tokens = np.tile(FIRST + np.arange(kept + 3), (count, 1))
    made = run(tokens, np.empty(0, np.int64), np.empty(0, np.int64), ALWAYS, keys_of(count))
    first = (made == IDS.suffix).argmax(1) - 1
    second = kept - ((made == IDS.middle).argmax(1) - first - 2)
    counts = np.zeros((kept + 1, kept + 1))
    np.add.at(counts, (first, second), 1)
    expected = np.triu(np.full((kept + 1, kept + 1), 2.0), 1) + np.eye(kept + 1)
    expected *= count / (kept + 1) ** 2
    upper = np.triu_indices(kept + 1)
    statistic = ((counts[upper] - expected[upper]) ** 2 / expected[upper]).sum()
    assert counts.sum() == count == counts[upper].sum()
    assert statistic < len(upper[0]) + 5 * np.sqrt(2 * len(upper[0]))


def test_shares_of_documents_and_of_forms_are_those_asked_for():
    count, width = 4000, 300
    tokens = FIRST + np.arange(2 * count * width).reshape(count, 2 * width)
    rows, columns = np.arange(count), np.full(count, width)  # two documents a row
    made = run(tokens, rows, columns, FimConfig(probability=0.7, spm_share=0.2), keys_of(count)).reshape(-1, width)
    is_fim = made[:, 0] == IDS.prefix
    # With an empty prefix the two forms are the same: 1 - (297 / 298)^2 of the documents
    is_spm = made[is_fim, 1] == IDS.suffix
    expected = 0.2 + 0.8 * (1 - (297 / 298) ** 2)
    assert is_fim.mean() == pytest.approx(0.7, abs=5 * np.sqrt(0.7 * 0.3 / len(made)))
    assert is_spm.mean() == pytest.approx(expected, abs=5 * np.sqrt(0.16 / is_fim.sum()))
    both = is_fim.reshape(-1, 2)
    assert (both[:, 0] & both[:, 1]).mean() == pytest.approx(0.49, abs=5 * np.sqrt(0.25 / count))


def test_documents_keep_their_places_and_their_ends():
    tokens, rows, columns = make_rows(3, 50, 65, 30)
    before = gpt_rows(tokens, rows, columns)
    after = fill_in_rows(before, keys_of(50), FimConfig(probability=1.0), IDS)
    assert all(after[name].shape == before[name].shape and after[name].dtype == before[name].dtype for name in before)
    assert np.array_equal(before["input_ids"] == IDS.end, after["input_ids"] == IDS.end)
    for name in ("segment_ids", "position_ids"):
        assert np.array_equal(before[name], after[name])
    assert np.array_equal(before["labels"] == IGNORE_INDEX, after["labels"] == IGNORE_INDEX)
    targets = after["labels"][:, :-1]
    assert np.array_equal(targets[targets >= 0], after["input_ids"][:, 1:][targets >= 0])


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(2, 50), st.integers(1, 80))
def test_whole_arrays_and_tokens_alone_are_rearranged_alike(seed, num_rows, width, longest):
    tokens, rows, columns = make_rows(seed, num_rows, width, longest)
    fim, keys = FimConfig(probability=0.8), keys_of(num_rows)
    made = run(tokens, rows, columns, fim, keys)
    assert np.array_equal(fill_in_rows({"tokens": tokens}, keys, fim, IDS)["tokens"], made)
    whole, expected = fill_in_rows(gpt_rows(tokens, rows, columns), keys, fim, IDS), gpt_rows(made, rows, columns)
    assert all(np.array_equal(whole[name], expected[name]) for name in expected)


def test_padding_of_a_row_stays():
    tokens = np.array([[*range(FIRST, FIRST + 12), IDS.end, 0, 0, 0, 0]])
    batch = gpt_rows(tokens, np.array([0]), np.array([13]))
    pad_rows(batch, np.array([13]))
    made = fill_in_rows(batch, keys_of(1), ALWAYS, IDS)
    assert made["input_ids"][0, 0] == IDS.prefix
    assert made["input_ids"][0, 12:].tolist() == [IDS.end, 0, 0, 0]
    assert (made["labels"][0, 12:] == IGNORE_INDEX).all() and (made["labels"][0, :12] != IGNORE_INDEX).all()


def test_no_token_comes_into_another_document_and_none_twice():
    tokens, rows, columns = make_rows(4, 50, 65, 30)
    starts, lengths = documents_of(65, 50, rows, columns)
    made = run(tokens, rows, columns, FimConfig(probability=1.0), keys_of(50)).ravel()
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        document = made[start : start + length]
        text = document[document >= FIRST]
        assert len(set(text.tolist())) == len(text)
        assert set(text.tolist()) <= set(tokens.ravel()[start : start + length].tolist())


def test_short_documents_and_padding_stay():
    tokens = FIRST + np.arange(20)[None]
    made = fill_in_middle(tokens, np.array([0, 5]), np.array([5, 9]), keys_of(1), ALWAYS, IDS)
    assert np.array_equal(made[0, :5], tokens[0, :5]) and np.array_equal(made[0, 14:], tokens[0, 14:])
    assert made[0, 5] == IDS.prefix


def test_probability_zero_changes_nothing():
    tokens, rows, columns = make_rows(5, 20, 65, 30)
    assert np.array_equal(run(tokens, rows, columns, FimConfig(), keys_of(20)), tokens)


def test_a_row_is_the_same_in_any_company_and_another_with_another_key():
    tokens, rows, columns = make_rows(6, 8, 65, 30)
    fim = FimConfig(probability=0.5)
    together = run(tokens, rows, columns, fim, keys_of(8))
    for row in range(8):
        own = columns[rows == row]
        alone = run(tokens[[row]], np.zeros_like(own), own, fim, keys_of(8)[[row]])
        assert np.array_equal(alone[0], together[row])
    assert not np.array_equal(run(tokens, rows, columns, fim, keys_of(9)[1:]), together)
