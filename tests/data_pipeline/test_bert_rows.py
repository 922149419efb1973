"""BERT's rows against the slow obvious way to make one, over real datasets; pairs, short samples, unpadded batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from configs.load import ConfigError
from configs.schema import MaskingConfig
from data_pipeline import chance
from data_pipeline.bert_rows import FIRST_CHANCE, Vocabulary, make_rows, read_vocabulary, row_stride, unpad
from data_pipeline.mask import IGNORE_INDEX
from data_pipeline.shards import Dataset, open_dataset, write_manifest, write_shard
from data_pipeline.tokenizer import load_tokenizer

CLS, SEP, MASK, STOP, VOCAB = 2, 3, 4, 9, 200
PAIRS = ["nsp", "sop", "none"]
UNMASKED = {"probability": 0.0}


def vocabulary() -> Vocabulary:
    ids = np.arange(VOCAB)
    return Vocabulary(CLS, SEP, MASK, ids == STOP, ids % 3 == 0, ids[5:])


def write(folder: Path, stop_share: float, *shards: list[int]) -> Dataset:
    """A dataset of shards of documents of these lengths, with random text; a share of the tokens ends a sentence."""
    rng = np.random.default_rng(len(shards))
    entries = []
    for number, lengths in enumerate(shards):
        ids = rng.integers(5, VOCAB, sum(lengths))
        ids[ids == STOP] += 1
        ids[rng.random(len(ids)) < stop_share] = STOP
        pieces = [(ids, np.array(lengths))]
        entries.append(write_shard(folder / f"shard-{number:05d}.tokens", pieces, VOCAB))
    write_manifest(folder, entries, VOCAB, "none", "test")
    return open_dataset(folder)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> list[Dataset]:
    """Long documents and sentences, short ones in two shards, hardly any text, documents of one token."""
    folders = [tmp_path_factory.mktemp(name) for name in ("long", "short", "tiny", "ones")]
    short = np.random.default_rng(0).integers(1, 60, 400).tolist()
    return [
        write(folders[0], 0.04, [20_000, 700, 15_000]),
        write(folders[1], 0.15, short[:150], short[150:]),
        write(folders[2], 0.15, [1, 1, 40, 1]),
        write(folders[3], 0.15, [1] * 90),
    ]


def rows_of(dataset: Dataset, samples, draws, seq_len: int, **masking) -> dict[str, np.ndarray]:
    keys = chance.row_keys(5, np.asarray(draws))
    return make_rows(dataset, np.asarray(samples), keys, vocabulary(), MaskingConfig(**masking), seq_len)


def text(rows: dict[str, np.ndarray], number: int) -> list[list[int]]:
    """The segments of an unmasked row, without special tokens; checks that row's form on the way."""
    real = rows["segment_ids"][number] == 1
    length = int(real.sum())
    ids, types = rows["input_ids"][number], rows["token_type_ids"][number]
    assert real[:length].all() and (ids[length:] == 0).all() and (types[length:] == 0).all()
    assert rows["position_ids"][number].tolist() == list(range(len(ids)))
    assert ids[0] == CLS and ids[length - 1] == SEP
    if "next_sentence_label" not in rows:
        assert (types == 0).all()
        return [ids[1 : length - 1].tolist()]
    end_of_a = int((types[:length] == 0).sum()) - 1
    assert ids[end_of_a] == SEP and (types[end_of_a + 1 : length] == 1).all()
    return [ids[1:end_of_a].tolist(), ids[end_of_a + 1 : length - 1].tolist()]


