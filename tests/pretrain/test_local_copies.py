"""Checkpoints on a disk of the node: there first, in the run directory when it comes to it, and back after a kill."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
import torch

from configs.phases import no_mark
from configs.schema import CheckpointConfig
from pretrain import checkpoint, local_copies, saver
from pretrain.checkpoint import CheckpointError, Fragment
from pretrain.saver import open_saver
from pretrain.state import TrainState
from tests.pretrain.test_train import config, lines, pretrain, words  # noqa: F401
from tests.ranks import finish, start_ranks


class Alone:
    """A group of one, without a process group."""

    rank, world_size, local_rank, is_first = 0, 1, 0, True
    mark = staticmethod(no_mark)

    def gather(self, value):
        return [value]

    def any(self, *flags):
        return list(flags)

    def barrier(self):
        pass


@pytest.fixture
def gate(monkeypatch) -> threading.Event:
    """Copying to the run directory waits for it."""
    opened, copy = threading.Event(), saver.copy_file
    monkeypatch.setattr(saver, "copy_file", lambda *given: (opened.wait(30), copy(*given))[1])
    return opened


def opened(tmp_path: Path, **more):
    settings = CheckpointConfig(local_dir=str(tmp_path / "disk"), **more)
    (tmp_path / "run").mkdir(exist_ok=True)
    return open_saver(tmp_path / "run", settings, Alone())


def save(saver, step: int) -> None:
    """Save and go on until the checkpoint is on the node's disk."""
    saver.save(TrainState(step, step), [Fragment("w", (5,), 0, {"master": torch.full((5,), float(step))})], {})
    while saver.flags[0]:
        pass
    saver.hear(*saver.flags)


def near(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.glob("disk/run-*/checkpoints/*"))


def far(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step-*"))


def newest(tmp_path: Path, said: list[str] | None = None) -> checkpoint.Checkpoint | None:
    run_dir, say = tmp_path / "run", (said if said is not None else []).append
    found = checkpoint.newest_valid(run_dir, say)
    return local_copies.bring_newer(str(tmp_path / "disk"), run_dir, found, say, Alone())


def test_saves_do_not_wait_for_the_run_directory_which_gets_the_newest_when_it_is_ready(tmp_path, gate):
    with opened(tmp_path) as saver:
        for step in (1, 2, 3):
            save(saver, step)
            assert f"step-{step:08d}" in near(tmp_path) and far(tmp_path) == []
        assert near(tmp_path) == ["step-00000001", "step-00000003"]  # the first is on its way
        gate.set()
    assert far(tmp_path) == ["step-00000001", "step-00000003"]
    assert checkpoint.weights(checkpoint.newest_valid(tmp_path / "run"))("w").tolist() == [3.0] * 5


def test_checkpoint_that_is_never_to_be_removed_is_not_passed_over(tmp_path, gate):
    threading.Timer(0.2, gate.set).start()
    with opened(tmp_path, keep_every_steps=2) as saver:
        for step in (1, 2, 3):
            save(saver, step)
    assert far(tmp_path) == ["step-00000001", "step-00000002", "step-00000003"]


def test_node_keeps_the_last_one_only(tmp_path):
    for steps in ((1, 2), (3, 4)):
        with opened(tmp_path) as saver:
            for step in steps:
                save(saver, step)
                saver.finish()
    assert near(tmp_path) == ["step-00000004"]


def test_what_was_not_copied_before_a_kill_is_copied_at_the_next_start(tmp_path, gate):
    with pytest.raises(KeyError), opened(tmp_path) as saver:
        save(saver, 1)
        gate.set()
        saver.finish()
        gate.clear()
        save(saver, 2)
        raise KeyError
    assert far(tmp_path) == ["step-00000001"]
    assert newest(tmp_path).path == tmp_path / "run/checkpoints/step-00000002"
    assert checkpoint.newest_valid(tmp_path / "run").step == 2


def test_newer_one_in_the_run_directory_is_used(tmp_path):
    with opened(tmp_path) as saver:
        save(saver, 1)
    with open_saver(tmp_path / "run", CheckpointConfig(), Alone()) as saver:
        save(saver, 2)
    assert newest(tmp_path).step == 2


@pytest.mark.parametrize("damage", ["alter", "cut", "remove", "manifest"])
def test_damaged_copy_of_the_node_is_not_used(tmp_path, damage):
    with opened(tmp_path) as saver:
        save(saver, 1)
        saver.finish()
        save(saver, 2)
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000002")
    (path,) = tmp_path.glob("disk/run-*/checkpoints/step-00000002")
    file = path / ("manifest.json" if damage == "manifest" else "rank-00000.safetensors")
    content = file.read_bytes()
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(content[:-1] if damage == "cut" else content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    said: list[str] = []
    assert newest(tmp_path, said).step == 1
    assert damage == "manifest" or "step-00000002 in checkpoint.local_dir" in said[-1]


def test_file_that_was_damaged_on_the_node_is_not_copied(tmp_path, gate):
    with (
        pytest.raises(CheckpointError, match=r"rank 0 could not write .*is damaged .*Earlier checkpoints are un"),
        opened(tmp_path) as saver,
    ):
        save(saver, 1)
        (file,) = tmp_path.glob("disk/run-*/checkpoints/step-00000001/rank-*")
        file.write_bytes(file.read_bytes()[:-1] + b"!")
        gate.set()
        saver.finish()
    assert far(tmp_path) == []


def test_run_begun_anew_does_not_find_what_the_one_before_has_left_on_the_node(tmp_path):
    with opened(tmp_path) as saver:
        save(saver, 1)
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").mkdir()
    assert newest(tmp_path) is None


NODES = """
import os, sys
from pretrain import train
sys.argv.append(f"checkpoint.local_dir={sys.argv.pop()}/node-{os.environ['RANK']}")
os.environ["LOCAL_RANK"] = "0"  # each rank is the only one of a node
train.runtime.run(train.main)
"""


@pytest.mark.distributed
@pytest.mark.parametrize("config", ["gpt"], indirect=True)
def test_two_nodes_have_a_checkpoint_between_them_and_one_alone_has_not(config):  # noqa: F811
    run_dir, disk = config.parent / "nodes", config.parent / "disk"
    command = ["-c", NODES, *words(config, run_dir)[2:], str(disk)]
    whole = pretrain(config, "without-nodes", 2)
    assert finish(start_ranks(2, command, config.parent / "nodes-logs")) == [0, 0]
    assert lines(run_dir) == lines(whole)
    for rank in (0, 1):
        (path,) = (disk / f"node-{rank}").glob("nodes-*/checkpoints/*")
        assert sorted(file.name for file in path.iterdir()) == ["manifest.json", f"rank-{rank:05d}.safetensors"]
        assert path.name == "step-00000008"

    log = config.parent / "nodes-logs/rank-0.log"
    shutil.rmtree(run_dir / "checkpoints/step-00000008")
    assert finish(start_ranks(2, command, log.parent)) == [0, 0]
    assert "copying step-00000008 in checkpoint.local_dir" in log.read_text()
    weights = "checkpoints/step-00000008/rank-00001.safetensors"
    assert (run_dir / weights).read_bytes() == (whole / weights).read_bytes()

    shutil.rmtree(run_dir / "checkpoints/step-00000008")
    shutil.rmtree(disk / "node-1")
    assert finish(start_ranks(2, command, log.parent)) == [0, 0]
    assert "step-00000008 in checkpoint.local_dir: no node that is here has rank-00001.safetensors" in log.read_text()
    assert f"going on from {run_dir}/checkpoints/step-00000006" in log.read_text()
    assert lines(run_dir) == lines(whole)
