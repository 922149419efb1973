"""From a window of the flat token row to one training sample. Pure: arrays in, arrays out.

Sample k covers the tokens [k x stride, (k + 1) x stride): no index is needed, whatever the number of documents.
"""

from __future__ import annotations

import numpy as np

IGNORE_INDEX = -100


def pack_gpt(tokens: np.ndarray, starts: np.ndarray) -> dict[str, np.ndarray]:
    """A row for a causal model from seq_len + 1 tokens.

    tokens (seq_len + 1,); starts: indices in [0, seq_len] at which a document starts. All results are (seq_len,):
    input_ids int64; labels int64, the next token, -100 where that belongs to another document; segment_ids int32, the
    documents numbered from 1; position_ids int64, from 0 at the start of the row and of each document.
    """
    ids = tokens.astype(np.int64)
    seq_len = len(ids) - 1
    is_start = np.zeros(seq_len + 1, dtype=bool)
    is_start[starts] = True
    labels = ids[1:].copy()
    labels[is_start[1:]] = IGNORE_INDEX
    is_start[0] = True
    places = np.arange(seq_len)
    last_start = np.maximum.accumulate(np.where(is_start[:seq_len], places, 0))
    return {
        "input_ids": ids[:-1],
        "labels": labels,
        "segment_ids": np.cumsum(is_start[:seq_len], dtype=np.int32),
        "position_ids": places - last_start,
    }


def whole_sentences(tokens: np.ndarray, starts: np.ndarray, ends_sentence: np.ndarray, length: int) -> slice:
    """The part of a window that starts and ends at sentence ends: at most `length` tokens.

    tokens (window,); starts: where documents start in it; ends_sentence: bool table over the vocabulary. A sentence
    that is longer than the window is cut.
    """
    after = _boundaries(tokens, starts, ends_sentence)
    first = int(after[0]) if len(after) and after[0] < length // 2 else 0
    inside = after[(after > first) & (after <= first + length)]
    return slice(first, int(inside[-1]) if len(inside) else min(first + length, len(tokens)))


def next_sentence_pair(
    tokens: np.ndarray,
    starts: np.ndarray,
    other: np.ndarray,
    other_starts: np.ndarray,
    ends_sentence: np.ndarray,
    length: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Segments A and B of at most `length` tokens together, and whether B is from elsewhere (probability 1/2).

    A and the true B are neighbours within the longest stretch of one document in the window; a random B is from the
    longest such stretch of the `other` window. They meet at a sentence end, or in the middle where there is none.
    Devlin et al. walk through whole documents sentence by sentence instead; here each sample is found in O(1).
    """
    span = tokens[longest_document(len(tokens), starts)][:length]
    ends = 1 + np.flatnonzero(ends_sentence[span[:-1]])
    ends = ends[(ends >= len(span) // 4) & (ends <= len(span) - len(span) // 4)]
    cut = int(rng.choice(ends)) if len(ends) else max(1, len(span) // 2)
    is_random = bool(rng.random() < 0.5) or len(span) < 2  # one token has no true second half
    if is_random:
        elsewhere = other[longest_document(len(other), other_starts)]
        return span[:cut], elsewhere[: max(1, length - cut)], True
    return span[:cut], span[cut:], False


def longest_document(window: int, starts: np.ndarray) -> slice:
    """The longest stretch of a window of `window` tokens that lies in one document."""
    edges = np.unique(np.concatenate([[0], starts, [window]]))
    longest = int(np.argmax(np.diff(edges)))
    return slice(int(edges[longest]), int(edges[longest + 1]))


def pad_bert(segments: list[np.ndarray], cls_id: int, sep_id: int, seq_len: int) -> dict[str, np.ndarray]:
    """[CLS] A [SEP] (B [SEP]), padded to seq_len with id 0; every result is (seq_len,).

    segments: one or two arrays whose lengths and special tokens sum to at most seq_len. Returns input_ids int64,
    token_type_ids int64 (1 in B), segment_ids int32 (1, and 0 on padding), position_ids int64, and `special`, bool:
    [CLS], [SEP] and padding.
    """
    row = {"input_ids": np.zeros(seq_len, np.int64), "token_type_ids": np.zeros(seq_len, np.int64)}
    special = np.ones(seq_len, dtype=bool)
    row["input_ids"][0] = cls_id
    place = 1
    for number, segment in enumerate(segments):
        end = place + len(segment)
        row["input_ids"][place:end] = segment
        row["input_ids"][end] = sep_id
        row["token_type_ids"][place : end + 1] = number
        special[place:end] = False
        place = end + 1
    segment_ids = np.zeros(seq_len, np.int32)
    segment_ids[:place] = 1
    return {**row, "segment_ids": segment_ids, "position_ids": np.arange(seq_len), "special": special}


def _boundaries(tokens: np.ndarray, starts: np.ndarray, ends_sentence: np.ndarray) -> np.ndarray:
    """Indices right after a sentence end, or at a document start; ascending."""
    return np.unique(np.concatenate([1 + np.flatnonzero(ends_sentence[tokens]), starts]))
