"""One dataset as numbered rows of one length, ready for the model: the three ways to divide it.

    GPT, concatenate    row k is the tokens [k x seq_len, (k + 1) x seq_len), wherever documents end
    GPT, best_fit       row k is packed from whole documents (`packing`)
    BERT                row k is made from the text that starts at token k x stride (`bert_rows`)

Rows are made for many numbers at once. A row depends on its number and its place in the order, on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from configs.schema import PretrainConfig
from data_pipeline import bert_rows, chance, fim, order, pack, packing
from data_pipeline.shards import Dataset

Arrays = dict[str, np.ndarray]
Places = np.ndarray | range


@dataclass(frozen=True)
class Rows:
    """What `open_rows` returns. Numbers of rows are (n,) int64, in [0, num_rows)."""

    num_rows: int
    block_starts: np.ndarray  # (blocks + 1,) int64: the first row of each shard or run of shards, and num_rows
    first_tokens: Callable[[np.ndarray], np.ndarray]  # where in the dataset each row begins, (n,) int64
    # (numbers, use, n places) -> the rows' arrays, (n, seq_len) but for next_sentence_label, (n,), and tokens,
    # (n, seq_len + 1). Chances (BERT's, FIM's) follow from the use, "train" or "eval", and the place, which is another
    # one in every epoch.
    make: Callable[[np.ndarray, str, Places], Arrays]


def open_rows(
    config: PretrainConfig,
    dataset: Dataset,
    seq_len: int,
    vocabulary: bert_rows.Vocabulary | None,
    tokens_alone: bool = False,
    fim_ids: fim.FimIds | None = None,
) -> Rows:
    """The rows of a dataset for the model of `config`; `vocabulary` is BERT's, `fim_ids` those of GPT with data.fim.

    With `tokens_alone` concatenated rows are made as "tokens" in the dataset's dtype, from which `expand` makes the
    rest. With best-fit packing the first call makes the plan, which takes a while. Raises DataError where it cannot be
    kept.
    """
    if vocabulary is not None:
        return _bert(config, dataset, seq_len, vocabulary)
    if config.data.packing == "best_fit":
        folder = Path(config.data.cache.dir).expanduser() / "packing"
        rows = _best_fit(dataset, packing.open_plan(dataset, seq_len, folder))
    else:
        rows = _concatenated(dataset, seq_len, config.data.shuffle_window_tokens is not None, tokens_alone)
    return rows if fim_ids is None else _filled_in(config, dataset, rows, fim_ids)


def _concatenated(dataset: Dataset, seq_len: int, apart: bool, tokens_alone: bool) -> Rows:
    """With `apart` no row reaches over the end of a shard: what is left there, less than a row, is not used."""
    shard_starts = np.array(dataset.shard_starts if apart else [0, dataset.num_tokens])
    counts = np.maximum(0, np.diff(shard_starts) - 1) // seq_len  # one token more than a row, for the last label
    block_starts = np.concatenate([[0], np.cumsum(counts)])

    def first_tokens(numbers: np.ndarray) -> np.ndarray:
        if not apart:
            return numbers * seq_len
        shard = np.searchsorted(block_starts, numbers, side="right") - 1
        return shard_starts[shard] + (numbers - block_starts[shard]) * seq_len

    def make(numbers: np.ndarray, use: str, places: Places) -> Arrays:
        starts = first_tokens(numbers)
        tokens = dataset.gather(starts, seq_len + 1)
        if tokens_alone:
            return {"tokens": tokens}
        return pack.gpt_rows(tokens, *dataset.document_starts_many(starts, seq_len + 1))

    return Rows(int(block_starts[-1]), block_starts, first_tokens, make)


def _best_fit(dataset: Dataset, plan: packing.Plan) -> Rows:
    def first_tokens(numbers: np.ndarray) -> np.ndarray:
        return plan.starts[plan.first_pieces[numbers]]

    def make(numbers: np.ndarray, use: str, places: Places) -> Arrays:
        return best_fit_rows(dataset, plan, numbers)

    return Rows(plan.num_rows, plan.block_starts, first_tokens, make)


def best_fit_rows(dataset: Dataset, plan: packing.Plan, numbers: np.ndarray) -> Arrays:
    """As `pack.gpt_rows`, the rows `numbers` of the plan; what is padding has input id 0 (see `pack.pad_rows`)."""
    first, counts = plan.first_pieces[numbers], plan.first_pieces[numbers + 1] - plan.first_pieces[numbers]
    rows = np.arange(len(numbers)).repeat(counts)  # of each piece
    first_of_row = np.cumsum(counts) - counts
    pieces = np.arange(len(rows)) + (first - first_of_row)[rows]
    starts, lengths = plan.starts[pieces], plan.lengths[pieces].astype(np.int64)
    sizes = np.minimum(lengths, plan.seq_len)
    ends = np.cumsum(sizes)
    columns = ends - sizes - (ends - sizes)[first_of_row][rows]
    tokens = np.zeros((len(numbers), plan.seq_len + 1), dataset.dtype)
    for row, column, start, length in zip(*(a.tolist() for a in (rows, columns, starts, lengths)), strict=True):
        tokens[row, column : column + length] = dataset.tokens(start, start + length)
    filled = ends[first_of_row + counts - 1] - (ends - sizes)[first_of_row]
    # Padding starts like a document, also behind the last column, so that no token has it as its target; a row whose
    # one document goes on has none.
    padded = np.flatnonzero(lengths[first_of_row] <= plan.seq_len)
    places = np.concatenate([rows * (plan.seq_len + 1) + columns, padded * (plan.seq_len + 1) + filled[padded]])
    batch = pack.gpt_rows(tokens, *np.divmod(np.sort(places), plan.seq_len + 1))
    pack.pad_rows(batch, filled)
    return batch


def _filled_in(config: PretrainConfig, dataset: Dataset, rows: Rows, fim_ids: fim.FimIds) -> Rows:
    """The same rows with documents rearranged, in training; what is evaluated is text as it is."""
    base = order.key(config.train.seed, dataset.fingerprint, "fim")

    def make(numbers: np.ndarray, use: str, places: Places) -> Arrays:
        arrays = rows.make(numbers, use, places)
        if use != "train":
            return arrays
        return fim.fill_in_rows(arrays, chance.row_keys(base, np.asarray(places)), config.data.fim, fim_ids)

    return replace(rows, make=make)


def _bert(config: PretrainConfig, dataset: Dataset, seq_len: int, vocabulary: bert_rows.Vocabulary) -> Rows:
    stride = bert_rows.row_stride(config.data.masking, seq_len)
    num_rows = dataset.num_tokens // stride
    block_starts = np.minimum(-(-np.array(dataset.shard_starts) // stride), num_rows)

    def make(numbers: np.ndarray, use: str, places: Places) -> Arrays:
        keys = chance.row_keys(order.key(config.train.seed, dataset.fingerprint, use), np.asarray(places))
        return bert_rows.make_rows(dataset, numbers, keys, vocabulary, config.data.masking, seq_len)

    return Rows(num_rows, block_starts, lambda numbers: numbers * stride, make)
