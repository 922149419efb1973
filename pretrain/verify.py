"""Silent data corruption: wrong numbers without an error, from a processor, a memory or a link that is failing.

Every `guard.verify_every_steps` steps,

    before the step   all ranks must have the same weights, and each rank's weights must be its fp32 weights, rounded
    the step          forward and backward are executed twice, with the same dropout: losses and each rank's gradients,
                      before they are summed over the ranks, must be bitwise the same
    after it          all ranks must have got the same losses and the same norm of the gradient

The first of the two executions has no effect. Its gradients are looked at one parameter after the other as backward
makes them and let go, so at every ZeRO stage it takes no memory that the second one would not take. What is found stops
the run, in the first two cases before the update. Hochschild et al. 2021 ("Cores that don't count") found a few such
processors in several thousand machines; the training of Llama 3 (2024, table 5) met it six times in 54 days.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from configs.incidents import append_incident
from configs.load import ConfigError
from configs.schema import GuardConfig, PretrainConfig
from data_pipeline.stream import Batch
from pretrain import engine, runtime
from pretrain.guard import GuardStop
from pretrain.objective import global_mean
from pretrain.runtime import Runtime

CHUNK = 1 << 20  # elements that are in memory as int64 at once
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of an element -> its bits


@dataclass(frozen=True)
class Difference:
    """Something that is not as it must be."""

    ranks: list[int]  # that differ from the others; all, where no majority agrees
    text: str


def is_due(guard: GuardConfig, step: int) -> bool:
    """Whether the step from `step` to `step + 1` is verified."""
    return guard.verify_every_steps is not None and (step + 1) % guard.verify_every_steps == 0


class Verification:
    """Of one step: made before its first forward, it executes the step once and watches the second execution.

    Every rank makes it, with the batches and counts of the step, and calls `compare` before the update. Both raise
    on every rank if anything differs anywhere.
    """

    def __init__(
        self,
        config: PretrainConfig,
        model: Any,
        batches: Sequence[Batch],
        counts: Mapping[str, float],
        step: int,
        ranks: Runtime,
    ) -> None:
        self.config, self.model, self.batches, self.counts = config, model, batches, counts
        self.step, self.ranks = step, ranks
        weights = {name: int(checksum(weight)) for name, weight in engine.whole_weights(model)}
        reports = ranks.gather((list(weights.values()), engine.unlike_masters(model)))
        stop_if(weight_differences(list(weights), reports), config, step, ranks)
        self._first = self._execute()
        self._second: dict[str, torch.Tensor] = {}
        self._hooks = watch(model, self._second)

    def compare(self, totals: Mapping[str, torch.Tensor], losses: Mapping[str, float]) -> None:
        """Raise GuardStop if the second execution had other results, ConfigError if no execution is like another one.

        totals: its sums of losses on this rank; losses: the means over all ranks, which all must have alike.
        """
        for hook in self._hooks:
            hook.remove()
        second = self._second | {f"loss {name}": checksum(total) for name, total in totals.items()}
        unlike = [name for name in self._first if not torch.equal(self._first[name], second[name])]
        report = None
        if self.ranks.any(bool(unlike))[0]:  # which of the two is right? at ZeRO-3 all ranks have to take part
            third = self._execute()
            agrees = [all(torch.equal(run[n], third[n]) for n in unlike) for run in (self._first, second)]
            report = (unlike, len(self._first), agrees) if unlike else None
        reports = self.ranks.gather(report)
        if nothing_repeats(reports):
            raise ConfigError(
                "guard.verify_every_steps: on no rank did three executions of a step give the same numbers twice, so "
                "the device's kernels do not repeat their numbers, and nothing can be found that way (docs/trust.md); "
                "leave it out"
            )
        differences = execution_differences(reports)
        hexadecimal = {name: loss.hex() for name, loss in losses.items()}
        differences += agreement("the losses", self.ranks.gather(str(hexadecimal)))
        stop_if(differences, self.config, self.step, self.ranks)

    def _execute(self) -> dict[str, torch.Tensor]:
        """Forward and backward of the step without any effect; checksums of gradients and of sums of losses."""
        seen: dict[str, torch.Tensor] = {}
        hooks = watch(self.model, seen, let_go=True)
        parameters = [parameter for parameter in self.model.module.parameters() if parameter.requires_grad]
        train, totals = self.config.train, dict[str, torch.Tensor]()
        runtime.seed_all(train.seed, self.step, self.ranks.rank)
        with engine.without_reduction(self.model):
            for batch in self.batches:
                self.ranks.mark("forward", self.step)
                sums = self.model.module(**batch, label_smoothing=train.label_smoothing, z_loss=train.z_loss)
                self.ranks.mark("backward", self.step)
                loss = global_mean(sums, self.counts) * self.model.world_size  # as `engine.backward`
                torch.autograd.grad(loss, parameters, allow_unused=True)
                totals = {name: totals.get(name, 0.0) + part.detach() for name, part in sums.items()}
        for hook in hooks:
            hook.remove()
        runtime.seed_all(train.seed, self.step, self.ranks.rank)  # as if nothing had been
        return seen | {f"loss {name}": checksum(total) for name, total in totals.items()}


def check_norm(norm: float, config: PretrainConfig, step: int, ranks: Runtime) -> None:
    """Raise GuardStop on every rank if not all have got the same norm of the gradient."""
    stop_if(agreement("the norm of the gradient", ranks.gather(norm.hex())), config, step, ranks)


def stop_if(differences: Sequence[Difference], config: PretrainConfig, step: int, ranks: Runtime) -> None:
    """Where there are any, the same ones on all ranks: append the incident and raise GuardStop."""
    if not differences:
        return
    of_ranks = sorted({rank for difference in differences for rank in difference.ranks})
    what = "; ".join(difference.text for difference in differences)
    text = (
        f"step {step + 1}: silent data corruption: {what}. Stopped; "
        f"{newest_checkpoint(Path(config.run_dir))}. Take the device or machine of the rank out of the run, then the "
        f"same command goes on"
    )
    if ranks.is_first:
        one = of_ranks[0] if len(of_ranks) == 1 else None
        append_incident(config.run_dir, "corruption", text, step=step + 1, rank=one, ranks=of_ranks)
    ranks.barrier()  # the first rank to leave ends the others
    raise GuardStop(text)


def watch(model: Any, seen: dict[str, torch.Tensor], let_go: bool = False) -> list[Any]:
    """Put into `seen`, by name, a checksum of all gradients that this rank's parameters get; returns hooks to remove.

    A gradient is seen whole, summed over a parameter's uses, before it is added to others or sent to other ranks. With
    `let_go` autograd goes on with a tensor of zeros that takes no memory.
    """

    def see(name: str, gradient: torch.Tensor) -> torch.Tensor | None:
        before = seen.get(name)
        seen[name] = checksum(gradient) if before is None else 3 * before + checksum(gradient)
        return gradient.new_zeros(()).expand_as(gradient) if let_go else None

    named = model.module.named_parameters()
    return [parameter.register_hook(partial(see, name)) for name, parameter in named if parameter.requires_grad]


@torch.no_grad()
def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """A number of the bits of `tensor`, any shape and dtype: int64, shape (), on its device, without waiting for it.

    sum_i (2 i + 1) x bits_i within a chunk, chunks combined with odd factors, modulo 2^64. Odd factors can be undone
    there, so elements of which one is changed, in whatever bits, never have the checksum that they had.
    """
    bits = tensor.detach().contiguous().view(-1).view(INTEGERS[tensor.element_size()])
    odd = 2 * torch.arange(min(CHUNK, bits.numel()), device=bits.device) + 1
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for chunk in bits.split(CHUNK):
        total = 31 * total + (odd[: chunk.numel()] * chunk).sum()
    return total


def outvoted(values: Sequence[Hashable]) -> list[int]:
    """The ranks whose value is not that of more than half of all; every rank where none is."""
    value, count = Counter(values).most_common(1)[0]
    if 2 * count <= len(values):
        return list(range(len(values)))
    return [rank for rank, other in enumerate(values) if other != value]


def weight_differences(names: Sequence[str], reports: Sequence[Any]) -> list[Difference]:
    """reports: of each rank, the checksums of its weights in the order of `names`, and what `unlike_masters` found."""
    found = []
    for rank, (_, unlike) in enumerate(reports):
        if unlike:
            text = f"rank {rank}: its weights are not its fp32 weights, rounded: {_list(unlike)}"
            found.append(Difference([rank], text))
    by_name = {name: outvoted([weights[i] for weights, _ in reports]) for i, name in enumerate(names)}
    if different := {name: ranks for name, ranks in by_name.items() if ranks}:
        of_ranks = sorted({rank for ranks in different.values() for rank in ranks})
        found.append(Difference(of_ranks, f"{_ranks(of_ranks, len(reports))} other weights: {_list(list(different))}"))
    return found


def execution_differences(reports: Sequence[Any]) -> list[Difference]:
    """reports: of each rank None, or (what differed, out of how many, whether a third execution agrees with each)."""
    found = []
    for rank, report in enumerate(reports):
        if report is None:
            continue
        unlike, count, (first, second) = report
        third = "the second result" if second else "the first result" if first else "yet another result"
        text = (
            f"rank {rank} computed the step twice on the same data with different results in {len(unlike)} of {count} "
            f"sums of losses and gradients ({_list(unlike)}), a third time with {third}"
        )
        found.append(Difference([rank], text))
    return found


def nothing_repeats(reports: Sequence[Any]) -> bool:
    """Whether on every rank each of three executions had a result of its own; reports: see `execution_differences`."""
    return all(report is not None and not any(report[2]) for report in reports)


def agreement(what: str, values: Sequence[Any]) -> list[Difference]:
    """values: of each rank, what must be the same on all."""
    different = outvoted([str(value) for value in values])
    return [Difference(different, f"{_ranks(different, len(values))} other values of {what}")] if different else []


def newest_checkpoint(run_dir: Path) -> str:
    """In words."""
    finished = sorted(path.parent for path in (run_dir / "checkpoints").glob("step-*/manifest.json"))
    return f"the newest checkpoint is {finished[-1]}" if finished else "there is no checkpoint yet"


def _ranks(numbers: list[int], world_size: int) -> str:
    if len(numbers) == world_size:
        return f"all {world_size} ranks, no majority of which agrees, have"
    return f"rank {numbers[0]} has" if len(numbers) == 1 else f"ranks {', '.join(map(str, numbers))} have"


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
