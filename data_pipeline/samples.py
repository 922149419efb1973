"""The samples of every step, as arrays: which ones, in which order, and their rows.

There is no iterator and no state: the samples of step n are a function of (seed, datasets, settings, n), so the global
batch is the same on any number of ranks and workers, and a resume is a call with a larger n. From the step to a row:

    place       the samples of the steps before + i (`configs/batch_sizes.py`), the same for all ranks; rank r makes
                its share of a step's places
    source      of a mixture, and the place in that source's own order (`mixture`)
    sample      of that source: a row's number, by a permutation of its own in every epoch (`order`)
    row         the arrays (`rows`)

A phase with another seq_len divides the same dataset into other rows; it has an order of its own from its first step.
No torch here: processes that make batches ahead (`workers`) start in a fraction of a second.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from configs.batch_sizes import batch_size, samples_before
from configs.load import ConfigError
from configs.schema import PretrainConfig, TrainConfig
from data_pipeline import bert_rows, mixture, order
from data_pipeline.fim import FimIds
from data_pipeline.mask import IGNORE_INDEX
from data_pipeline.rows import Arrays, Places, Rows, open_rows
from data_pipeline.shards import Dataset, open_dataset
from data_pipeline.tokenizer import end_of_text_id, fim_ids, is_bert, load_tokenizer

Split = Literal["train", "validation"]
BLOCK = 4096  # places whose samples are looked up at once: 30 nanoseconds each instead of 100 microseconds a call
TOKENS_AT_ONCE = 1 << 15  # in rows made together: small micro batches cost little more than large ones
STEPS_AHEAD = 64  # whose shards are asked for in advance, of a dataset at an address


@dataclass(frozen=True)
class Phase:
    """A stretch of steps with one seq_len."""

    number: int
    first_step: int
    seq_len: int
    rows: list[Rows]  # per source
    before: np.ndarray  # (sources,) int64: places each source had in the phases before


def open_samples(config: PretrainConfig, split: Split) -> Samples:
    """Open data.dir, or all datasets of data.mixture, for the model and the batch sizes of `config`.

    Raises DataError for a damaged dataset, ConfigError for one that does not fit: another tokenizer than the others,
    too few samples.
    """
    folders = {name: source.dir for name, source in sorted(config.data.mixture.items())} or {"": config.data.dir}
    datasets = {
        name: open_dataset(f"{folder.rstrip('/')}/{split}", config.data.cache) for name, folder in folders.items()
    }
    samples = Samples(config, datasets, {name for name, folder in folders.items() if "://" in folder})
    for phase in samples.phases:
        for name, rows in zip(datasets, phase.rows, strict=True):
            place = f"{folders[name]}/{split}"
            if rows.num_rows < 1:
                raise ConfigError(
                    f"{place}: holds {datasets[name].num_tokens} tokens, fewer than one sample of {phase.seq_len}; "
                    + ("add text" if split == "train" else "raise data.build.validation_fraction")
                    + " or lower train.seq_len"
                )
            if split == "train" and len(datasets) == 1 and rows.num_rows < config.train.global_batch_size:
                raise ConfigError(
                    f"{place}: holds {rows.num_rows} samples of {phase.seq_len} tokens, fewer than one global batch of "
                    f"{config.train.global_batch_size}; add text, or lower train.global_batch_size or train.seq_len"
                )
    return samples


class Samples:
    """Batches out of one dataset or a mixture of several: `micro_batches` is the place to start reading.

    datasets: by name, in the order of their names; `remote`: which of them are at an address.

    document_end_id: None, or an id from which documents can be told, so that a batch needs nothing but tokens.
    """

    def __init__(self, config: PretrainConfig, datasets: dict[str, Dataset], remote: set[str]) -> None:
        self.config, self.datasets = config, datasets
        self.sources = list(datasets.values())
        self.remote = {source for source, name in enumerate(datasets) if name in remote}
        first = self.sources[0]
        self.tokenizer_dir, self.vocab_size = first.path, first.vocab_size
        for name, dataset in datasets.items():
            if dataset.tokenizer_fingerprint != first.tokenizer_fingerprint:
                raise ConfigError(
                    f"data.mixture: {name} ({dataset.path}) was built with another tokenizer than "
                    f"{next(iter(datasets))} ({first.path}); build it again with "
                    f"data.build.tokenizer={{type: pretrained, path: {first.path}}}"
                )
        vocabulary = self._bert_vocabulary() if config.model.architecture == "bert" else None
        self.document_end_id = self._common_document_end_id()
        tokens_alone = self.document_end_id is not None
        fim = self._fim_ids() if config.data.fim.probability else None
        steps = [(0, config.train.seq_len), *((phase.from_step, phase.seq_len) for phase in config.train.phases)]
        rows = [
            [open_rows(config, dataset, seq_len, vocabulary, tokens_alone, fim) for dataset in self.sources]
            for _, seq_len in steps
        ]
        self._stages = mixture_stages(config, [of_source.num_rows for of_source in rows[0]])
        self.mixture = mixture.make_mixture(self._stages) if config.data.mixture else None
        self.phases = [
            Phase(number, step, seq_len, rows[number], self._counts(step))
            for number, (step, seq_len) in enumerate(steps)
        ]
        self._block = lru_cache(maxsize=4)(self._make_block)

    def micro_batches(self, step: int, rank: int, world_size: int) -> Iterator[Arrays]:
        """The micro batches of `rank` for the step from `step` to `step + 1`; the rank's share must divide.

        Each has the arrays of `pack.gpt_rows` or `bert_rows.make_rows`, or where there is a `document_end_id` only
        "tokens", (micro_batch_size, seq_len + 1) in the dataset's dtype, for `expand`.
        """
        size, phase = self.config.train.micro_batch_size, self.phase_at(step)
        first, share = self._places(phase, step, rank, world_size)
        if self.remote:
            self._fetch_ahead(phase, step, rank, world_size)
        at_once = size * max(1, TOKENS_AT_ONCE // (size * phase.seq_len))
        for start in range(first, first + share, at_once):
            count = min(at_once, first + share - start)
            sources, numbers = self._chosen(phase, start, count)
            place = self.places_before(phase.first_step) + start
            arrays = self._make_rows(phase, sources, numbers, "train", range(place, place + count))
            if count == size:
                yield self._unpadded(arrays)
                continue
            for row in range(0, count, size):
                yield self._unpadded({name: array[row : row + size] for name, array in arrays.items()})

    def sample_ids(self, step: int, rank: int, world_size: int) -> list[list[int]]:
        """[source, sample] of each sample of `micro_batches(step, rank, world_size)`, in order.

        Sources count in the order of their names; samples are numbered within the split of a source.
        """
        phase = self.phase_at(step)
        first, share = self._places(phase, step, rank, world_size)
        sources, numbers = self._chosen(phase, first, share)
        of_sample = [0] * share if sources is None else sources.tolist()
        return [list(pair) for pair in zip(of_sample, numbers.tolist(), strict=True)]

    def eval_batches(self, step: int, num_samples: int, rank: int, world_size: int) -> Iterator[Arrays]:
        """`rank`'s part of `num_samples` samples, the same ones at every call, with the seq_len of the step before.

        A mixture is mixed by its first weights. Every rank gets equally many batches; what is missing at the end is
        filled with rows without targets. The arrays are those of `micro_batches`.
        """
        size, phase = self.config.train.micro_batch_size, self.phase_at(max(0, step - 1))
        count = min(num_samples, sum(rows.num_rows for rows in phase.rows))
        sources, numbers = self._eval_samples(phase, count)
        for start in range(0, count, size * world_size):
            mine = np.arange(start, min(count, start + size * world_size))[rank::world_size]
            chosen = np.concatenate([mine, np.zeros(size - len(mine), np.int64)])
            of_chosen = None if sources is None else sources[chosen]
            arrays = self._make_rows(phase, of_chosen, numbers[chosen], "eval", numbers[chosen])
            for name in ("labels", "next_sentence_label"):
                if name in arrays:
                    arrays[name][len(mine) :] = IGNORE_INDEX
            if self.document_end_id is not None:  # behind the end of a document there is no target
                arrays["tokens"][len(mine) :] = self.document_end_id
            yield self._unpadded(arrays)

    def places_before(self, step: int) -> int:
        """The first place of the step's global batch; it has those up to `places_before(step + 1)`."""
        return samples_before(self.config.train, step)

    def phase_at(self, step: int) -> Phase:
        return self.phases[bisect_right([phase.first_step for phase in self.phases], step) - 1]

    def facts(self, step: int) -> dict[str, Any]:
        """All that the samples of the steps before `step` are a function of, besides the step; values as in JSON."""
        data, train = self.config.data, self.config.train
        changes = [stage for stage in data.mixture_schedule if stage.from_step < step]
        facts: dict[str, Any] = {
            "seed": train.seed,
            "dataset": {name: dataset.fingerprint for name, dataset in self.datasets.items()},
            "global_batch_size": train.global_batch_size,
            "seq_len": train.seq_len,
            "phases": [[phase.first_step, phase.seq_len] for phase in self.phases[1:] if phase.first_step < step],
            "shuffle_window_tokens": data.shuffle_window_tokens,
        }
        if self.mixture is None:
            facts["dataset"] = self.sources[0].fingerprint
        else:
            facts["mixture"] = dict(zip(self.datasets, self._stages[0][1], strict=True))
            facts["mixture_schedule"] = [stage.model_dump(mode="json") for stage in changes]
        if self.config.model.architecture == "bert":
            facts["masking"] = data.masking.model_dump(mode="json")
        else:
            facts["packing"] = data.packing
        if train.batch_ramp is not None:
            facts["batch_ramp"] = train.batch_ramp.model_dump(mode="json")
        if data.fim.probability:
            facts["fim"] = data.fim.model_dump(mode="json")
        return facts

    def _places(self, phase: Phase, step: int, rank: int, world_size: int) -> tuple[int, int]:
        """The rank's share of the step's global batch: its first place, counted from the phase's, and their number."""
        share = batch_size(self.config.train, step) // world_size
        return self.places_before(step) - self.places_before(phase.first_step) + rank * share, share

    def _counts(self, step: int) -> np.ndarray:
        place = self.places_before(step)
        return np.array([place]) if self.mixture is None else mixture.counts(self.mixture, place)

    def _common_document_end_id(self) -> int | None:
        """The id that ends the documents of all sources, if rows are for GPT and concatenated."""
        is_concatenated = self.config.model.architecture == "gpt" and self.config.data.packing == "concatenate"
        end_ids = {dataset.document_end_id for dataset in self.sources}
        return end_ids.pop() if is_concatenated and len(end_ids) == 1 else None

    def _bert_vocabulary(self) -> bert_rows.Vocabulary:
        tokenizer = load_tokenizer(self.tokenizer_dir)
        if not is_bert(tokenizer):
            raise ConfigError(
                f"model.architecture=bert needs a tokenizer with [PAD] [UNK] [CLS] [SEP] [MASK], which "
                f"{self.tokenizer_dir} does not have; build the dataset with data.build.tokenizer.type=wordpiece"
            )
        return bert_rows.read_vocabulary(tokenizer)

    def _fim_ids(self) -> FimIds:
        tokenizer = load_tokenizer(self.tokenizer_dir)
        sentinels = fim_ids(tokenizer)
        if sentinels is None:
            raise ConfigError(
                f"data.fim.probability={self.config.data.fim.probability} needs a tokenizer with <|fim_prefix|>, "
                f"<|fim_middle|> and <|fim_suffix|>, or those of StarCoder or Code Llama, which {self.tokenizer_dir} "
                f"does not have; build the dataset with data.build.tokenizer.fim_tokens=true"
            )
        return FimIds(*sentinels, end_of_text_id(tokenizer) if self.document_end_id is None else self.document_end_id)

    def _chosen(self, phase: Phase, first: int, count: int) -> tuple[np.ndarray | None, np.ndarray]:
        """Sources (None: there is one) and samples of the phase's places first, ..., first + count - 1."""
        parts = []
        while count:
            block, within = divmod(first, BLOCK)
            length = min(count, BLOCK - within)
            sources, numbers = self._block(phase.number, block)
            chosen = slice(within, within + length)
            parts.append((None if sources is None else sources[chosen], numbers[chosen]))
            first, count = first + length, count - length
        if len(parts) == 1:
            return parts[0]
        sources = None if self.mixture is None else np.concatenate([part[0] for part in parts])
        return sources, np.concatenate([part[1] for part in parts])

    def _make_block(self, number_of_phase: int, block: int) -> tuple[np.ndarray | None, np.ndarray]:
        """As `_chosen`, for the phase's places from block x BLOCK on."""
        phase = self.phases[number_of_phase]
        first = block * BLOCK
        if self.mixture is None:
            return None, self._order(phase, 0, first, BLOCK)
        offset = self.places_before(phase.first_step)
        sources, within = mixture.places(self.mixture, offset + first, BLOCK)
        numbers = np.empty(BLOCK, dtype=np.int64)
        for source in np.unique(sources).tolist():
            chosen = np.flatnonzero(sources == source)  # its places follow each other
            own = int(within[chosen[0]] - phase.before[source])
            numbers[chosen] = self._order(phase, source, own, len(chosen))
        return sources, numbers

    def _order(self, phase: Phase, source: int, first: int, count: int) -> np.ndarray:
        rows, seed = phase.rows[source], self.config.train.seed
        fingerprint = self.sources[source].fingerprint + (f", phase {phase.number}" if phase.number else "")
        window = self.config.data.shuffle_window_tokens
        if window is None:
            return order.sample_ids(seed, fingerprint, first, count, rows.num_rows)
        return order.nearby_ids(seed, fingerprint, first, count, rows.block_starts, window // phase.seq_len)

    def _eval_samples(self, phase: Phase, count: int) -> tuple[np.ndarray | None, np.ndarray]:
        if self.mixture is None:
            return None, order.sample_ids(0, self.sources[0].fingerprint, 0, count, phase.rows[0].num_rows)
        sources, _ = mixture.places(mixture.make_mixture(self._stages[:1]), 0, count)
        numbers = np.empty(count, dtype=np.int64)
        for source, rows in enumerate(phase.rows):
            chosen = np.flatnonzero(sources == source)
            fingerprint = self.sources[source].fingerprint
            numbers[chosen] = order.sample_ids(0, fingerprint, 0, len(chosen), rows.num_rows)
        return sources, numbers

    def _make_rows(
        self, phase: Phase, sources: np.ndarray | None, numbers: np.ndarray, use: str, places: Places
    ) -> Arrays:
        if sources is None:
            return phase.rows[0].make(numbers, use, places)
        result: Arrays = {}
        places = np.asarray(places)
        for source in np.unique(sources).tolist():
            chosen = np.flatnonzero(sources == source)
            arrays = phase.rows[source].make(numbers[chosen], use, places[chosen])
            for name, array in arrays.items():
                result.setdefault(name, np.empty((len(numbers), *array.shape[1:]), array.dtype))[chosen] = array
        return result

    def _unpadded(self, arrays: Arrays) -> Arrays:
        is_bert = self.config.model.architecture == "bert"
        return bert_rows.unpad(arrays) if is_bert and self.config.data.unpad else arrays

    def _fetch_ahead(self, phase: Phase, step: int, rank: int, world_size: int) -> None:
        """Ask for the shards of a rank's next steps, in the order of their use, of datasets that are at an address."""
        steps = range(step, step + STEPS_AHEAD)
        parts = [self._chosen(phase, *self._places(phase, number, rank, world_size)) for number in steps]
        numbers = np.concatenate([part[1] for part in parts])
        for source, dataset in enumerate(self.sources):
            if source in self.remote:
                chosen = numbers
                if parts[0][0] is not None:
                    chosen = numbers[np.concatenate([part[0] for part in parts]) == source]
                starts = phase.rows[source].first_tokens(chosen)
                shards, first_use = np.unique(np.searchsorted(dataset.shard_starts, starts, "right") - 1, True)
                dataset.prefetch(shards[np.argsort(first_use)].tolist())


def mixture_stages(config: PretrainConfig, num_rows: Sequence[int]) -> list[tuple[int, list[float]]]:
    """Stages for `mixture.make_mixture`, the sources in the order of their names, with num_rows samples each."""
    sources = [source for _, source in sorted(config.data.mixture.items())]
    weights = [
        source.weight if source.weight is not None else (source.epochs or 1.0) * rows
        for source, rows in zip(sources, num_rows, strict=False)
    ]
    changes = [
        (stage.from_step, stage.ramp_steps, [stage.weights[name] for name in sorted(stage.weights)])
        for stage in config.data.mixture_schedule
    ]
    return mixture.stages_of_schedule(weights or [1.0], changes, lambda step: samples_before(config.train, step))


def tokens_before(train: TrainConfig, step: int) -> int:
    """Tokens of all steps before `step`: places in rows, over all ranks."""
    starts = [0, *(phase.from_step for phase in train.phases)]
    lengths = [train.seq_len, *(phase.seq_len for phase in train.phases)]
    edges = [samples_before(train, min(start, step)) for start in [*starts, step]]
    return sum(seq_len * (end - start) for seq_len, (start, end) in zip(lengths, pairwise(edges), strict=True))
