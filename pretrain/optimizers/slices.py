"""Which stretch of a flat tensor belongs to which parameter, and the two things ranks exchange because of it.

ZeRO splits parameters over the ranks without regard to their borders: stage 3 cuts every parameter into one piece a
rank, stages 1 and 2 lay the parameters of a group end to end and cut that. With a `Layout` an optimizer can still work
on whole parameters: sums over each parameter are one small all-reduce (`sum_per_parameter`), and whole matrices visit
one rank each (`on_whole_parameters`). The result is that of unsplit parameters, but for the order of additions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Slice:
    """One parameter's stretch of this rank's flat tensor."""

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    offset: int  # of the stretch in the flat tensor
    lengths: tuple[int, ...]  # elements that each rank has, in order: rank 0 has the parameter's first ones


@dataclass(frozen=True)
class Layout:
    """A flat tensor as its parameters, in the same order on every rank; lengths may be 0, padding is in no slice."""

    slices: tuple[Slice, ...]
    rank: int = 0  # place of this rank in every slice's `lengths`; one length: this rank has all of it

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Each parameter's stretch of `flat`, as views."""
        return [flat.narrow(0, part.offset, part.lengths[self.rank]) for part in self.slices]


def unsplit(parameter: torch.Tensor, name: str = "") -> Layout:
    """The layout of a tensor that is one whole parameter, as without ZeRO."""
    return Layout((Slice(name, tuple(parameter.shape), 0, (parameter.numel(),)),))


def sum_per_parameter(pieces: list[torch.Tensor], layout: Layout) -> torch.Tensor:
    """Scalars of this rank's stretches, (sums, slices) fp32, added over the ranks; in place, and returned."""
    sums = torch.stack(pieces)
    if len(layout.slices[0].lengths) > 1:
        dist.all_reduce(sums)
    return sums


def on_whole_parameters(
    flat: torch.Tensor, layout: Layout, change: Callable[[torch.Tensor, Slice], torch.Tensor]
) -> None:
    """Put change(whole parameter, its slice) in place of every parameter in `flat`; each runs on one rank.

    In a turn, rank k gets all pieces of the turn's parameter k, changes it and sends the pieces back. A turn moves
    twice what a reduce-scatter does, holds one whole parameter a rank, and the ranks share the work. Every rank calls
    it.
    """
    num_ranks = len(layout.slices[0].lengths)
    views = layout.views(flat)
    if num_ranks == 1:
        for part, view in zip(layout.slices, views, strict=True):
            view.copy_(change(view.view(part.shape), part).reshape(-1))
        return
    for first in range(0, len(views), num_ranks):
        turn, mine = layout.slices[first : first + num_ranks], views[first : first + num_ranks]
        sent = [view.numel() for view in mine] + [0] * (num_ranks - len(mine))
        own = turn[layout.rank] if layout.rank < len(turn) else None
        received = list(own.lengths) if own else [0] * num_ranks
        whole = flat.new_empty(sum(received))
        back = torch.cat(mine)
        dist.all_to_all_single(whole, back, received, sent)
        if own:
            whole = change(whole.view(own.shape), own).to(flat.dtype).reshape(-1).contiguous()
        dist.all_to_all_single(back, whole, sent, received)
        for view, piece in zip(mine, back.split(sent[: len(mine)]), strict=True):
            view.copy_(piece)
