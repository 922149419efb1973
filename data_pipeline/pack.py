"""From a window of the flat token row to one training sample for GPT. Pure: arrays in, arrays out.

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
