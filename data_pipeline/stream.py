"""A dataset directory -> the batches of any step, on any rank.

There is no iterator and no state: the samples of step n are a function of (seed, dataset fingerprint, n), so the global
batch is the same on any number of ranks, and a resume is a call with a larger n.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from configs.deepspeed_json import accumulation_steps
from configs.load import ConfigError
from configs.schema import PretrainConfig
from data_pipeline import bert_rows, chance, mask, order, pack
from data_pipeline.shards import DataError, Dataset, open_dataset
from data_pipeline.tokenizer import fingerprint, is_bert, load_tokenizer

Batch = dict[str, torch.Tensor]


def open_stream(config: PretrainConfig, split: Literal["train", "validation"]) -> Stream:
    """Open `data.dir`/split for the model and the batch sizes of `config`.

    Raises DataError for a damaged dataset or a tokenizer that is not the one it was built with, ConfigError for too few
    samples.
    """
    directory = Path(config.data.dir) / split
    dataset = open_dataset(directory)
    stream = Stream(config, dataset)
    if split == "train" and stream.num_samples < config.train.global_batch_size:
        raise ConfigError(
            f"{directory}: holds {stream.num_samples} samples of {config.train.seq_len} tokens, fewer than one global "
            f"batch of {config.train.global_batch_size}; add text, or lower train.global_batch_size or train.seq_len"
        )
    if stream.num_samples < 1:
        raise ConfigError(
            f"{directory}: holds {dataset.num_tokens} tokens, fewer than one sample of {config.train.seq_len}; raise "
            f"data.build.validation_fraction or lower train.seq_len"
        )
    return stream


class Stream:
    """Batches out of one dataset, as dicts of tensors: rows of `pack.pack_gpt` or `bert_rows.make_rows`."""

    def __init__(self, config: PretrainConfig, dataset: Dataset) -> None:
        self.config, self.dataset = config, dataset
        self.tokenizer_dir = dataset.path
        self.vocab_size = dataset.vocab_size
        self.seq_len = config.train.seq_len
        self.tokenizer = load_tokenizer(dataset.path)
        if fingerprint(self.tokenizer) != dataset.tokenizer_fingerprint:
            raise DataError(
                f"{dataset.path}/tokenizer.json: is not the tokenizer the dataset was built with (fingerprint "
                f"{fingerprint(self.tokenizer)}, expected {dataset.tokenizer_fingerprint}); restore it or build again"
            )
        self.is_bert = config.model.architecture == "bert"
        if self.is_bert and not is_bert(self.tokenizer):
            raise ConfigError(
                f"model.architecture=bert needs a tokenizer with [PAD] [UNK] [CLS] [SEP] [MASK], which {dataset.path} "
                f"does not have; build the dataset with data.build.tokenizer.type=wordpiece"
            )
        if self.is_bert:
            self.vocabulary = bert_rows.read_vocabulary(self.tokenizer)
            self.stride = bert_rows.row_stride(config.data.masking, self.seq_len)
            self.num_samples = dataset.num_tokens // self.stride
        else:
            self.stride, self.num_samples = self.seq_len, (dataset.num_tokens - 1) // self.seq_len
        self._ahead = ThreadPoolExecutor(1)
        self._next: tuple[int, Future[list[Batch]]] | None = None

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[Batch]:
        """The micro batches of `rank` for the step from `step` to `step + 1`.

        Together the ranks' micro batches hold the step's global batch. Raises ConfigError where it does not divide.
        """
        train = self.config.train
        accumulation_steps(train.global_batch_size, train.micro_batch_size, world_size)
        ready, self._next = self._next, None
        batches = ready[1].result() if ready and ready[0] == step else self._make(step, rank, world_size)
        self._next = (step + 1, self._ahead.submit(self._make, step + 1, rank, world_size))
        return batches

    def eval_batches(self, num_samples: int, rank: int, world_size: int) -> Iterator[Batch]:
        """`rank`'s part of `num_samples` samples, the same ones at every call.

        Every rank gets equally many batches; what is missing at the end is filled with rows without targets.
        """
        count, size = min(num_samples, self.num_samples), self.config.train.micro_batch_size
        chosen = order.sample_ids(0, self.dataset.fingerprint, 0, count, self.num_samples)
        for start in range(0, count, size * world_size):
            mine = chosen[start : start + size * world_size][rank::world_size]
            samples = np.concatenate([mine, np.repeat(chosen[:1], size - len(mine))])
            rows = self._rows(samples, "eval", samples)
            for name in ("labels", "next_sentence_label"):
                if name in rows:
                    rows[name][len(mine) :] = mask.IGNORE_INDEX
            yield self._batch(rows)

    def _make(self, step: int, rank: int, world_size: int) -> list[Batch]:
        train = self.config.train
        share, size = train.global_batch_size // world_size, train.micro_batch_size
        first = step * train.global_batch_size + rank * share
        samples = order.sample_ids(train.seed, self.dataset.fingerprint, first, share, self.num_samples)
        rows = self._rows(samples, "train", np.arange(first, first + share))
        return [self._batch({name: rows[name][i : i + size] for name in rows}) for i in range(0, share, size)]

    def _rows(self, samples: np.ndarray, use: str, draws: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of the samples, stacked; `draws` (n,) are the row's places in the endless order of `use`.

        A row's chances follow from its draw, so that they differ in every epoch.
        """
        if not self.is_bert:
            rows = [self.gpt_sample(sample) for sample in samples.tolist()]
            return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        keys = chance.row_keys(order.key(self.config.train.seed, self.dataset.fingerprint, use), draws)
        masking = self.config.data.masking
        return bert_rows.make_rows(self.dataset, samples, keys, self.vocabulary, masking, self.seq_len)

    def _batch(self, rows: dict[str, np.ndarray]) -> Batch:
        if self.is_bert and self.config.data.unpad:
            rows = bert_rows.unpad(rows)
        return {name: torch.from_numpy(array) for name, array in rows.items()}

    def gpt_sample(self, sample: int) -> dict[str, np.ndarray]:
        """See `pack.pack_gpt`; each array is (seq_len,)."""
        start = sample * self.stride
        stop = start + self.seq_len + 1
        return pack.pack_gpt(self.dataset.tokens(start, stop), self.dataset.document_starts(start, stop) - start)
