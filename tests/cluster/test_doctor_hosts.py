"""`millstream doctor --hosts`: three hosts with real sshd in network namespaces, first sound, then with real faults."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.namespaces import Hosts, network_hosts
from tests.conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
OWN = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[Hosts]:
    with network_hosts(tmp_path_factory.mktemp("doctor") / "hosts", 3) as found:
        (found.folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in found.addresses))
        yield found


def doctor(hosts: Hosts, folder: Path) -> tuple[int, str]:
    command = [sys.executable, "-m", "launcher.cli", "doctor", "--hosts", f"{hosts.folder}/hostfile", str(folder)]
    environment = os.environ | OWN | {"MILLSTREAM_SSH_ARGS": hosts.ssh_arguments}
    done = subprocess.run(
        hosts.inside("h1", command), env=environment, cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    return done.returncode, done.stdout + done.stderr


def line(shown: str, state: str, check: str) -> str:
    """The table's lines of a check with that state, and those of its cures."""
    lines = shown.splitlines()
    starts = [n for n, text in enumerate(lines) if text[8:].startswith(f"{check} ") and text.split()[0] == state]
    assert starts, shown
    found = []
    for start in starts:
        more = itertools.takewhile(lambda text: text.startswith(" " * 9), lines[start + 1 :])
        found += [lines[start], *more]
    return " ".join(" ".join(found).split())


def test_sound_hosts_pass_and_nothing_stays_in_the_folder(hosts, tmp_path):
    code, shown = doctor(hosts, tmp_path)
    assert code == 0, shown
    assert "3 hosts in" in shown and " 0 failed" in shown
    assert "h1:29500 is reached" in line(shown, "ok", "rendezvous port")
    assert "3 pairs" in line(shown, "ok", "links between hosts")
    assert "of h1" in line(shown, "ok", "clocks")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def faults(hosts, tmp_path) -> None:
    """h2: a folder of its own, another rich, few open files, and no way to h3; h3: a slow cable."""
    sshd = (hosts.folder / "sshd-h2.pid").read_text().strip()
    inside = ["nsenter", "--target", sshd, "--mount"]
    subprocess.run([*inside, "mount", "-t", "tmpfs", "own", str(tmp_path)], check=True)
    (metadata,) = (Path(str(f.locate())) for f in importlib.metadata.files("rich") or [] if f.name == "METADATA")
    other = hosts.folder / "METADATA"
    other.write_text("Metadata-Version: 2.1\nName: rich\nVersion: 1.0.0\n")
    subprocess.run([*inside, "mount", "--bind", str(other), str(metadata)], check=True)
    subprocess.run(["prlimit", "--pid", sshd, "--nofile=512:512"], check=True)
    for here, there in (("h2", "h3"), ("h3", "h2")):
        route = ["ip", "-n", hosts.namespace(here), "route", "add", "blackhole", f"{hosts.addresses[there]}/32"]
        subprocess.run(route, check=True)
    slow = ["tc", "-n", hosts.namespace("h3"), "qdisc", "add", "dev", "e0", "root", "tbf", "rate", "100mbit"]
    subprocess.run([*slow, "burst", "32kbit", "latency", "400ms"], check=True)


def test_each_fault_is_named_with_its_host_and_its_cure(hosts, faults, tmp_path):
    code, shown = doctor(hosts, tmp_path)
    assert code == 1, shown
    assert "what h1 has written" in line(shown, "fail", "shared folder")
    assert "tmpfs" in shown and "h2" in line(shown, "fail", "shared folder")
    packages = line(shown, "warn", "packages")
    assert "rich 1.0.0 here" in packages and "h2" in packages
    files = line(shown, "fail", "open files")
    assert "512 allowed" in files and "ulimit -n 16384" in files and "h2" in files
    links = line(shown, "fail", "links between hosts")
    assert "h2 and h3 cannot reduce a tensor: no connection to" in links
    assert "h1 and h3: 0.0" in links
