"""Saving in the background: what is saved, when it counts, what a full disk or a kill in the middle of it leaves."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from configs.phases import no_mark
from configs.schema import CheckpointConfig
from pretrain import checkpoint
from pretrain import saver as saver_module
from pretrain.checkpoint import CheckpointError, Fragment
from pretrain.saver import open_saver, write_safetensors
from pretrain.state import TrainState
from tests.pretrain.test_train import config, lines, pretrain, words  # noqa: F401
from tests.ranks import kill_when, start_ranks


class Alone:
    """A group of one, without a process group."""

    rank, world_size, is_first = 0, 1, True
    mark = staticmethod(no_mark)

    def gather(self, value):
        return [value]

    def barrier(self):
        pass


class BesideAFailure(Alone):
    """The first of two ranks; the other one's write fails."""

    def gather(self, value):
        return [value, ("rank-00001.safetensors", None, {}, "OSError: no room") if isinstance(value, tuple) else None]


def fragment(tensor: torch.Tensor) -> list[Fragment]:
    return [Fragment("w", (tensor.numel(),), 0, {"master": tensor})]


def steps(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("*"))


def test_what_was_there_at_the_save_is_written_whatever_the_next_step_does(tmp_path):
    weights = torch.arange(10.0)
    with open_saver(tmp_path, CheckpointConfig(), Alone()) as saver:
        saver.save(TrainState(1), fragment(weights), {})
        weights += 100
        saver.save(TrainState(2), fragment(weights), {})
        weights += 100
    for step, first in ((1, 0), (2, 100)):
        found = checkpoint.open_checkpoint(tmp_path / f"checkpoints/step-{step:08d}")
        assert torch.equal(checkpoint.weights(found)("w"), torch.arange(10.0) + first)


def test_checkpoint_exists_only_once_no_rank_writes(tmp_path):
    with open_saver(tmp_path, CheckpointConfig(), Alone()) as saver:
        saver.save(TrainState(1), fragment(torch.ones(5)), {})
        saver.hear(True, False, False)
        assert steps(tmp_path) in ([], [".writing-step-00000001"])
        saver.hear(False, False, False)
        assert steps(tmp_path) == ["step-00000001"]


def test_after_going_back_no_later_checkpoint_is_there_to_resume_from(tmp_path):
    with open_saver(tmp_path, CheckpointConfig(keep_last=9), Alone()) as saver:
        for step in (2, 4, 6, 8):
            saver.save(TrainState(step), fragment(torch.ones(5)), {})
        saver.finish()
        saver.forget_after(4)
        assert steps(tmp_path) == ["step-00000002", "step-00000004"]


def test_save_that_is_due_while_one_goes_on_waits_for_it(tmp_path):
    with open_saver(tmp_path, CheckpointConfig(), Alone()) as saver:
        saver.save(TrainState(1), fragment(torch.ones(5_000_000)), {})
        saver.save(TrainState(2), fragment(torch.ones(5)), {})
        assert "step-00000001" in steps(tmp_path)
    assert steps(tmp_path) == ["step-00000001", "step-00000002"]


def test_wait_for_a_slow_disk_is_counted_once(tmp_path, monkeypatch):
    opened, write = threading.Event(), saver_module.write_safetensors
    monkeypatch.setattr(saver_module, "write_safetensors", lambda *given: (opened.wait(30), write(*given))[1])
    with open_saver(tmp_path, CheckpointConfig(), Alone()) as saver:
        saver.save(TrainState(1), fragment(torch.ones(5)), {})
        assert saver.waits() == {}
        threading.Timer(0.3, opened.set).start()
        saver.save(TrainState(2), fragment(torch.ones(5)), {})
        assert 0.2 < saver.waits()["save_wait_seconds"] < 10
        assert saver.waits() == {}


def test_without_background_the_checkpoint_is_there_at_once(tmp_path):
    with open_saver(tmp_path, CheckpointConfig(background=False), Alone()) as saver:
        saver.save(TrainState(1), fragment(torch.ones(5)), {})
        assert steps(tmp_path) == ["step-00000001"] and saver.flags == (False, False, False)


def test_failed_write_of_another_rank_is_raised_here_too_and_leaves_the_earlier_ones(tmp_path):
    with open_saver(tmp_path, CheckpointConfig(), Alone()) as saver:
        saver.save(TrainState(1), fragment(torch.ones(5)), {})
    with (
        pytest.raises(CheckpointError, match=r"rank 1 could not write its part of the checkpoint \(OSError: no room\)"),
        open_saver(tmp_path, CheckpointConfig(), BesideAFailure()) as saver,
    ):
        saver.save(TrainState(2), fragment(torch.ones(5)), {})
        saver.hear(False, False, True)
    assert steps(tmp_path) == ["step-00000001"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a file that has no room is Linux's")
def test_file_that_does_not_fit_is_noticed(tmp_path):
    (tmp_path / "file").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        write_safetensors(tmp_path / "file", {"w": torch.ones(5)})


def test_error_in_the_run_ends_the_write_without_asking_the_others(tmp_path):
    with pytest.raises(KeyError), open_saver(tmp_path, CheckpointConfig(), Alone()) as saver:
        saver.save(TrainState(1), fragment(torch.ones(5)), {})
        raise KeyError
    assert saver.flags == (False, False, False)
    assert steps(tmp_path) == [".writing-step-00000001"]


def test_file_is_read_by_safetensors_and_has_the_hash_that_is_told(tmp_path):
    tensors = {"a/w": torch.randn(7), "b/w": torch.randn(6_000_000)}
    entry = write_safetensors(tmp_path / "file", tensors)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(tmp_path / "file").items())
    assert entry == {"bytes": (tmp_path / "file").stat().st_size, "xxh3_128": checkpoint.file_hash(tmp_path / "file")}


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("config", ["gpt"], indirect=True)
def test_run_killed_while_it_writes_resumes_bitwise_from_the_last_whole_checkpoint(config):  # noqa: F811
    large = ("model.hidden_size=384", "model.num_heads=6", "model.num_layers=6", "checkpoint.every_steps=2")
    whole = pretrain(config, "large-whole", 2, *large)
    size = (whole / "checkpoints/step-00000006/rank-00000.safetensors").stat().st_size
    assert size > 60e6  # which takes the disk longer than the killer needs

    run_dir = config.parent / "large-killed"
    processes = start_ranks(2, words(config, run_dir, *large), config.parent / "large-logs")
    half = run_dir / "checkpoints/.writing-step-00000004/rank-00000.safetensors"
    kill_when(processes, half.exists, signal.SIGKILL)
    assert half.stat().st_size < size
    assert steps(run_dir) == [".writing-step-00000004", "step-00000002"]

    pretrain(config, "large-killed", 2, *large)
    assert "step-00000002" in (config.parent / "large-killed-logs/rank-0.log").read_text()
    assert lines(run_dir) == lines(whole)
    last = "checkpoints/step-00000008/rank-00001.safetensors"
    assert (run_dir / last).read_bytes() == (whole / last).read_bytes()
    assert not list((run_dir / "checkpoints").glob(".*"))
