"""Several sources in fixed proportions: place in the endless order -> (source, place in that source's order). Pure.

A binary tree has the sources as its leaves. A node hands its m-th item to the left or the right so that after every m
the left has had m x share items, rounded to the nearest number: Bresenham's line, exact in integers, with nothing to
remember. So any place is found at once, and the proportions hold over every stretch, not only on average.

How exact: each split rounds by at most 1/2, and rounding higher up counts in proportion. So after any number of items a
source of weight w has had its due within 1/2 x (the sum of w / W over the nodes on the way to it but the root, W being
the node's weight). In a Huffman tree W grows from leaf to root at least like the Fibonacci numbers 1, 1, 2, 3, 5: two
nodes that are joined were the lightest, so the next one to join them weighs no less than either. The sum is at most
3.36, which makes 1.68 samples, 1/2 with two sources; over a stretch, the difference of two such counts, twice that.
Tijdeman's chairman assignment (1980) stays below 1, but needs a table as long as the weights' common denominator; here
weights are exact to 2^-31, and when they change, what a source is owed is carried over. (The tree stays that of the
first weights; later ones keep to 1/2 a split, not to the Fibonacci numbers.)
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

SHARE_BITS = 31
RAMP_STAGES = 256  # a linear change of weights is made of at most so many constant ones
_WHOLE = 1 << SHARE_BITS


@dataclass(frozen=True)
class Mixture:
    """The tree, node 0 on top, and what its nodes have done before each stage; arrays are (stages, nodes) int64."""

    num_sources: int
    children: list[tuple[int, int]]  # per node: left and right; a node's index, or -1 - source
    stage_starts: np.ndarray  # (stages,) int64: the first place of each stage
    left_shares: np.ndarray  # of the node's items in units of 2^-31
    items: np.ndarray  # that reached the node before the stage
    went_left: np.ndarray  # of these
    owed_left: np.ndarray  # the rounding so far, in units of 2^-31, in [0, 2^31)


def make_mixture(stages: Sequence[tuple[int, Sequence[float]]]) -> Mixture:
    """A mixture from its stages (first place, weights): constant weights from that place on, relative to each other.

    The first stage starts at 0, the others in ascending order; weights are >= 0, one of them positive.
    """
    weights = np.array([stage_weights for _, stage_weights in stages], dtype=np.float64)  # (stages, sources)
    weights /= weights.sum(axis=1, keepdims=True)
    num_sources = weights.shape[1]
    children = _huffman(weights[0])  # of nothing later: what has been seen stays, whatever is planned anew
    starts = np.array([start for start, _ in stages], dtype=np.int64)
    shares = _left_shares(children, weights)
    empty = np.zeros(shares.shape, dtype=np.int64)
    mixture = Mixture(num_sources, children, starts, shares, empty, empty.copy(), empty + _WHOLE // 2)
    for stage in range(1, len(stages)):
        _enter_stage(mixture, stage)
    return mixture


def places(mixture: Mixture, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Source of each of the places first, ..., first + count - 1, and place in its own order; (count,) int64 each."""
    sources, found = np.zeros(count, dtype=np.int64), np.arange(first, first + count, dtype=np.int64)
    stage = np.searchsorted(mixture.stage_starts, found, side="right") - 1
    at_node = {0: np.arange(count)}  # which of the places each node gets; a node comes before its children
    for node, children in enumerate(mixture.children):
        chosen = at_node.pop(node)
        items = found[chosen]
        left = _left_before(mixture, stage[chosen], node, items)
        goes_left = _left_before(mixture, stage[chosen], node, items + 1) > left
        found[chosen] = np.where(goes_left, left, items - left)
        for child, part in zip(children, (chosen[goes_left], chosen[~goes_left]), strict=True):
            if child >= 0:
                at_node[child] = part
            else:
                sources[part] = -1 - child
    return sources, found


def counts(mixture: Mixture, place: int) -> np.ndarray:
    """How many of the first `place` items are each source's; (sources,) int64."""
    result = np.full(mixture.num_sources, place, dtype=np.int64)
    stage = np.array(max(0, int(np.searchsorted(mixture.stage_starts, place, side="right")) - 1))
    at_node = {0: place}
    for node, children in enumerate(mixture.children):
        items = at_node.pop(node)
        left = int(_left_before(mixture, stage, node, np.array(items)))
        for child, part in zip(children, (left, items - left), strict=True):
            if child >= 0:
                at_node[child] = part
            else:
                result[-1 - child] = part
    return result


