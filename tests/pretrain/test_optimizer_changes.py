"""Another optimizer is refused by name; the average of the weights may come and go."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from configs.schema import CheckpointConfig, OptimizerConfig
from pretrain import checkpoint
from pretrain.checkpoint import Checkpoint, CheckpointError, Fragment
from pretrain.optimizer_changes import optimizer_facts, state_reader
from pretrain.saver import open_saver
from pretrain.state import TrainState
from tests.pretrain.test_checkpoint import Alone
from tests.pretrain.test_objective import metrics, small_run, words, write_random_tokens
from tests.ranks import finish, run_ranks, start_ranks


def saved(run_dir: Path, config: OptimizerConfig, *keys: str) -> Checkpoint:
    """A checkpoint with a parameter `w` that is 0, 1, ..., 9, and each further tensor 100 more than the one before."""
    tensors = {key: torch.arange(10.0) + 100 * number for number, key in enumerate(("master", *keys))}
    with open_saver(run_dir, CheckpointConfig(), Alone()) as saver:
        saver.save(TrainState(5), [Fragment("w", (10,), 0, tensors)], optimizer_facts(config))
    return checkpoint.open_checkpoint(run_dir / "checkpoints/step-00000005")


def test_another_type_is_refused_even_where_the_names_of_the_state_are_the_same(tmp_path):
    found = saved(tmp_path, OptimizerConfig(type="adamw"), "exp_avg", "exp_avg_sq")
    checkpoint.check_facts(found, optimizer_facts(OptimizerConfig(type="adamw")))
    with pytest.raises(
        CheckpointError, match=r"was written with optimizer.type=adamw, now it is lamb; the optimizer's"
    ):
        checkpoint.check_facts(found, optimizer_facts(OptimizerConfig(type="lamb")))


def test_settings_of_the_next_update_may_change(tmp_path):
    found = saved(tmp_path, OptimizerConfig(lr=1e-3, betas=(0.9, 0.95)))
    changed = OptimizerConfig(lr=1e-4, betas=(0.8, 0.99), weight_decay=0.5, grad_clip=0.1, ema_decay=0.9)
    checkpoint.check_facts(found, optimizer_facts(changed))


def test_checkpoint_that_does_not_say_its_optimizer_is_taken(tmp_path):
    with open_saver(tmp_path, CheckpointConfig(), Alone()) as saver:
        saver.save(TrainState(5), [Fragment("w", (1,), 0, {"master": torch.ones(1)})], {})
    found = checkpoint.open_checkpoint(tmp_path / "checkpoints/step-00000005")
    checkpoint.check_facts(found, optimizer_facts(OptimizerConfig()))


def test_average_that_is_switched_on_begins_as_the_weights_and_says_so(tmp_path):
    said: list[str] = []
    found = saved(tmp_path, OptimizerConfig(), "exp_avg")
    read = state_reader(found, OptimizerConfig(ema_decay=0.9), said.append)
    assert read("w", "ema", 3, 2).tolist() == [3, 4] and read("w", "exp_avg", 3, 2).tolist() == [103, 104]
    assert len(said) == 1 and "it begins as the weights of now" in said[0]


def test_average_that_is_switched_off_is_left_behind_and_says_so(tmp_path):
    said: list[str] = []
    read = state_reader(saved(tmp_path, OptimizerConfig(), "ema"), OptimizerConfig(), said.append)
    assert read("w", "master", 3, 2).tolist() == [3, 4]
    assert len(said) == 1 and "is not kept any longer" in said[0]


def test_average_that_stays_is_read_without_a_word(tmp_path):
    config = OptimizerConfig(ema_decay=0.9)
    read = state_reader(saved(tmp_path, config, "ema"), config, pytest.fail)
    assert read("w", "ema", 3, 2).tolist() == [103, 104]


@pytest.mark.slow
@pytest.mark.distributed
def test_run_goes_on_with_and_without_an_average_and_not_with_another_optimizer(tmp_path):
    write_random_tokens(tmp_path / "data")
    config = small_run(tmp_path, {"dir": str(tmp_path / "data")}, {"optimizer": {"lr": 0.01}}, {})
    run_dir, logs = tmp_path / "run", tmp_path / "logs"
    run_ranks(1, words(config, run_dir, "train.num_steps=2"), logs)
    assert finish(start_ranks(1, words(config, run_dir, "train.optimizer.type=lamb"), tmp_path / "lamb")) == [2]
    assert "was written with optimizer.type=adamw, now it is lamb" in (tmp_path / "lamb/rank-0.log").read_text()
    run_ranks(1, words(config, run_dir, "train.num_steps=4", "train.optimizer.ema_decay=0.9"), logs)
    at_4 = metrics(run_dir)[-1]
    assert math.isfinite(at_4["eval_ema_loss"]) and at_4["eval_ema_loss"] != at_4["eval_loss"]
    run_ranks(1, words(config, run_dir), logs)
    at_6 = metrics(run_dir)[-1]
    assert at_6["step"] == 6 and "eval_ema_loss" not in at_6
    said = (logs / "rank-0.log").read_text()
    assert "it begins as the weights of now" in said and "is not kept any longer" in said
