"""Checkpoints on disk: whole or absent, damage named, a full disk survived, any slicing read back."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path

import pytest
import torch

from configs.phases import no_mark
from configs.schema import CheckpointConfig
from pretrain import checkpoint
from pretrain.checkpoint import CheckpointError, Fragment
from pretrain.saver import open_saver
from pretrain.state import TrainState


class Alone:
    """A group of one, without a process group."""

    rank, world_size, is_first = 0, 1, True
    mark = staticmethod(no_mark)

    def gather(self, value):
        return [value]

    def barrier(self):
        pass


def pieces(size: int = 10, value: float = 0.0) -> list[Fragment]:
    numbers = torch.arange(size, dtype=torch.float32) + value
    return [Fragment("w", (size,), 0, {"master": numbers, "exp_avg": numbers * 2, "exp_avg_sq": numbers * 3})]


def save(run_dir: Path, step: int, eval_loss: float | None = None, **more) -> Path:
    state = TrainState(step, step, eval_loss=eval_loss)
    with open_saver(run_dir, CheckpointConfig(keep_last=100), Alone()) as saver:
        saver.save(state, pieces(**more), {"seed": 1})
    return run_dir / "checkpoints" / f"step-{step:08d}"


def test_any_slice_of_any_tensor_reads_back(tmp_path):
    read = checkpoint.reader(checkpoint.open_checkpoint(save(tmp_path, 5)))
    assert read("w", "master", 3, 4).tolist() == [3, 4, 5, 6]
    assert read("w", "exp_avg_sq", 9, 1).tolist() == [27]
    with pytest.raises(CheckpointError, match="has no parameter `v`; the model section"):
        read("v", "master", 0, 1)


def steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").iterdir())


def test_newest_valid_is_found_and_old_ones_are_removed(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert checkpoint.newest_valid(tmp_path).step == 3
    checkpoint.remove_old(tmp_path, 3, CheckpointConfig(keep_last=2))
    assert steps(tmp_path) == [2, 3]


def test_multiples_and_the_best_stay_beside_the_newest(tmp_path):
    for step, loss in enumerate([5.0, 2.0, 3.0, 2.5, None, float("nan"), 4.0, 4.0], 1):
        save(tmp_path, step, eval_loss=loss)
    checkpoint.remove_old(tmp_path, 8, CheckpointConfig(keep_last=1, keep_every_steps=5, keep_best=2))
    assert steps(tmp_path) == [2, 4, 5, 8]


def test_of_checkpoints_with_the_same_evaluation_the_one_next_to_it_is_the_best():
    assert checkpoint.kept([6, 9, 12], {6: 2.0, 9: 2.0, 12: 3.0}, CheckpointConfig(keep_last=1, keep_best=1)) == {6, 12}


def test_damaged_checkpoint_of_a_later_step_does_not_count_as_the_newest(tmp_path):
    for step in (1, 2, 9):
        save(tmp_path, step)
    (tmp_path / "checkpoints/step-00000009/manifest.json").write_text("{}")
    checkpoint.remove_old(tmp_path, 2, CheckpointConfig(keep_last=1))
    assert steps(tmp_path) == [2, 9]
    assert checkpoint.newest_valid(tmp_path, lambda text: None).step == 2


def test_any_flipped_bit_of_any_file_is_detected(tmp_path):
    path = save(tmp_path, 1)
    rng = random.Random(0)
    for file in path.iterdir():
        content = file.read_bytes()
        for bit in {0, 8 * len(content) - 1, *(rng.randrange(8 * len(content)) for _ in range(500))}:
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            file.write_bytes(flipped)
            with pytest.raises(CheckpointError, match="step-00000001"):
                checkpoint.open_checkpoint(path)
        file.write_bytes(content)
    assert checkpoint.open_checkpoint(path).step == 1


def test_edited_manifest_is_named(tmp_path):
    manifest = save(tmp_path, 1) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"seed": 1', '"seed": 2'))
    with pytest.raises(CheckpointError, match=r"manifest.json is damaged or was edited \(its checksum does not fit\)"):
        checkpoint.open_checkpoint(manifest.parent)


def test_manifest_says_which_tensors_there_are(tmp_path):
    (piece,) = checkpoint.open_checkpoint(save(tmp_path, 1)).pieces["w"]
    assert piece["keys"] == ["master", "exp_avg", "exp_avg_sq"]


@pytest.mark.parametrize("damage", ["truncate", "alter", "remove", "manifest", "no manifest"])
def test_damage_of_any_kind_is_named_and_the_one_before_is_used(tmp_path, damage):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    file, manifest = newest / "rank-00000.safetensors", newest / "manifest.json"
    content = file.read_bytes()
    if damage == "truncate":
        file.write_bytes(content[:-1])
    elif damage == "alter":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "remove":
        file.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:50])
    else:
        manifest.unlink()
    said: list[str] = []
    assert checkpoint.newest_valid(tmp_path, said.append).step == 1
    assert len(said) == 1 and str(newest) in said[0] and "going back to an earlier checkpoint" in said[0]
    assert newest.is_dir()


def test_directory_left_by_a_crash_is_no_checkpoint_and_is_cleared_later(tmp_path):
    save(tmp_path, 1)
    leftover = tmp_path / "checkpoints/.writing-step-00000002"
    leftover.mkdir()
    assert checkpoint.newest_valid(tmp_path).step == 1
    checkpoint.remove_leftovers(tmp_path)
    assert not leftover.exists()


def test_checkpoint_of_a_later_format_is_refused(tmp_path):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99 is not the 3 this version reads"):
        checkpoint.open_checkpoint(path)


def test_same_step_saved_again_replaces_the_first(tmp_path):
    save(tmp_path, 1)
    path = save(tmp_path, 1, value=100.0)
    assert checkpoint.weights(checkpoint.open_checkpoint(path))("w")[0] == 100


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_full_disk_is_named_and_earlier_checkpoints_stay(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.decode().strip()}")
    try:
        save(tmp_path, 1)
        with pytest.raises(CheckpointError, match=r"rank 0 could not write .*Earlier checkpoints are untouched"):
            save(tmp_path, 2, size=100_000)
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
        assert checkpoint.newest_valid(tmp_path).step == 1
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_checkpoints_hold_no_pickle(tmp_path):
    path = save(tmp_path, 1)
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "rank-00000.safetensors"]


def test_facts_that_changed_or_are_missing_are_named(tmp_path):
    found = checkpoint.open_checkpoint(save(tmp_path, 5))
    checkpoint.check_facts(found, {"seed": 1})
    with pytest.raises(CheckpointError, match=r"step-00000005: was written with seed=1, now it is 2; the order of"):
        checkpoint.check_facts(found, {"seed": 2})
    with pytest.raises(CheckpointError, match=r"does not say what packing was, now it is best_fit: written without"):
        checkpoint.check_facts(found, {"seed": 1, "packing": "best_fit"})
    with pytest.raises(CheckpointError, match=r"was written with seed=1, now it is None"):
        checkpoint.check_facts(found, {})


class Group:
    """One rank of a group whose other ranks do what this one does, seen from `rank`."""

    is_first = False

    def __init__(self, rank: int, world_size: int, others: list[str]):
        self.rank, self.world_size, self.others = rank, world_size, others

    def gather(self, value):
        return [*self.others, value] if isinstance(value, str | None) else [value]


def test_other_parameters_than_the_models_are_named(tmp_path):
    found = checkpoint.open_checkpoint(save(tmp_path, 5))
    checkpoint.check_parameters(found, {"w": (10,)})
    with pytest.raises(CheckpointError, match=r"has 10 as parameter `w`, the model has 5 x 2: the model section"):
        checkpoint.check_parameters(found, {"w": (5, 2)})
    with pytest.raises(CheckpointError, match=r"has nothing as parameter `v`, the model has 3"):
        checkpoint.check_parameters(found, {"w": (10,), "v": (3,)})
    with pytest.raises(CheckpointError, match=r"has 10 as parameter `w`, the model has nothing"):
        checkpoint.check_parameters(found, {})


def test_state_that_the_optimizer_keeps_and_the_checkpoint_has_not_is_named(tmp_path):
    read = checkpoint.reader(checkpoint.open_checkpoint(save(tmp_path, 5)))
    with pytest.raises(CheckpointError, match=r"has no `momentum` of parameter `w`.*train.optimizer is not what"):
        read("w", "momentum", 0, 1)


def test_ranks_share_the_hashing_and_hear_of_what_another_found(tmp_path):
    path = save(tmp_path, 1)
    file = path / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.open_checkpoint(path, Group(0, 2, []))
    assert checkpoint.open_checkpoint(path, Group(1, 2, [])).step == 1  # the only file is the first rank's to hash
    with pytest.raises(CheckpointError, match="what rank 0 found"):
        checkpoint.open_checkpoint(path, Group(1, 2, ["what rank 0 found"]))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="bytes, the manifest says"):  # sizes are looked at by every rank
        checkpoint.open_checkpoint(path, Group(1, 2, []))
