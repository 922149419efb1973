"""Fill in the middle (Bavarian et al. 2022): a causal model learns to write what is between two texts. Pure.

A document of a row is cut at two places and put together in another order, with three sentinels that say so:

    PSM   <prefix> PREFIX <suffix> SUFFIX <middle> MIDDLE
    SPM   <prefix> <suffix> SUFFIX <middle> PREFIX MIDDLE      (the paper's second form, which shares weights with PSM)

This is the paper's context-level variant: what is rearranged is the part of a document that is in the row, after rows
are cut or packed, so no sentinel is ever apart from its text. Cuts fall between tokens, everywhere with equal chances.

Rows keep their length and every document its place: a rearranged document gives up the last three tokens of its
suffix for the sentinels, and the id that ends it stays its last. So nothing else about a row changes, neither where
documents start (`pack`, `expand`) nor which tokens have targets; sentinels are targets like any token, as in the paper.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from configs.schema import FimConfig
from data_pipeline import chance
from data_pipeline.pack import IGNORE_INDEX

NUM_SENTINELS = 3
SHORTEST = 3  # tokens that are left of a document beside the sentinels; one with fewer is not rearranged
NUM_CHANCES = 4  # of each document: whether, which form, two cuts


class FimIds(NamedTuple):
    """Ids of the sentinels, and the one that ends documents."""

    prefix: int
    middle: int
    suffix: int
    end: int


def fill_in_rows(arrays: dict[str, np.ndarray], keys: np.ndarray, fim: FimConfig, ids: FimIds) -> dict[str, np.ndarray]:
    """The same rows with documents rearranged: the same names, shapes and types.

    arrays: of `pack.gpt_rows`, padded or not; or "tokens" alone, (n, seq_len + 1), whose documents end with `ids.end`
    and nowhere else. keys: as of `fill_in_middle`.
    """
    if "tokens" in arrays:
        tokens = arrays["tokens"]
        is_start = np.ones(tokens.shape, bool)
        is_start[:, 1:] = tokens[:, :-1] == ids.end
        return {"tokens": fill_in_middle(tokens, *_stretches(is_start), keys, fim, ids)}
    labels, segments = arrays["labels"], arrays["segment_ids"]
    goes_on = labels[:, -1:] != IGNORE_INDEX  # the last document of the row, by one token, which is only a label
    tokens = np.hstack([arrays["input_ids"], labels[:, -1:]])
    segments = np.hstack([segments, np.where(goes_on, segments[:, -1:], 0)])
    is_start = np.ones(tokens.shape, bool)
    is_start[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts, lengths = _stretches(is_start)
    is_text = segments.ravel()[starts] > 0
    tokens = fill_in_middle(tokens, starts[is_text], lengths[is_text], keys, fim, ids)
    return arrays | {
        "input_ids": tokens[:, :-1].copy(),
        "labels": np.where(labels == IGNORE_INDEX, IGNORE_INDEX, tokens[:, 1:]),
    }


def fill_in_middle(
    tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray, keys: np.ndarray, fim: FimConfig, ids: FimIds
) -> np.ndarray:
    """A copy of the rows in which a share `fim.probability` of the documents is rearranged, `fim.spm_share` as SPM.

    tokens (n, width), of any integer type that has room for the ids. starts, lengths (documents,) int64, ascending: of
    documents, each within a row, in all rows one after the other; what is in none, padding, stays. keys (n,) uint64: a
    row's chances depend on its key and on the number of the document in it, on nothing else.
    """
    rows = starts // tokens.shape[1]
    number = np.arange(len(rows)) - rows.searchsorted(rows)  # of the document in its row
    is_chosen, is_spm, *cuts = chance.uniform(keys[rows], NUM_CHANCES * number + np.arange(NUM_CHANCES)[:, None])
    given = tokens.ravel()
    is_ended = given[starts + lengths - 1] == ids.end
    kept = lengths - is_ended - NUM_SENTINELS
    chosen = np.flatnonzero((is_chosen < fim.probability) & (kept >= SHORTEST))
    starts, kept, spm = starts[chosen], kept[chosen], is_spm[chosen] < fim.spm_share
    first, second = np.sort([(cut[chosen] * (kept + 1)).astype(np.int64) for cut in cuts], axis=0)
    prefix, middle, suffix = first, second - first, kept - second  # lengths of the parts, (chosen,)

    prefix_at = starts + np.where(spm, suffix + 3, 1)
    suffix_at = starts + np.where(spm, 2, prefix + 2)
    middle_at = starts + prefix + suffix + 3
    sizes = np.concatenate([prefix, middle, suffix])
    steps = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # places within the parts
    sources = np.concatenate([starts, starts + first, starts + second])
    result = given.copy()
    result[np.concatenate([prefix_at, middle_at, suffix_at]).repeat(sizes) + steps] = given[
        sources.repeat(sizes) + steps
    ]
    result[starts] = ids.prefix
    result[suffix_at - 1] = ids.suffix
    result[suffix_at + suffix] = ids.middle
    return result.reshape(tokens.shape)


def _stretches(is_start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of stretches in all rows, one after the other. is_start: (n, width) bool, all of column 0."""
    starts = np.flatnonzero(is_start)
    return starts, np.diff(starts, append=is_start.size)
