"""The comparison behind `millstream prove resume`: it must find, and name, each difference that is planted."""

from __future__ import annotations

import pytest

from launcher.resume_comparison import QUANTITIES, Difference, first_differences, read_lines

EXACT = dict.fromkeys(QUANTITIES, 0.0)


def records() -> dict[int, dict]:
    return {
        step: {
            "loss": 5.0 - 0.1 * step,
            "lr": 0.001 * step,
            "grad_norm": 1.0 / step,
            "tokens": 256 * step,
            "sample_ids": [[0, step], [0, step + 7]],
            "rng": [0.25, 0.5],
        }
        for step in range(1, 9)
    }


def test_equal_runs_differ_in_nothing():
    assert first_differences(records(), records(), 8, EXACT) == dict.fromkeys(QUANTITIES)


@pytest.mark.parametrize(
    ("quantity", "value"),
    [
        ("loss", 4.5 + 1e-12),
        ("lr", 0.0051),
        ("grad_norm", float("nan")),
        ("tokens", 1281),
        ("sample_ids", [[0, 12], [0, 5]]),
        ("rng", [0.5, 0.25]),
    ],
)
def test_a_planted_difference_is_named_with_its_step_and_both_values(quantity, value):
    found = records()
    found[5][quantity] = value
    differences = first_differences(records(), found, 8, EXACT)
    named = differences.pop(quantity)
    assert (named.step, named.quantity, named.expected) == (5, quantity, records()[5][quantity])
    assert named.found is value
    assert not any(differences.values())


def test_the_first_of_several_differences_is_named():
    found = records()
    found[3]["tokens"], found[6]["tokens"] = 1, 2
    assert first_differences(records(), found, 8, EXACT)["tokens"] == Difference(3, "tokens", 768, 1)


def test_a_step_that_is_missing_is_a_difference():
    found = records()
    del found[8]
    assert first_differences(records(), found, 8, EXACT)["loss"].step == 8


def test_a_tolerance_is_relative():
    found = records()
    found[2]["loss"] *= 1 + 5e-5
    assert first_differences(records(), found, 8, {"loss": 1e-4})["loss"] is None
    assert first_differences(records(), found, 8, {"loss": 1e-5})["loss"].step == 2


def test_nan_is_within_no_tolerance():
    found = records()
    found[2]["loss"] = float("nan")
    assert first_differences(records(), found, 8, {"loss": 1e-4})["loss"].step == 2


def test_a_line_that_is_half_written_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step"')
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1}]
