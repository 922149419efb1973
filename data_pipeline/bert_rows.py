"""A micro batch for BERT out of a dataset: segments A and B, special tokens, masking, padding, or none of it (`unpad`).

Sample k starts at token k x stride, where a stride is what a row holds besides its special tokens; so one dataset
serves every sequence length, and a sample is found in O(1). `masking.pairs` says what is asked of two segments:

    nsp    half of the time B is not what follows A but a stretch from elsewhere (Devlin et al. 2019)
    sop    half of the time the two are swapped (ALBERT, Lan et al. 2020)
    none   full sentences fill the row, one segment (RoBERTa, Liu et al. 2019: FULL-SENTENCES)

Devlin et al. walk through each document sentence by sentence; here a pair is the longest stretch of one document in the
sample's window, divided at a sentence end. Everything is done for all rows at once, in array operations, and every
chance is a hash of the row's key (`chance`), so a row is the same in whichever batch it is made.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from configs.load import ConfigError
from configs.schema import MaskingConfig
from data_pipeline import chance, mask
from data_pipeline.mask import IGNORE_INDEX
from data_pipeline.shards import Dataset
from data_pipeline.tokenizer import continues_word, ends_sentence, ordinary_ids

# A row's random numbers besides those of `mask`, which counts from 0 to below 2^23.
FIRST_CHANCE, NUM_CHANCES = 1 << 23, 5
Stretch = tuple[np.ndarray, np.ndarray]  # of each row: its first token's place in all windows, its size; (n,) int64
SHORTEST = 2  # tokens of a short sample, special ones not counted (Devlin et al. 2019's code)


@dataclass(frozen=True)
class Vocabulary:
    """What of a tokenizer the rows need; the tables are (vocab,) bool, ordinary_ids (ordinary,) int64."""

    cls_id: int
    sep_id: int
    mask_id: int
    ends_sentence: np.ndarray
    continues_word: np.ndarray
    ordinary_ids: np.ndarray


def read_vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """The tables of a tokenizer that has BERT's special tokens (`tokenizer.is_bert`)."""
    ids = tokenizer.get_vocab()
    tables = ends_sentence(tokenizer), continues_word(tokenizer), ordinary_ids(tokenizer)
    return Vocabulary(ids["[CLS]"], ids["[SEP]"], ids["[MASK]"], *tables)


def row_stride(masking: MaskingConfig, seq_len: int) -> int:
    """Tokens from one sample's start to the next one's: what a row of seq_len holds besides its special tokens.

    Raises ConfigError for a seq_len that has no room for two.
    """
    num_special = 2 if masking.pairs == "none" else 3
    if seq_len < num_special + SHORTEST:
        raise ConfigError(
            f"train.seq_len={seq_len}: a row of BERT has {num_special} special tokens with data.masking.pairs="
            f"{masking.pairs}, and at least {SHORTEST} others; raise it to {num_special + SHORTEST} or more"
        )
    return seq_len - num_special


def make_rows(
    dataset: Dataset,
    samples: np.ndarray,
    keys: np.ndarray,
    vocabulary: Vocabulary,
    masking: MaskingConfig,
    seq_len: int,
) -> dict[str, np.ndarray]:
    """The rows of `samples` (n,) int64, in [0, num_tokens // row_stride); each draws its chances from its key (n,).

    All results are (n, seq_len) int64 but for segment_ids (int32; 1, and 0 on padding) and next_sentence_label, (n,)
    int64, which pairs=none does not have: 1 where B is random or swapped, -100 where a sample of one token has no B.
    The others are input_ids, token_type_ids (1 in B), position_ids and labels (see `mask.mask_rows`). Padding has id 0.
    """
    is_short, *chances = chance.uniform(keys[:, None], FIRST_CHANCE + np.arange(NUM_CHANCES)).T
    stride = row_stride(masking, seq_len)
    shorter = SHORTEST + _below(stride - SHORTEST + 1, chances[0])
    lengths = np.where(is_short < masking.short_probability, shorter, stride)  # of the text
    if masking.pairs == "none":
        row, maskable = _sentences(dataset, samples, lengths, vocabulary, seq_len)
    else:
        row, maskable = _pairs(dataset, samples, lengths, chances[1:], vocabulary, masking.pairs == "sop", seq_len)
    ids = row["input_ids"]
    continues = vocabulary.continues_word.take(ids) if masking.unit != "token" else np.zeros_like(maskable)
    row["input_ids"], row["labels"] = mask.mask_rows(
        ids, maskable, continues, keys, masking, vocabulary.mask_id, vocabulary.ordinary_ids
    )
    return row


