"""The comparison behind `millstream prove loss`: what rounding explains, and which change is to blame."""

from __future__ import annotations

import math

import pytest

from launcher.loss_comparison import FACTOR, compare, culprits, expected_rounding, first_too_large, largest

EXACT = [{"loss": 5.0, "grad_norm": 1.0}, {"loss": 4.0, "grad_norm": 2.0}, {"loss": 3.0, "grad_norm": 3.0}]


def moved(*relative: float, quantity: str = "loss") -> list[dict[str, float]]:
    """EXACT with the quantity of each step moved by so much."""
    return [values | {quantity: values[quantity] * (1 + by)} for values, by in zip(EXACT, relative, strict=True)]


def test_rounding_is_what_it_did_to_the_reference_so_far_and_never_less_than_that_of_a_sum():
    expected = expected_rounding(moved(0, 1e-5, 1e-7), EXACT, "fp32", num_terms=256)
    assert expected[0]["loss"] == 2.0**-24 * 16
    assert expected[1]["loss"] == expected[2]["loss"] == pytest.approx(FACTOR * 1e-5)
    assert [step["grad_norm"] for step in expected] == [2.0**-24 * 16] * 3


def test_rounding_of_bf16_is_that_of_the_step_where_it_showed_most():
    expected = expected_rounding(moved(1e-6, 1e-2, 1e-3), EXACT, "bf16", num_terms=256)
    assert [step["loss"] for step in expected] == [pytest.approx(FACTOR * 1e-2)] * 3
    assert [step["grad_norm"] for step in expected] == [2.0**-9 / 16] * 3


def test_first_difference_beyond_rounding_is_named_with_step_quantity_and_values():
    allowed = [{"loss": 1e-6, "grad_norm": 1e-6}] * 3
    difference = first_too_large(compare(EXACT, moved(1e-7, 1e-3, 1e-2), allowed))
    assert difference is not None
    assert str(difference).startswith("step 2, loss: 4 in the reference, 4.004 here, a relative difference of 1.0e-03")
    assert first_too_large(compare(EXACT, moved(1e-7, 0, 0), allowed)) is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_a_number_is_a_difference(value):
    found = [EXACT[0], {"loss": 4.0, "grad_norm": value}, EXACT[2]]
    difference = first_too_large(compare(EXACT, found, [{"loss": 1.0, "grad_norm": 1.0}] * 3))
    assert difference is not None and (difference.step, difference.quantity) == (2, "grad_norm")


def test_largest_difference_is_that_which_exceeds_rounding_most():
    allowed = [{"loss": limit, "grad_norm": 1.0} for limit in (1e-6, 1e-4, 1e-4)]
    assert largest(compare(EXACT, moved(1e-5, 2e-5, 0), allowed), "loss").step == 1


def test_culprit_is_the_change_that_turns_a_right_run_wrong_not_what_is_made_from_it():
    parents = {"packed": ["ref"], "fused": ["ref"], "loop": ["ref", "packed", "fused"], "ranks": ["loop"]}
    wrong = dict.fromkeys(["ref", *parents], False)
    assert culprits(parents, wrong | {"ranks": True}) == ["ranks"]
    assert culprits(parents, wrong | {"packed": True, "loop": True, "ranks": True}) == ["packed"]
    assert culprits(parents, wrong | {"packed": True, "fused": True, "loop": True}) == ["packed", "fused"]
    assert culprits(parents, wrong) == []