def stages_of_schedule(
    weights: Sequence[float],
    changes: Sequence[tuple[int, int, Sequence[float]]],
    places_before: Callable[[int], int],
) -> list[tuple[int, list[float]]]:
    """Stages for `make_mixture`: `weights` at first, then changes (from_step, ramp_steps, weights) in ascending order.

    From from_step on the weights go to the new ones within ramp_steps, linearly, in at most RAMP_STAGES stages that
    begin with a step and have the weights of their middle. `places_before` says with which place a step begins.
    """
    current = np.array(weights, dtype=np.float64) / sum(weights)
    stages = [(0, current.tolist())]
    for from_step, ramp_steps, new_weights in changes:
        new = np.array(new_weights, dtype=np.float64) / sum(new_weights)
        edges = np.unique(np.linspace(0, ramp_steps, min(ramp_steps, RAMP_STAGES) + 1).astype(np.int64)).tolist()
        for start, stop in itertools.pairwise(edges):
            done = (start + stop) / 2 / ramp_steps
            stages.append((places_before(from_step + start), ((1 - done) * current + done * new).tolist()))
        stages.append((places_before(from_step + ramp_steps), new.tolist()))
        current = new
    return stages


def _huffman(weights: np.ndarray) -> list[tuple[int, int]]:
    """Children of each inner node of the Huffman tree (see Mixture), parents first; none for a single source."""
    heap: list[tuple[float, int]] = [(float(weight), -1 - source) for source, weight in enumerate(weights)]
    heapq.heapify(heap)
    made: list[tuple[int, int]] = []
    while len(heap) > 1:
        (weight, right), (more, left) = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (weight + more, len(made)))
        made.append((left, right))

    def renumbered(child: int) -> int:  # the root was made last and comes first
        return len(made) - 1 - child if child >= 0 else child

    return [(renumbered(left), renumbered(right)) for left, right in reversed(made)]


def _left_shares(children: list[tuple[int, int]], weights: np.ndarray) -> np.ndarray:
    """Per stage and node the left child's part of the node's weight in units of 2^-31; (stages, nodes) int64."""
    of_node = np.zeros((len(weights), len(children)))
    shares = np.zeros(of_node.shape, dtype=np.int64)
    for node in reversed(range(len(children))):
        left, right = (of_node[:, child] if child >= 0 else weights[:, -1 - child] for child in children[node])
        of_node[:, node] = left + right
        share = np.divide(left, left + right, out=np.zeros(len(weights)), where=left + right > 0)
        shares[:, node] = np.round(share * _WHOLE)
    return shares


def _enter_stage(mixture: Mixture, stage: int) -> None:
    """Fill in what the nodes have done before `stage`, from the stage before it."""
    before, reached = np.array(stage - 1), {0: int(mixture.stage_starts[stage])}
    for node, children in enumerate(mixture.children):
        items = reached.pop(node)
        left = int(_left_before(mixture, before, node, np.array(items)))
        share, since = int(mixture.left_shares[stage - 1, node]), items - int(mixture.items[stage - 1, node])
        mixture.items[stage, node], mixture.went_left[stage, node] = items, left
        mixture.owed_left[stage, node] = (int(mixture.owed_left[stage - 1, node]) + since * share) % _WHOLE
        for child, part in zip(children, (left, items - left), strict=True):
            if child >= 0:
                reached[child] = part


def _left_before(mixture: Mixture, stage: np.ndarray, node: int, items: np.ndarray) -> np.ndarray:
    """How many of the node's first `items` items go left; stage and items are of one shape, int64, and so is this."""
    share = mixture.left_shares[stage, node]
    since = items - mixture.items[stage, node]
    periods, rest = since >> SHARE_BITS, since & (_WHOLE - 1)  # share has a period of 2^31 items: no product overflows
    rounded = (mixture.owed_left[stage, node] + rest * share) >> SHARE_BITS
    return mixture.went_left[stage, node] + periods * share + rounded