def unpad(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The n rows as one without padding (MosaicBERT, Portes et al. 2023; ModernBERT, Warner et al. 2024).

    Arrays (n, seq_len) become (1, total), the real tokens of all rows one after the other, the longest row first, so
    that attention finds rows of like length side by side. cu_seqlens, (n + 1,) int32, takes the place of segment_ids:
    row i is [cu_seqlens[i], cu_seqlens[i + 1]). next_sentence_label stays (n,), in the new order.
    """
    lengths = np.count_nonzero(rows["segment_ids"], axis=1)
    order = np.argsort(-lengths, kind="stable")
    rows = {name: array[order] for name, array in rows.items()}
    real = rows.pop("segment_ids") > 0
    flat = {name: array[real][None] if array.ndim == 2 else array for name, array in rows.items()}
    return {**flat, "cu_seqlens": np.concatenate([[0], np.cumsum(lengths[order])]).astype(np.int32)}


def _sentences(
    dataset: Dataset, samples: np.ndarray, lengths: np.ndarray, vocabulary: Vocabulary, seq_len: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Rows of one segment that begins and ends at sentence ends, of at most `lengths` tokens.

    It begins at the first boundary in the first half of what it may hold; a longer sentence is cut.
    """
    stride = seq_len - 2
    begin = samples * stride
    tokens, document_starts, begin_of_window = _windows(dataset, np.maximum(begin - 1, 0), 1 + stride + stride // 2)
    begin = (begin - begin_of_window)[:, None]  # the sample's first token in its window, which shows the one before
    places = np.arange(tokens.shape[1] + 1)
    boundary = np.zeros((len(tokens), len(places)), dtype=bool)  # [:, i]: a sentence or document ends before token i
    boundary[:, 1:] = vocabulary.ends_sentence.take(tokens)
    boundary[np.divmod(document_starts, tokens.shape[1])] = True
    early = boundary & (places >= begin) & (places < begin + lengths[:, None] // 2)
    first = np.where(early.any(1), early.argmax(1), begin[:, 0])
    last = np.minimum(first + lengths, tokens.shape[1])
    inside = boundary & (places > first[:, None]) & (places <= last[:, None])
    end = np.where(inside.any(1), len(places) - 1 - inside[:, ::-1].argmax(1), last)
    in_all = first + np.arange(len(tokens)) * tokens.shape[1]
    return _lay_out(tokens, (in_all, end - first), None, vocabulary, seq_len)


def _pairs(
    dataset: Dataset,
    samples: np.ndarray,
    lengths: np.ndarray,
    chances: list[np.ndarray],
    vocabulary: Vocabulary,
    swap: bool,
    seq_len: int,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Rows of two segments that are neighbours in the longest stretch of one document in the sample's window.

    Half of the rows are wrong pairs: A and B are swapped, or without `swap` B is from the longest such stretch of
    another sample's window. A and B meet at a sentence end in the middle half, or in the middle where there is none.
    """
    flip, where_to_cut, other = chances
    count, stride = len(samples), seq_len - 3
    wrong = flip < 0.5
    needed = samples * stride
    if not swap:
        num_samples = dataset.num_tokens // stride
        others = (samples + 1 + _below(max(1, num_samples - 1), other)) % num_samples
        needed = np.concatenate([needed, others[wrong] * stride])
    tokens, document_starts, _ = _windows(dataset, needed, stride)
    start, size = _longest_documents(document_starts, tokens.shape)
    total = np.minimum(size[:count], lengths)
    cut = _cut(tokens[:count], start[:count], total, where_to_cut, vocabulary)
    a, b = (start[:count], cut), (start[:count] + cut, total - cut)
    if swap:
        a, b = _choose(wrong, b, a), _choose(wrong, a, b)
    else:
        b[0][wrong], b[1][wrong] = start[count:], np.minimum(size[count:], np.maximum(1, lengths - cut)[wrong])
    row, maskable = _lay_out(tokens, a, b, vocabulary, seq_len)
    row["next_sentence_label"] = np.where((a[1] > 0) & (b[1] > 0), wrong, IGNORE_INDEX)
    return row, maskable


def _choose(condition: np.ndarray, yes: Stretch, no: Stretch) -> Stretch:
    return np.where(condition, yes[0], no[0]), np.where(condition, yes[1], no[1])


def _windows(dataset: Dataset, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens (n, width) from each of `starts` (n,) on, the places where documents start, and where the windows start.

    A place is row x width + column; ascending. The width is `length`; a window that would pass the end of the dataset
    starts earlier instead. Where they start is (n,) int64, an index of the dataset.
    """
    width = min(length, dataset.num_tokens)
    starts = np.minimum(starts, dataset.num_tokens - width)
    rows, columns = dataset.document_starts_many(starts, width)
    return dataset.gather(starts, width), rows * width + columns, starts


def _longest_documents(document_starts: np.ndarray, shape: tuple[int, int]) -> Stretch:
    """The longest stretch of each row, the first of equally long ones, in which no document starts but at its start."""
    num_rows, width = shape
    total = num_rows * width
    row_starts = np.arange(0, total, width)
    edges = np.concatenate([row_starts, document_starts])
    edges.sort()  # a row that starts with a document: twice
    sizes = np.full_like(edges, total)
    sizes[:-1] = edges[1:]
    sizes -= edges
    ranks = sizes * total + (total - 1 - edges)
    size, rest = np.divmod(np.maximum.reduceat(ranks, np.searchsorted(edges, row_starts)), total)
    return total - 1 - rest, size


def _cut(
    tokens: np.ndarray, start: np.ndarray, size: np.ndarray, chances: np.ndarray, vocabulary: Vocabulary
) -> np.ndarray:
    """Tokens of the first part of each stretch, (n,): up to a sentence end in its middle half, all equally likely."""
    after = 1 + np.flatnonzero(vocabulary.ends_sentence.take(tokens))
    rows = (after - 1) // tokens.shape[1]
    sizes = after - start[rows]
    margin = np.maximum(1, size // 4)[rows]
    fits = (sizes >= margin) & (sizes <= size[rows] - margin)
    sizes, count = sizes[fits], np.bincount(rows[fits], minlength=len(tokens))
    chosen = np.cumsum(count) - count + (chances * count).astype(np.int64)
    return np.where(count > 0, np.append(sizes, 0)[np.minimum(chosen, len(sizes))], np.maximum(1, size // 2))


def _lay_out(
    tokens: np.ndarray, a: Stretch, b: Stretch | None, vocabulary: Vocabulary, seq_len: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """[CLS] a [SEP] (b [SEP]) and padding, and which places hold text; arrays of (n, seq_len), the latter bool."""
    places = np.arange(seq_len)
    rows = np.arange(len(a[0]))
    source = a[0][:, None] - 1  # + place: where a token of `a` comes from
    end_of_a = end = 1 + a[1]  # the place of its [SEP]
    in_b = places > end_of_a[:, None]
    if b is not None:
        end = end_of_a + 1 + b[1]
        source = np.where(in_b, (b[0] - 1 - end_of_a)[:, None], source)
    real = places <= end[:, None]
    maskable = real.copy()
    maskable[:, 0] = maskable[rows, end_of_a] = maskable[rows, end] = False
    ids = (tokens.ravel().take(source + places, mode="clip") * maskable).astype(np.int64)
    ids[:, 0] = vocabulary.cls_id
    ids[rows, end_of_a] = ids[rows, end] = vocabulary.sep_id
    row: dict[str, np.ndarray] = {
        "input_ids": ids,
        "token_type_ids": (in_b & real).astype(np.int64),
        "segment_ids": real.astype(np.int32),
        "position_ids": places[None].repeat(len(ids), axis=0),
    }
    return row, maskable


def _below(bound: int, chances: np.ndarray) -> np.ndarray:
    """Integers in [0, bound) from numbers in [0, 1); int64."""
    return (chances * bound).astype(np.int64)
