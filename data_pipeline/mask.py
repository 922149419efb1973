"""BERT's dynamic masking (Devlin et al. 2019, section 3.1; dynamic: Liu et al. 2019). Pure.

Of the tokens, a share becomes targets; of those, most are replaced by [MASK], some by a random token, the rest stays.
With whole words, the pieces of a word share one fate.
"""

from __future__ import annotations

import numpy as np

IGNORE_INDEX = -100


def mask_tokens(
    ids: np.ndarray,
    maskable: np.ndarray,
    continues: np.ndarray | None,
    *,
    probability: float,
    mask_share: float,
    random_share: float,
    mask_id: int,
    random_ids: np.ndarray,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (masked ids, labels) of one row: ids (seq,) int64, labels (seq,) int64 with -100 where not a target.

    maskable (seq,) bool: real words, no special tokens or padding. continues (seq,) bool: the token goes on a word
    (whole words) or None (each token alone). random_ids: the ordinary ids that a replacement is drawn from. The
    number of targets is round(probability x maskable words), at least one where there is a maskable token.
    """
    labels = np.full(ids.shape, IGNORE_INDEX, dtype=np.int64)
    places = np.flatnonzero(maskable)
    if not len(places) or not probability:
        return ids.copy(), labels
    words = np.arange(len(places)) if continues is None else np.cumsum(~_goes_on(places, continues)) - 1
    num_words = int(words[-1]) + 1
    num_chosen = max(1, round(probability * num_words))
    chosen = np.zeros(num_words, dtype=bool)
    chosen[rng.permutation(num_words)[:num_chosen]] = True
    targets = places[chosen[words]]
    labels[targets] = ids[targets]
    masked = ids.copy()
    fate = rng.random(len(targets))
    masked[targets[fate < mask_share]] = mask_id
    at_random = targets[(fate >= mask_share) & (fate < mask_share + random_share)]
    masked[at_random] = rng.choice(random_ids, len(at_random))
    return masked, labels


def _goes_on(places: np.ndarray, continues: np.ndarray) -> np.ndarray:
    """Of each maskable token: does it belong to the word of the maskable token right before it?"""
    adjacent = np.concatenate([[False], np.diff(places) == 1])
    return continues[places] & adjacent
