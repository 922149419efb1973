"""From windows of the flat token row to a micro batch for GPT, all rows at once. Pure: arrays in, arrays out.

A row knows its documents: attention stays within `segment_ids`, positions restart with each document, and no token has
the first one of the next document as its target.
"""

from __future__ import annotations

import numpy as np

IGNORE_INDEX = -100


def gpt_rows(tokens: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> dict[str, np.ndarray]:
    """Rows for a causal model from seq_len + 1 tokens each.

    tokens (n, seq_len + 1), of any integer type; a document starts in row rows[i] at column columns[i], both (starts,)
    int64, ascending by row and column. All results are (n, seq_len) and int64: input_ids; labels, the next token, -100
    where that belongs to another document; segment_ids, int32, the documents of each row numbered from 1; position_ids,
    from 0 at the start of the row and of each document.
    """
    num_rows, seq_len = tokens.shape[0], tokens.shape[1] - 1
    labels = tokens[:, 1:].astype(np.int64)
    places = (rows * seq_len + columns)[columns > 0]  # in all rows, one after the other
    labels.ravel()[places - 1] = IGNORE_INDEX
    # Runs of equal segment: they start with a row or a document. One that starts after the last column has length 0.
    row_starts = np.arange(0, num_rows * seq_len + 1, seq_len)
    edges = np.concatenate([places, row_starts])
    edges.sort()
    lengths = edges[1:] - edges[:-1]
    first_runs = edges.searchsorted(row_starts, side="right") - 1  # of each row, and one that ends the last row
    numbers = np.arange(1, len(edges)) - first_runs[:-1].repeat(first_runs[1:] - first_runs[:-1])
    positions = np.arange(num_rows * seq_len)
    positions -= edges[:-1].repeat(lengths)
    return {
        "input_ids": tokens[:, :-1].astype(np.int64),
        "labels": labels,
        "segment_ids": numbers.astype(np.int32).repeat(lengths).reshape(num_rows, seq_len),
        "position_ids": positions.reshape(num_rows, seq_len),
    }


def pad_rows(batch: dict[str, np.ndarray], filled: np.ndarray) -> None:
    """Turn what is behind the first filled[i] columns of row i into padding, in place; filled (n,), integers.

    batch: as of `gpt_rows`, with a document start where the padding starts. Padding has segment and position 0, and
    no targets; its input ids stay.
    """
    padding = np.arange(batch["labels"].shape[1]) >= filled[:, None]
    batch["labels"][padding] = IGNORE_INDEX
    batch["segment_ids"][padding] = 0
    batch["position_ids"][padding] = 0


def cu_seqlens(segment_ids: np.ndarray) -> np.ndarray:
    """Where the documents of a micro batch begin when its rows are laid end to end, and the end of it.

    segment_ids (n, seq_len), as of `gpt_rows`; the result (documents + 1,) int32 is what kernels for attention over
    sequences of various lengths take. The padding of a row counts as a document.
    """
    starts = np.ones(segment_ids.shape, dtype=bool)
    np.not_equal(segment_ids[:, 1:], segment_ids[:, :-1], out=starts[:, 1:])
    return np.append(np.flatnonzero(starts), segment_ids.size).astype(np.int32)
