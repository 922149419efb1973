"""The batches of any step, on any rank, as tensors, made ahead of time.

What a step's batches are is said in `samples`; here they are only made early, by a thread or by processes, and turned
into tensors. Early or not, and by whom, changes nothing about them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from configs.batch_sizes import batch_size
from configs.deepspeed_json import accumulation_steps
from configs.schema import PretrainConfig
from data_pipeline.expand import expand_tokens
from data_pipeline.rows import Arrays
from data_pipeline.samples import Samples, Split, open_samples
from data_pipeline.workers import Ahead, Request, Worker

Batch = dict[str, torch.Tensor]


def open_stream(config: PretrainConfig, split: Split) -> Stream:
    """Open the datasets of `config`; see `samples.open_samples` for its errors. Close it at the end."""
    return Stream(config, open_samples(config, split), split)


class Stream:
    """Batches as dicts of tensors, see `Samples.micro_batches`; `expand` makes of each what a model takes."""

    def __init__(self, config: PretrainConfig, samples: Samples, split: Split) -> None:
        self.config, self.samples = config, samples
        self.tokenizer_dir, self.vocab_size = samples.tokenizer_dir, samples.vocab_size
        num_workers = config.data.num_workers if split == "train" else 0
        self._ahead = Ahead(self._make, [Worker(config, split) for _ in range(num_workers)])

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[Batch]:
        """The micro batches of `rank` for the step from `step` to `step + 1`.

        Together the ranks' micro batches hold the step's global batch. Raises ConfigError where it does not divide.
        """
        train = self.config.train
        accumulation_steps(batch_size(train, step), train.micro_batch_size, world_size)
        return [_tensors(arrays) for arrays in self._ahead.get((step, rank, world_size))]

    def eval_batches(self, step: int, num_samples: int, rank: int, world_size: int) -> Iterator[Batch]:
        """See `Samples.eval_batches`."""
        for arrays in self.samples.eval_batches(step, num_samples, rank, world_size):
            yield _tensors(arrays)

    def expand(self, batch: Batch) -> Batch:
        """The arrays of `pack.gpt_rows` or `bert_rows.make_rows` of a batch, made on the device that it is on.

        Of a batch that has them already, the batch itself.
        """
        end_id = self.samples.document_end_id
        return batch if end_id is None else expand_tokens(batch["tokens"], end_id)

    def facts(self, step: int) -> dict[str, Any]:
        """See `Samples.facts`."""
        return self.samples.facts(step)

    def close(self) -> None:
        """End the thread or the processes that make batches ahead."""
        self._ahead.close()

    def _make(self, request: Request) -> list[Arrays]:
        return list(self.samples.micro_batches(*request))


def _tensors(arrays: Arrays) -> Batch:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
