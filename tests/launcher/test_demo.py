"""The demo: steps that are done are not done again, and the whole of it shows what it promises."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from rich.console import Console

from configs.load import ConfigError
from launcher.demo import StepFailed, Steps, check_file
from tests.conftest import ROOT


@pytest.fixture
def step(tmp_path):
    """Run a step that copies `in` to `out/copy` through Python's json tool."""
    (tmp_path / "in").write_text("[1]")

    def run(indent: int = 2) -> str:
        console = Console(record=True, quiet=False, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
        out = tmp_path / "out"
        words = ["-m", "json.tool", f"--indent={indent}", str(tmp_path / "in"), str(tmp_path / "copy")]
        Steps(tmp_path, console)("copy", words, [tmp_path / "in"], tmp_path / "copy", out)
        return console.export_text()

    return run


def test_finished_step_is_not_run_again(step):
    assert "already done" not in step()
    assert "already done" in step()


def test_step_is_run_again_when_its_input_words_or_result_change(step, tmp_path):
    step()
    (tmp_path / "in").write_text("[1, 2]")
    assert "already done" not in step()
    assert "already done" not in step(indent=4)
    (tmp_path / "copy").unlink()
    assert "already done" not in step(indent=4)


def test_directory_begun_with_other_inputs_is_removed_and_with_the_same_is_kept(step, tmp_path):
    (tmp_path / "in").write_text("{broken")
    with pytest.raises(StepFailed, match=r"step 1 \(copy\) ended with exit code 1"):
        step()
    (tmp_path / "out").mkdir()
    with pytest.raises(StepFailed):
        step()
    assert (tmp_path / "out").exists()  # interrupted: it goes on
    (tmp_path / "in").write_text("[3]")
    step()
    assert not (tmp_path / "out").exists()


def test_text_that_does_not_exist_is_named():
    with pytest.raises(ConfigError, match=r"TEXT: nothing.txt: no such file; give files like"):
        check_file("nothing.txt")


@pytest.mark.slow
@pytest.mark.distributed
def test_pretraining_shows_as_a_gain_larger_than_the_spread_over_the_seeds():
    done = subprocess.run([sys.executable, "-m", "launcher.demo"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    words = " ".join(done.stdout.split())
    verdict = re.search(r"gained (\d+\.\d) points of accuracy, more than the largest spread over 3 seeds", words)
    assert verdict and float(verdict[1]) > 5, words[-1500:]