def slow_row(dataset: Dataset, sample: int, draw: int, seq_len: int, pairs: str, short: float):
    """(segments, label) as the docstrings say, one token at a time."""
    key = chance.row_keys(5, np.array([draw]))
    is_short, shorter, flip, where_to_cut, other = (
        float(chance.uniform(key, np.array([FIRST_CHANCE + number]))[0]) for number in range(5)
    )
    stride = seq_len - (2 if pairs == "none" else 3)
    length = 2 + int(shorter * (stride - 1)) if is_short < short else stride
    begin = sample * stride
    starts = set(dataset.document_starts(0, dataset.num_tokens).tolist())

    def token(place: int) -> int:
        return int(dataset.tokens(place, place + 1)[0])

    def is_boundary(place: int) -> bool:
        return place in starts or (place > 0 and token(place - 1) == STOP)

    def longest_document(begin: int) -> list[int]:
        parts: list[list[int]] = [[]]
        for place in range(begin, begin + stride):
            if place in starts and parts[-1]:
                parts.append([])
            parts[-1].append(token(place))
        return max(parts, key=len)  # the first of equally long ones

    if pairs == "none":
        first = next((place for place in range(begin, begin + length // 2) if is_boundary(place)), begin)
        last = min(first + length, dataset.num_tokens)
        end = next((place for place in range(last, first, -1) if is_boundary(place)), last)
        return [[token(place) for place in range(first, end)]], None
    document = longest_document(begin)[:length]
    size = len(document)
    middle = [cut for cut in range(1, size) if size // 4 <= cut <= size - size // 4]
    cuts = [cut for cut in middle if document[cut - 1] == STOP]
    cut = cuts[int(where_to_cut * len(cuts))] if cuts else max(1, size // 2)
    a, b = document[:cut], document[cut:]
    wrong = flip < 0.5
    if wrong and pairs == "sop":
        a, b = b, a
    elif wrong:
        num_samples = dataset.num_tokens // stride
        elsewhere = (sample + 1 + int(other * max(1, num_samples - 1))) % num_samples
        b = longest_document(elsewhere * stride)[: max(1, length - cut)]
    return [a, b], int(wrong) if a and b else IGNORE_INDEX


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 3), st.sampled_from(PAIRS), st.integers(5, 70), st.sampled_from([0.0, 0.5, 0.99]),
    st.integers(0, 2**40),
)  # fmt: skip
def test_rows_are_those_of_the_slow_obvious_way(datasets, which, pairs, seq_len, short, seed):
    dataset = datasets[which]
    masking = {"pairs": pairs, "short_probability": short}
    num_samples = dataset.num_tokens // row_stride(MaskingConfig(**masking), seq_len)
    assume(num_samples > 0)
    samples = np.random.default_rng(seed).integers(0, num_samples, 6)
    samples[-1] = num_samples - 1  # whose window may end with the dataset
    rows = rows_of(dataset, samples, seed + np.arange(6), seq_len, **masking, **UNMASKED)
    for number, sample in enumerate(samples.tolist()):
        segments, label = slow_row(dataset, sample, seed + number, seq_len, pairs, short)
        assert text(rows, number) == segments
        if pairs != "none":
            assert rows["next_sentence_label"][number] == label


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_a_row_is_the_same_in_whichever_batch_it_is_made(datasets, pairs, unit):
    settings = {"pairs": pairs, "unit": unit, "short_probability": 0.3}
    for dataset in datasets[:2]:
        samples, draws = np.arange(24) * 3, 10**6 + np.arange(24)
        together = rows_of(dataset, samples, draws, 32, **settings)
        for size in (1, 3, 8):
            cuts = [slice(i, i + size) for i in range(0, 24, size)]
            parts = [rows_of(dataset, samples[cut], draws[cut], 32, **settings) for cut in cuts]
            for name, array in together.items():
                assert np.array_equal(array, np.concatenate([part[name] for part in parts]))


def test_a_sample_is_masked_and_paired_anew_at_every_draw(datasets):
    rows = rows_of(datasets[0], [7] * 200, np.arange(200), 64, pairs="nsp", short_probability=0.5)
    assert len({labels.tobytes() for labels in rows["labels"]}) > 190
    assert len({length for length in rows["segment_ids"].sum(1).tolist()}) > 30
    assert 60 < rows["next_sentence_label"].sum() < 140


@pytest.mark.parametrize("pairs", ["nsp", "sop"])
def test_half_of_the_pairs_are_wrong_and_where_they_are_cut_does_not_tell(datasets, pairs):
    samples = np.random.default_rng(0).integers(0, datasets[0].num_tokens // 61, 4000)
    rows = rows_of(datasets[0], samples, np.arange(4000), 64, pairs=pairs, **UNMASKED)
    label = rows["next_sentence_label"]
    assert label.mean() == pytest.approx(0.5, abs=5 * 0.5 / np.sqrt(4000))
    size_of_a = ((rows["token_type_ids"] == 0) & (rows["segment_ids"] == 1)).sum(1)
    sizes = [size_of_a[label == kind].mean() for kind in (0, 1)]
    assert sizes[0] == pytest.approx(sizes[1], abs=1.5)


def test_swapped_pairs_are_the_right_ones_in_the_other_order(datasets):
    samples = np.arange(300)
    right, swapped = {}, {}
    for draw in range(0, 3000, 300):
        rows = rows_of(datasets[0], samples, draw + samples, 64, pairs="sop", **UNMASKED)
        for number, label in enumerate(rows["next_sentence_label"].tolist()):
            (swapped if label else right)[number, draw] = text(rows, number)
    for (number, _), (first, second) in swapped.items():
        whole = next(a + b for (other, _), (a, b) in right.items() if other == number)
        assert second + first == whole and first and second


def test_short_samples_have_their_share_and_lengths_from_2_to_the_full_one_equally_often(datasets):
    samples = np.random.default_rng(1).integers(0, 500, 20_000)
    rows = rows_of(datasets[0], samples, np.arange(20_000), 35, pairs="sop", short_probability=0.25, **UNMASKED)
    lengths = rows["segment_ids"].sum(1) - 3
    counts = np.bincount(lengths, minlength=33)
    assert counts[:2].sum() < 50  # from windows that a document's end divides
    shorter = counts[2:32] / 20_000
    assert np.abs(shorter - 0.25 / 31).max() < 6 * np.sqrt(0.25 / 31 / 20_000)


def test_one_dataset_gives_rows_of_128_and_of_512_tokens_over_all_of_its_text(datasets):
    dataset = datasets[0]
    for seq_len in (128, 512):
        stride = row_stride(MaskingConfig(), seq_len)
        samples = np.arange(dataset.num_tokens // stride)
        rows = rows_of(dataset, samples, samples, seq_len, pairs="sop", **UNMASKED)
        assert rows["input_ids"].shape == (len(samples), seq_len)
        found = sum(len(segment) for number in range(len(samples)) for segment in text(rows, number))
        assert found > 0.97 * dataset.num_tokens  # without the ends of documents


@pytest.mark.parametrize("pairs", PAIRS)
def test_masking_leaves_special_tokens_and_padding_alone(datasets, pairs):
    for unit in ("token", "word", "span"):
        rows = rows_of(datasets[1], np.arange(100), np.arange(100), 48, pairs=pairs, unit=unit, short_probability=0.2)
        bare = rows_of(datasets[1], np.arange(100), np.arange(100), 48, pairs=pairs, short_probability=0.2, **UNMASKED)
        is_target = rows["labels"] != IGNORE_INDEX
        assert np.array_equal(rows["labels"][is_target], bare["input_ids"][is_target])
        assert np.array_equal(rows["input_ids"][~is_target], bare["input_ids"][~is_target])
        assert not np.isin(bare["input_ids"][is_target], [0, CLS, SEP]).any()
        assert is_target.any(1).all() and ((rows["input_ids"] == MASK) <= is_target).all()


def test_unpadded_rows_are_the_real_tokens_of_the_rows_longest_first(datasets):
    rows = rows_of(datasets[1], np.arange(40), np.arange(40), 64, short_probability=0.3)
    flat = unpad(rows)
    ends = flat["cu_seqlens"]
    lengths = rows["segment_ids"].sum(1)
    assert ends.dtype == np.int32 and ends[0] == 0 and ends[-1] == lengths.sum() == flat["input_ids"].size
    assert np.diff(ends).tolist() == sorted(lengths.tolist(), reverse=True)
    order = sorted(range(40), key=lambda number: -lengths[number])  # stable: equal lengths keep their order
    for place, number in enumerate(order):
        piece, real = slice(ends[place], ends[place + 1]), rows["segment_ids"][number] == 1
        for name in ("input_ids", "token_type_ids", "position_ids", "labels"):
            assert np.array_equal(flat[name][0, piece], rows[name][number, real])
        assert flat["next_sentence_label"][place] == rows["next_sentence_label"][number]
    assert "segment_ids" not in flat and "cu_seqlens" not in rows


def test_published_vocabulary_has_its_special_tokens_and_tables(shared_data):
    tokenizer = load_tokenizer(shared_data / "tokenizers/bert-base-uncased")
    found = read_vocabulary(tokenizer)
    assert (found.cls_id, found.sep_id, found.mask_id) == (101, 102, 103)
    assert {tokenizer.id_to_token(i) for i in np.flatnonzero(found.ends_sentence)} >= {".", "!", "?"}
    pieces = [tokenizer.token_to_id(piece) for piece in ("##ing", "the")]
    assert found.continues_word[pieces].tolist() == [True, False]
    assert not set(found.ordinary_ids) & {0, 100, 101, 102, 103}


@pytest.mark.parametrize(("pairs", "shortest"), [("nsp", 5), ("none", 4)])
def test_row_without_room_for_two_tokens_is_an_error_that_says_how_long_it_must_be(pairs, shortest):
    masking = MaskingConfig(pairs=pairs)
    assert row_stride(masking, shortest) == 2
    with pytest.raises(ConfigError, match=rf"train.seq_len={shortest - 1}: .* raise it to {shortest} or more"):
        row_stride(masking, shortest - 1)
