"""`millstream doctor`: its words, its commands, how answers become findings, and a real run on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import ConfigError
from launcher.doctor import Answers, Where, commands, judge, parse, read_answers
from tests.conftest import ROOT

REQUEST = {"folder": "/runs", "cache": "~/.cache", "hosts": ["h1", "h2"], "packages": [], "token": "t"}


def test_words_say_which_hosts_and_which_folder(tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("h1 slots=8\nh2 slots=8\n")
    assert parse([]) == Where("local", Path.cwd())
    assert parse([str(tmp_path)]) == Where("local", tmp_path)
    assert parse(["--hosts", str(hostfile), "/runs"]) == Where("hosts", Path("/runs"), ("h1", "h2"))


def test_options_of_srun_are_told_from_the_folder_by_their_dash(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    found = parse(["--slurm", "--nodes=2", "/runs", "-pgpu"])
    assert found == Where("slurm", Path("/runs"), (), ("--nodes=2", "-pgpu"))
    with pytest.raises(ConfigError, match="one word each, as --nodes=2"):
        parse(["--slurm", "-N", "2", "/runs"])
    (command,) = commands(found, REQUEST).values()
    assert command[:2] == ["srun", "--ntasks-per-node=1"]
    assert command.index("--nodes=2") < command.index(sys.executable)


@pytest.mark.parametrize("words", [["--hosts"], ["a", "b"], ["--nope"], ["--hosts", "no-such-file"]])
def test_what_is_not_understood_is_an_error(words):
    with pytest.raises(ConfigError):
        parse(words)


def test_without_srun_slurm_is_an_error(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="no srun"):
        parse(["--slurm"])


def test_ssh_asks_for_no_password_keeps_host_keys_checked_and_carries_network_settings_only(monkeypatch, tmp_path):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth1 x")
    monkeypatch.setenv("MASTER_PORT", "4711")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    monkeypatch.setenv("DS_ENV_FILE", str(tmp_path / "variables"))
    (tmp_path / "variables").write_text("WANDB_API_KEY=hush\nNOTE=hush\n")
    found = commands(Where("hosts", Path("/runs"), ("me@h1", "me@h2")), REQUEST)
    assert list(found) == ["me@h1", "me@h2"]
    ssh = found["me@h2"]
    assert ssh[:3] == ["ssh", "-o", "BatchMode=yes"] and ssh[-2] == "me@h2"
    assert "StrictHostKeyChecking" not in " ".join(ssh)
    line = ssh[-1]
    assert "'NCCL_SOCKET_IFNAME=eth1 x'" in line and "hush" not in line
    assert "RANK=1 " in line and "WORLD_SIZE=2" in line and "MASTER_PORT=4711 MASTER_ADDR=h1 " in line


def test_pieces_of_several_hosts_in_one_stream_are_put_together():
    answers = Answers()
    stream = ['Welcome\n', 'doctor 0 + {"doctor": "end",\n', 'doctor 1 . {"doctor": "end", "rank": 1}\n',
              'doctor 0 .  "rank": 0}\n']  # fmt: skip
    read_answers(iter(stream), "srun", answers, "slurm")
    assert answers.lines == [{"doctor": "end", "rank": 1}, {"doctor": "end", "rank": 0}]


@pytest.mark.parametrize(
    ("said", "cure"),
    [
        ("root@h2: Permission denied (publickey).", "ssh-copy-id"),
        ("Host key verification failed.", "compare its key"),
        ("ssh: Could not resolve hostname h2: Name or service not known", "/etc/hosts"),
        ("ssh: connect to host h2 port 22: Connection refused", "sshd"),
        ("sh: 1: cd: can't cd to /x: No such file or directory", "same checkout"),
        ("", "ssh h2 true"),
    ],
)
def test_a_silent_host_is_named_with_the_cure_for_what_ssh_said(said, cure):
    where = Where("hosts", Path("/runs"), ("h2",))
    (finding,) = judge(where, Answers([], {"h2": said}, {"h2": 255}), [])
    assert (finding.check, finding.state, finding.hosts) == ("reachable", "fail", ("h2",))
    assert cure in finding.cure
    assert finding.text == (said or "ended with code 255 and said nothing")


def test_a_host_that_stood_still_before_its_facts_says_what_it_waited_for():
    line = {"doctor": "stuck", "rank": 1, "hosts": 2, "node": "h2", "what": "looking at its folders, names and GPUs"}
    where = Where("hosts", Path("/runs"), ("h2",))
    (finding,) = judge(where, Answers([line], {}, {"h2": 1}), [])
    assert (finding.state, finding.hosts) == ("fail", ("h2",))
    assert "looking at its folders" in finding.text and "df" in finding.cure


def run_doctor(words: list[str], shell: str = "") -> tuple[int, str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = ["bash", "-c", f'{shell} exec "$@"', "bash", sys.executable, "-m", "launcher.cli", "doctor", *words]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=90)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_this_machine_is_checked_and_a_low_limit_of_open_files_fails_with_its_cure(tmp_path):
    code, shown = run_doctor([str(tmp_path)], "ulimit -n 512;")
    assert code == 1, shown
    assert "512 allowed" in shown and "ulimit -n 16384" in shown
    assert "1 failed" in shown
    for check in ("python", "packages", "/dev/shm", "CPU cores", "disk: folder", "folder: speed"):
        assert f"ok     {check}" in shown or f"warn   {check}" in shown, shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_fails(tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, shown = run_doctor([str(tmp_path / "file")])
    assert code == 1, shown
    assert "Not a directory" in shown or "cannot be written" in shown
