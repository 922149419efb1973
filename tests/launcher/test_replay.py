"""`millstream replay`: which run, which folder, how many ranks; what it shows is in tests/pretrain/test_guard.py."""

from __future__ import annotations

import json

import pytest

from configs.load import ConfigError
from launcher.replay import folder_of_step, ranks_of, replay


def write(path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def test_step_that_is_none_of_the_run_and_place_that_is_no_run_are_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("run_dir: elsewhere\ntrain: {num_steps: 8}\n")
    for step in ("0", "9", "five"):
        with pytest.raises(ConfigError, match=r"expected a number from 1 to train.num_steps=8"):
            replay(str(tmp_path), step, [], None)
    with pytest.raises(ConfigError, match=r"nowhere: no run directory"):
        replay(str(tmp_path / "nowhere"), "1", [], None)


def test_only_the_step_at_which_the_guard_stopped_is_taken_from_what_it_left(tmp_path):
    assert folder_of_step(tmp_path, 5) == tmp_path
    write(tmp_path / "stopped/batch/batch.json", {"step": 4})
    assert folder_of_step(tmp_path, 5) == tmp_path / "stopped"
    assert folder_of_step(tmp_path, 4) == tmp_path


def test_as_many_ranks_as_wrote_the_newest_checkpoint_before_the_step(tmp_path):
    assert ranks_of(tmp_path, 5) is None
    for step, num_ranks in ((2, 4), (4, 2), (6, 1)):
        write(
            tmp_path / f"checkpoints/step-{step:08d}/manifest.json",
            {"files": dict.fromkeys(map(str, range(num_ranks)))},
        )
    assert [ranks_of(tmp_path, step) for step in (2, 3, 5, 7)] == [None, 4, 2, 1]
