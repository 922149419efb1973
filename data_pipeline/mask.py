"""BERT's dynamic masking of a whole micro batch (Devlin et al. 2019, section 3.1; dynamic: Liu et al. 2019). Pure.

Of the words, a share becomes targets; of those, most are replaced by [MASK], some by a random token, the rest stays.
`unit` says what is chosen:

    token   each token by itself
    word    the pieces of a word together; each piece has a fate of its own, as in BERT's whole-word models
    span    stretches of 1 to span_max words, whose lengths are drawn from a geometric distribution, until the share is
            reached; a stretch has one fate (SpanBERT, Joshi et al. 2020, section 3.1)

Spans never overlap: their lengths are drawn first, and every way to lay them into the row is equally likely.
"""

from __future__ import annotations

import math

import numpy as np

from configs.schema import MaskingConfig
from data_pipeline import chance

IGNORE_INDEX = -100
# What a row's random numbers are for: counters start here, below 2^20 for each use.
CHOICE, LENGTH, FATE, TOKEN = (np.int64(number) << 20 for number in range(4))
LAST = np.uint64(2**64 - 1)


def mask_rows(
    ids: np.ndarray,
    maskable: np.ndarray,
    continues: np.ndarray,
    keys: np.ndarray,
    masking: MaskingConfig,
    mask_id: int,
    random_ids: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (masked ids, labels), both (n, seq) int64; the labels are -100 where there is no target.

    ids (n, seq) int64, seq below 2^20. maskable (n, seq) bool: text, no special tokens or padding. continues (n, seq)
    bool: the token goes on the word of the one before it; not read for unit=token. keys (n,) uint64: each row's
    chances depend on its key alone (`chance.row_keys`). random_ids: the ids that a random token is drawn from.

    In each row exactly round(probability x words) words are chosen, at least one where there is one.
    """
    labels = np.full(ids.shape, IGNORE_INDEX, dtype=np.int64)
    masked = ids.astype(np.int64)
    if not masking.probability:
        return masked, labels
    begins = maskable if masking.unit == "token" else maskable & ~_goes_on(maskable, continues)
    num_words = begins.sum(1)
    num_chosen = np.minimum(num_words, np.maximum(1, np.rint(masking.probability * num_words)).astype(np.int64))
    if masking.unit == "span":
        chosen, sharers = _choose_spans(begins, maskable, num_chosen, keys, masking)
    else:
        chosen = _choose_words(begins, maskable, num_chosen, keys)
        sharers = None
    places = np.flatnonzero(chosen)  # (targets,) of all rows
    rows, columns = np.divmod(places, ids.shape[1])
    fates = columns if sharers is None else sharers.ravel()[places]
    # both at once, though few tokens become random ones: the second call would cost more than the numbers
    fate, drawn = chance.uniform(keys[rows], np.stack([FATE + fates, TOKEN + columns]))
    labels.ravel()[places] = ids.ravel()[places]
    masked.ravel()[places[fate < masking.mask_share]] = mask_id
    at_random = np.flatnonzero((fate >= masking.mask_share) & (fate < masking.mask_share + masking.random_share))
    masked.ravel()[places[at_random]] = random_ids[(drawn[at_random] * len(random_ids)).astype(np.int64)]
    return masked, labels


def _goes_on(maskable: np.ndarray, continues: np.ndarray) -> np.ndarray:
    """Of each token: does it belong to the word of the token right before it? (n, seq) bool"""
    result = np.zeros_like(maskable)
    result[:, 1:] = continues[:, 1:] & maskable[:, :-1]
    return result


def _choose_words(begins: np.ndarray, maskable: np.ndarray, num_chosen: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Tokens of `num_chosen` words of each row; (n, seq) bool. Every set of words is equally likely."""
    first = _choose(begins, num_chosen, keys)
    if begins is maskable:
        return first
    places = np.arange(begins.size).reshape(begins.shape)
    word = np.maximum.accumulate(np.where(begins, places, places[:, :1]), axis=1)  # place of the word's first token
    return first.ravel()[word] & maskable


def _choose(candidates: np.ndarray, num_chosen: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """`num_chosen` (n,) of each row's candidates (n, width), as (n, width) bool: those with the smallest numbers."""
    places = np.arange(candidates.shape[1])
    numbers = chance.bits(keys[:, None], CHOICE + places)
    numbers &= ~np.uint64(2**20 - 1)
    numbers |= places.astype(np.uint64)  # no two are equal
    ordered = np.where(candidates, numbers, LAST)
    ordered.sort(axis=1)
    largest = ordered[np.arange(len(ordered)), np.maximum(num_chosen, 1) - 1]
    return candidates & (numbers <= largest[:, None])


def _choose_spans(
    begins: np.ndarray, maskable: np.ndarray, num_chosen: np.ndarray, keys: np.ndarray, masking: MaskingConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of spans that hold `num_chosen` words of each row, (n, seq) bool, and each token's first word of its span.

    The last span drawn is cut where the words are reached. With F words in no span, each of the F + spans things is a
    span with equal chances: a choice of places among them lays the spans into the row.
    """
    lengths = span_lengths(keys, int(num_chosen.max(initial=0)), masking.span_mean, masking.span_max)
    reached = np.cumsum(lengths, axis=1)
    before = reached - lengths
    is_drawn = before < num_chosen[:, None]
    lengths = np.minimum(lengths, num_chosen[:, None] - before)[is_drawn]  # (spans,) of all rows
    num_spans = is_drawn.sum(1)
    num_words = begins.sum(1)
    num_things = num_words - num_chosen + num_spans
    width = max(1, int(num_words.max(initial=0)))
    rows, things = np.nonzero(_choose(np.arange(width) < num_things[:, None], num_spans, keys))
    number = np.arange(len(rows)) - np.repeat(np.cumsum(num_spans) - num_spans, num_spans)  # of the span in its row
    starts = rows * width + things - number + before[is_drawn]  # (spans,) their first words
    words = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
    of_span = np.full(len(begins) * width, -1, dtype=np.int64)
    of_span[words] = np.repeat(starts % width, lengths)
    word = np.maximum(np.cumsum(begins, axis=1) - 1, 0) + np.arange(len(begins))[:, None] * width
    sharers = of_span[word]
    return (sharers >= 0) & maskable, sharers


def span_lengths(keys: np.ndarray, count: int, mean: float, longest: int) -> np.ndarray:
    """`count` lengths for each key, (n, count) int64: geometric with p = 1 / mean, given that it is at most `longest`.

    P(l) = p (1 - p)^(l - 1) / (1 - (1 - p)^longest); for mean 5 and longest 10 its own mean is 3.8.
    """
    if mean == 1.0:
        return np.ones((len(keys), count), dtype=np.int64)
    fails = 1 - 1 / mean
    drawn = chance.uniform(keys[:, None], LENGTH + np.arange(count))
    lengths = 1 + np.floor(np.log1p(-drawn * (1 - fails**longest)) / math.log(fails)).astype(np.int64)
    return np.minimum(lengths, longest)  # the logarithms' rounding may pass it by one
