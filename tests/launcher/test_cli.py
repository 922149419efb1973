"""The `millstream` command as users type it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from launcher import cli
from tests.conftest import ROOT

NANO = str(ROOT / "configs/gpt/nano.yaml")


def run(*words: str, **settings) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, **settings)


def test_help_answers_within_0_3_seconds():
    run("--help")  # fills the page cache
    best = 1e9
    for _ in range(5):
        began = time.perf_counter()
        result = run("--help")
        best = min(best, time.perf_counter() - began)
    assert result.returncode == 0 and "usage: millstream VERB CONFIG" in result.stdout
    assert best < 0.3


def test_config_shows_value_and_origin():
    lines = run("config", NANO, "train", "train.num_steps=70").stdout.splitlines()
    shown = {line.split()[0]: line for line in lines}
    assert shown["train.num_steps"].split()[1:] == ["70", "command", "line"]
    assert shown["train.seq_len"].split()[2].startswith(NANO + ":")
    assert shown["train.seed"].split()[1:] == ["1234", "default"]
    assert all(key.startswith("train.") for key in shown)


def test_config_prints_the_deepspeed_json_for_any_number_of_ranks():
    json_of = {n: json.loads(run("config", NANO, "--deepspeed", "--ranks", n).stdout) for n in ("1", "2")}
    assert json_of["1"]["gradient_accumulation_steps"] == 2 * json_of["2"]["gradient_accumulation_steps"]
    assert json_of["1"]["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pretrian", NANO], "not understood: millstream pretrian"),
        (["pretrain"], "not understood: millstream pretrain"),
        (["pretrain", "none.yaml"], "none.yaml: no such file"),
        (["pretrain", NANO, "train.num_step=1"], "did you mean `train.num_steps`?"),
        (["pretrain", NANO, "--ranks", "two"], "--ranks two: expected a number of processes"),
        (["finetune", NANO], "has no key `task`"),
        (["pretrain", str(ROOT / "configs/finetune/docstrings.yaml")], "has the key `task`"),
        (["config", NANO, "train.seqlen"], "no key `train.seqlen`; did you mean `train.seq_len`?"),
        (["config", NANO, "--json"], "unknown flag --json"),
        (["export", "nowhere"], "nowhere: is not a run directory"),
        (["data", "build", NANO, "data.build.sources=[none.txt]"], "none.txt: no such file or folder"),
    ],
)
def test_mistake_is_named_without_a_traceback(words, expected):
    result = run(*words)
    assert result.returncode != 0
    assert expected in result.stderr
    assert "Traceback" not in result.stderr


def test_number_of_ranks_is_not_asked_for_where_mpirun_has_started_them():
    of_mpirun = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}
    result = run("pretrain", NANO, "--ranks", "2", "run_dir=/dev/null/unused", env=os.environ | of_mpirun)
    assert result.returncode == 2 and "--ranks 2: what has started this process says how many" in result.stderr


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "hosts: cannot be read"),
        ("# none\n", "hosts: names no host"),
        ("h1 slot=2\n", "hosts:1: found `h1 slot=2`, expected `NAME slots=N`"),
        ("h1 slots=2\nh1 slots=1\n", "hosts:2: host h1 for the second time"),
    ],
)
@pytest.mark.parametrize("launcher", ["ssh", "pdsh"])
def test_hostfile_that_says_nothing_is_an_error_and_no_run_on_this_machine(tmp_path, content, expected, launcher):
    if content is not None:
        (tmp_path / "hosts").write_text(content)
    words = ["--hosts", str(tmp_path / "hosts"), "--launcher", launcher, f"run_dir={tmp_path / 'run'}"]
    result = run("pretrain", NANO, *words)
    assert result.returncode == 2 and expected in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--hosts"], "--hosts: expected a hostfile after it"),
        (["--launcher", "pdsh"], "--launcher pdsh: on which hosts? give --hosts FILE too"),
        (["--hosts", "x", "--launcher", "psdh"], "--launcher psdh: expected one of ssh, pdsh, openmpi, mpich, impi"),
    ],
)
def test_flags_of_several_machines_are_checked(words, expected):
    result = run("pretrain", NANO, *words)
    assert result.returncode == 2 and expected in result.stderr


def test_package_of_another_distribution_is_noticed(tmp_path, monkeypatch):
    foreign = tmp_path / "finetune"
    foreign.mkdir()
    (foreign / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "finetune"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit, match="another distribution installed one of that name"):
        cli.check_packages()
