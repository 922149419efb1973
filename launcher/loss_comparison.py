"""Compares runs with their reference, and finds the change that makes a difference: functions of numbers alone.

A curve is what a run gave for each step: [{"loss", "grad_norm"}, ...]. Two correct runs of one training differ by
rounding, so the question is by how much rounding can make them differ. That is measured, on the training at hand: the
reference is run in a finer precision too, and a run may differ from it by FACTOR times as much as rounding had changed
the reference itself by that step, because another order of the same sums is another draw of the same errors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

QUANTITIES = ("loss", "grad_norm")
FACTOR = 4.0
UNIT_ROUNDOFF = {"fp32": 2.0**-24, "bf16": 2.0**-9}
Curve = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Difference:
    """At one step, counted from 1; `relative` to the reference's value, `allowed` likewise."""

    step: int
    quantity: str
    expected: float  # of the reference
    found: float
    relative: float
    allowed: float

    @property
    def is_too_large(self) -> bool:
        return not self.relative <= self.allowed

    def __str__(self) -> str:
        return (
            f"step {self.step}, {self.quantity}: {self.expected:.8g} in the reference, {self.found:.8g} here, "
            f"a relative difference of {self.relative:.1e} where rounding explains {self.allowed:.1e}"
        )


def expected_rounding(curve: Curve, finer: Curve, precision: str, num_terms: int) -> list[dict[str, float]]:
    """By step and quantity, the relative difference that rounding to `precision` explains.

    FACTOR times the largest one so far between the reference in this precision and in a finer one; at least that of a
    sum of num_terms, the tokens of the batch. In bf16 the largest one of all steps: there every step's own rounding is
    larger than what has come of that of the steps before, and a single step may show little of it by chance.
    """
    largest = dict.fromkeys(QUANTITIES, smallest_rounding(precision, num_terms))
    by_step = []
    for found, exact in zip(curve, finer, strict=True):
        for quantity in QUANTITIES:
            measured = FACTOR * relative_difference(exact[quantity], found[quantity])
            largest[quantity] = max(largest[quantity], measured)
        by_step.append(dict(largest))
    return by_step if precision == "fp32" else [by_step[-1]] * len(by_step)


def smallest_rounding(precision: str, num_terms: int) -> float:
    """The relative error of a sum of num_terms rounding errors of random sign, sqrt(num_terms) x the unit roundoff.

    In bf16 sums are kept in fp32 and the errors of their terms average out: the unit roundoff / sqrt(num_terms).
    """
    growth = math.sqrt(num_terms) if precision == "fp32" else 1 / math.sqrt(num_terms)
    return UNIT_ROUNDOFF[precision] * growth


def compare(reference: Curve, found: Curve, allowed: Sequence[Mapping[str, float]]) -> list[Difference]:
    """The difference of every step and quantity, in order."""
    return [
        Difference(
            step,
            quantity,
            expected[quantity],
            values[quantity],
            relative_difference(expected[quantity], values[quantity]),
            limits[quantity],
        )
        for step, (expected, values, limits) in enumerate(zip(reference, found, allowed, strict=True), start=1)
        for quantity in QUANTITIES
    ]


def relative_difference(expected: float, found: float) -> float:
    """|found - expected| / |expected|; infinite where either is not a finite number."""
    if not (math.isfinite(expected) and math.isfinite(found)):
        return math.inf
    return 0.0 if found == expected else abs(found - expected) / max(abs(expected), 1e-30)


def largest(differences: Sequence[Difference], quantity: str) -> Difference:
    """The difference of `quantity` that is largest beside what is allowed."""
    return max((d for d in differences if d.quantity == quantity), key=lambda d: d.relative / d.allowed)


def first_too_large(differences: Sequence[Difference]) -> Difference | None:
    return next((difference for difference in differences if difference.is_too_large), None)


def culprits(parents: Mapping[str, Sequence[str]], is_wrong: Mapping[str, bool]) -> list[str]:
    """The runs that are wrong while all those are right from which they were made by a single change.

    parents: by run, in order; the other wrong runs have a wrong one among their ancestors and so prove nothing more.
    """
    return [name for name, of_run in parents.items() if is_wrong[name] and not any(is_wrong[p] for p in of_run)]
