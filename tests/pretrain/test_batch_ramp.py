"""A run whose global batch grows: the same samples in the same order, exactly resumed, on any number of ranks."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

from tests.pretrain.test_objective import metrics, small_run, words, write_random_tokens
from tests.ranks import finish, kill_when, run_ranks, start_ranks

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

SIZES = [8, 8, 8, 16, 16, 24, 24, 24, 24, 24]  # steps of 0, 8, 16 samples seen, then 24, 40, then 56 and more
RAMP = {"start_size": 8, "increment": 8, "num_samples": 48}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ramp")
    write_random_tokens(folder / "data")
    train = {"num_steps": 10, "global_batch_size": 24, "batch_ramp": RAMP, "precision": "fp32"}
    train |= {"optimizer": {"lr": 0.01}, "schedule": {"warmup_steps": 2}}
    return small_run(folder, {"dir": str(folder / "data")}, train, {"persistence_threshold": 100})


@pytest.fixture(scope="module")
def whole(config) -> list[dict]:
    run_ranks(2, words(config, config.parent / "whole", "checkpoint.every_steps=2"), config.parent / "whole-logs")
    return metrics(config.parent / "whole")


def test_steps_have_the_tokens_of_their_size(whole):
    tokens = [line["tokens"] for line in whole if "tokens" in line]
    assert np.diff([0, *tokens]).tolist() == [32 * size for size in SIZES]


def test_one_process_has_the_losses_of_two_ranks(config, whole):
    command = words(config, config.parent / "alone", "train.micro_batch_size=4")
    run_ranks(1, command, config.parent / "alone-logs")
    alone = metrics(config.parent / "alone")
    for name in ("loss", "grad_norm", "eval_loss"):
        values = [[line[name] for line in run if name in line] for run in (alone, whole)]
        np.testing.assert_allclose(*values, rtol=1e-5)


def test_killed_run_resumes_with_bitwise_the_same_metrics_and_another_ramp_is_refused(config, whole):
    run_dir, logs = config.parent / "killed", config.parent / "killed-logs"
    command = words(config, run_dir, "checkpoint.every_steps=2")
    processes = start_ranks(2, command, logs)
    kill_when(processes, lambda: any(run_dir.glob("checkpoints/step-*/manifest.json")), signal.SIGKILL)
    other = "train.batch_ramp={start_size: 8, increment: 8, num_samples: 50}"
    assert finish(start_ranks(1, words(config, run_dir, other), config.parent / "other-logs")) == [2]
    assert "was written with batch_ramp={" in (config.parent / "other-logs/rank-0.log").read_text()
    run_ranks(2, command, logs)
    assert metrics(run_dir) == whole
