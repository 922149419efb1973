"""A wall-clock budget: the schedule falls with the time and ends at its floor, and the run ends in time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import PretrainConfig
from pretrain import budget
from pretrain.optim import learning_rate
from pretrain.state import TrainState
from tests.conftest import ROOT
from tests.launcher.small_run import has_reached, make_config, start, wait_until


def configuration(seconds: str | None, every: int = 10**9, num_steps: int = 10**6, **schedule) -> PretrainConfig:
    return PretrainConfig.model_validate(
        {
            "run_dir": "r",
            "train": {"budget": seconds, "num_steps": num_steps, "schedule": schedule},
            "eval": {"every_steps": every},
            "checkpoint": {"every_steps": every},
        }
    )


def rate(config: PretrainConfig, state: TrainState) -> float:
    train = config.train
    return learning_rate(state.step, train.num_steps, 1.0, train.schedule, budget.time_share(config, state))


def simulate(config: PretrainConfig, durations: list[float], pause: float) -> tuple[list[float], TrainState]:
    """A run with steps of these durations, repeated, and pauses where they are due; its rates and its end."""
    state, rates, now = TrainState(end_seconds=pause), [], 0.0
    while not budget.is_finished(config, state):
        rates.append(rate(config, state))
        share = budget.time_share(config, state)
        now += durations[state.step % len(durations)]
        state = budget.at(config, replace(state, step=state.step + 1), [now, max(durations), pause], share)
        if state.step % config.eval.every_steps == 0 and not budget.is_finished(config, state):
            now += pause
    return rates, state


@given(
    st.lists(st.floats(0.1, 2.0), min_size=1, max_size=7), st.floats(0.0, 5.0), st.integers(1, 50),
    st.sampled_from(["cosine", "linear", "wsd"]),
)  # fmt: skip
def test_run_ends_in_time_with_its_rate_at_the_floor_and_wastes_little(durations, pause, every, kind):
    config = configuration("5m", every, type=kind, final_share=0.1)
    rates, state = simulate(config, durations, pause)
    assert rates[-1] == pytest.approx(0.1)
    assert state.seconds + pause <= 300 + 1e-9  # there is time for the evaluation and the save at the end
    assert state.seconds + 2 * pause + max(durations) > 300
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("floor", [0.0, 0.2])
def test_linear_schedule_falls_with_the_share_of_the_time_as_in_the_paper(floor):
    """Izsak et al. 2021: linearly to zero over the time budget, whatever a step takes."""
    config = configuration("24h", type="linear", final_share=floor)
    for hours in (0, 3, 12, 23.9):
        state = TrainState(step=5, seconds=3600 * hours)
        assert rate(config, state) == pytest.approx(floor + (1 - floor) * (1 - hours / 24), abs=1e-5)


def test_warmup_and_inverse_sqrt_count_steps_whatever_the_budget():
    config = configuration("1h", type="linear", warmup_steps=100, final_share=0.0)
    assert rate(config, TrainState(step=49, seconds=600)) == pytest.approx(0.5)
    config = configuration("1h", type="inverse_sqrt", warmup_steps=100)
    assert rate(config, TrainState(step=399, seconds=1800)) == pytest.approx(0.5)


def test_wsd_falls_over_the_last_tenth_of_the_time():
    config = configuration("100m", type="wsd", final_share=0.0)
    rates = [rate(config, TrainState(step=7, seconds=60.0 * minute)) for minute in (0, 89, 95, 99)]
    assert rates == pytest.approx([1.0, 1.0, 0.5, 0.1], abs=1e-4)


def test_steps_lead_where_they_are_further_than_the_time():
    config = configuration("24h", num_steps=101, type="linear", final_share=0.0)
    assert rate(config, TrainState(step=50, seconds=3600)) == pytest.approx(0.5)
    assert budget.is_finished(config, TrainState(step=101, seconds=7200))


def test_time_that_is_suddenly_over_leaves_one_step_which_is_at_the_floor():
    config = configuration("10m", type="linear", final_share=0.1)
    state = TrainState(step=50, seconds=400, step_seconds=1.0, end_seconds=5.0, time_share=0.66)
    late = budget.at(config, replace(state, step=51), [599.0, 199.0, 5.0], budget.time_share(config, state))
    assert late.time_share < 0.7 and not budget.is_finished(config, late)
    assert rate(config, late) == pytest.approx(0.1)
    assert budget.is_finished(config, budget.at(config, replace(late, step=52), [600.0, 199.0, 5.0], 1.0))


def test_without_a_budget_the_time_changes_nothing():
    config = configuration(None, num_steps=100)
    state = TrainState(step=50, seconds=1e9, step_seconds=5, end_seconds=7)
    assert budget.time_share(config, state) == 0.0 and not budget.is_finished(config, state)
    assert budget.at(config, state, [2e9, 9.0, 9.0], 0.0) == replace(state, seconds=2e9)


def test_clock_counts_what_earlier_starts_of_the_run_have_spent_and_foresees_pauses(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(budget.time, "monotonic", lambda: now)
    earlier = TrainState(step=30, seconds=50.0, step_seconds=9.0, end_seconds=2.0)
    clock = budget.start_clock(configuration("1h"), 990.0, earlier)  # ten seconds to start
    now = 1001.0
    assert clock.read(1.0, 0.0) == [61.0, 1.0, 2.0]
    now = 1009.0  # five seconds of evaluation, then a step of three
    assert clock.read(3.0, 0.5) == [69.0, 3.0, 5.5]


@pytest.mark.parametrize(("text", "seconds"), [("24h", 86400), ("90m", 5400), ("3600s", 3600), ("1.5d", 129600)])
def test_budget_has_a_unit(text, seconds):
    assert configuration(text).train.budget_seconds == seconds


def test_finished_run_is_over_and_goes_on_with_its_rate_up_when_it_is_given_more():
    config, more = (configuration(f"{minutes}m", type="linear", final_share=0.0) for minutes in (10, 20))
    end = TrainState(step=99, seconds=595.0, step_seconds=1.0, end_seconds=4.5, time_share=1.0)
    assert budget.is_finished(config, end)
    assert not budget.is_finished(more, end) and rate(more, end) == pytest.approx(0.5, abs=0.01)


@pytest.mark.slow
@pytest.mark.distributed
def test_run_on_two_ranks_ends_in_time_also_over_a_stop_and_its_steps_can_be_made_again(tmp_path):
    config, run_dir = make_config(tmp_path), tmp_path / "run"
    settings = ["train.schedule={type: linear, final_share: 0.1, warmup_steps: 3}", "checkpoint.every_steps=20"]
    settings.append("train.budget=10s")
    process = start(config, run_dir, *settings)
    wait_until(has_reached(run_dir, 5), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    stopped, before = lines_of(run_dir), newest_state(run_dir)
    assert stopped[-1]["time_share"] == before["time_share"] < 1

    began = time.monotonic()
    process = start(config, run_dir, *settings)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-3000:]
    state, lines = newest_state(run_dir), lines_of(run_dir)
    assert time.monotonic() - began > state["seconds"] - before["seconds"], "the time before the stop counts again"
    foreseen = (
        state["end_seconds"] + state["step_seconds"]
    )  # on a busy machine the next ones may take longer than these
    assert 10 - 2 * foreseen < state["seconds"] < 10 + 2 * foreseen + 1
    assert state["step"] == len(lines) > len(stopped)
    rates = [line["lr"] for line in lines]
    assert rates[3:] == sorted(rates[3:], reverse=True), "the rate rose at the resume"
    assert rates[-1] == pytest.approx(6e-5)

    kept = sorted(int(path.name[5:]) for path in run_dir.glob("checkpoints/step-*"))
    step = min(kept[-2] + 4, kept[-1])
    words = [sys.executable, "-m", "launcher.cli", "replay", str(run_dir), str(step)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    subprocess.run(words, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=120)
    found = json.loads((run_dir / f"replay/step-{step:08d}.json").read_text())
    assert found["losses"]["loss"] == found["in_metrics"]["loss"] == lines[step - 1]["loss"]


def lines_of(run_dir: Path) -> list[dict]:
    """Of steps in metrics.jsonl."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "lr" in line]


def newest_state(run_dir: Path) -> dict:
    newest = max(run_dir.glob("checkpoints/step-*/manifest.json"))
    return json.loads(newest.read_text())["state"]
