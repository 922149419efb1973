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
from data_pipeline import mask, order, pack
from data_pipeline.shards import DataError, Dataset, open_dataset
from data_pipeline.tokenizer import (
    continues_word,
    ends_sentence,
    fingerprint,
    is_bert,
    load_tokenizer,
    ordinary_ids,
)

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
    """Batches out of one dataset, as dicts of tensors (see `gpt_sample` and `bert_sample` for their rows)."""

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
        if self.is_bert and (config.data.masking.unit == "span" or config.data.masking.pairs == "sop"):
            raise ConfigError("data.masking: unit=span and pairs=sop are not there yet")
        num_special = 3 if config.data.masking.pairs != "none" else 2
        self.stride = self.seq_len - num_special if self.is_bert else self.seq_len
        self.num_samples = (
            dataset.num_tokens // self.stride if self.is_bert else (dataset.num_tokens - 1) // self.stride
        )
        if self.is_bert:
            ids = self.tokenizer.get_vocab()
            self.cls_id, self.sep_id, self.mask_id = ids["[CLS]"], ids["[SEP]"], ids["[MASK]"]
            self.ends_sentence = ends_sentence(self.tokenizer)
            self.continues = continues_word(self.tokenizer) if config.data.masking.unit != "token" else None
            self.ordinary_ids = ordinary_ids(self.tokenizer)
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
            rows = [self._row(int(sample), ("eval", int(sample))) for sample in mine]
            filler = self._row(int(chosen[0]), ("eval", 0))
            for name in ("labels", "next_sentence_label"):
                if name in filler:
                    filler[name] = np.full_like(filler[name], mask.IGNORE_INDEX)
            yield _stack(rows + [filler] * (size - len(rows)))

    def _make(self, step: int, rank: int, world_size: int) -> list[Batch]:
        train = self.config.train
        share = train.global_batch_size // world_size
        first = step * train.global_batch_size + rank * share
        samples = order.sample_ids(train.seed, self.dataset.fingerprint, first, share, self.num_samples)
        rows = [self._row(int(sample), (first + i,)) for i, sample in enumerate(samples)]
        return [_stack(rows[i : i + train.micro_batch_size]) for i in range(0, share, train.micro_batch_size)]

    def _row(self, sample: int, draw: tuple[object, ...]) -> dict[str, np.ndarray]:
        """One sample; `draw` names its place in the endless order, so that its random choices differ every epoch."""
        if not self.is_bert:
            return self.gpt_sample(sample)
        key = order.key(self.config.train.seed, self.dataset.fingerprint, *draw)
        return self.bert_sample(sample, np.random.Generator(np.random.Philox(key)))

    def gpt_sample(self, sample: int) -> dict[str, np.ndarray]:
        """See `pack.pack_gpt`; each array is (seq_len,)."""
        start = sample * self.stride
        stop = start + self.seq_len + 1
        return pack.pack_gpt(self.dataset.tokens(start, stop), self.dataset.document_starts(start, stop) - start)

    def bert_sample(self, sample: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """See `pack.pad_bert` and `mask.mask_tokens`; each array is (seq_len,), next_sentence_label is ()."""
        masking = self.config.data.masking
        row: dict[str, np.ndarray]
        if masking.pairs == "nsp":
            other = int(sample + 1 + rng.integers(max(1, self.num_samples - 1))) % self.num_samples
            a, b, is_random = pack.next_sentence_pair(
                *self._window(sample, 1), *self._window(other, 1), self.ends_sentence, self.stride, rng
            )
            row = pack.pad_bert([a, b], self.cls_id, self.sep_id, self.seq_len)
            row["next_sentence_label"] = np.array(is_random, dtype=np.int64)
        else:
            tokens, starts = self._window(sample, 2)
            tokens = tokens[pack.whole_sentences(tokens, starts, self.ends_sentence, self.stride)]
            row = pack.pad_bert([tokens], self.cls_id, self.sep_id, self.seq_len)
        ids, special = row["input_ids"], row.pop("special")
        row["input_ids"], row["labels"] = mask.mask_tokens(
            ids,
            ~special,
            None if self.continues is None else self.continues[ids],
            probability=masking.probability,
            mask_share=masking.mask_share,
            random_share=masking.random_share,
            mask_id=self.mask_id,
            random_ids=self.ordinary_ids,
            rng=rng,
        )
        return row

    def _window(self, sample: int, strides: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of `strides` strides from the sample's first token on, and where documents start among them."""
        start = sample * self.stride
        stop = min(start + strides * self.stride, self.dataset.num_tokens)
        return self.dataset.tokens(start, stop), self.dataset.document_starts(start, stop) - start


def _stack(rows: list[dict[str, np.ndarray]]) -> Batch:
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
