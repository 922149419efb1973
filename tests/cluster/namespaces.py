"""Two or more hosts on this machine: network namespaces on a bridge, each with a name, an address and a real sshd.

Everything is named after a random number, so that several of these can exist side by side, and all of it goes with the
context, every process inside of a namespace too. They share the file system, as the hosts of a cluster do.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

PROGRAMS = {"ip": "iproute2", "/usr/sbin/sshd": "openssh-server", "ssh": "openssh-client", "unshare": "util-linux"}
SSHD_CONF = """\
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/id.pub
PidFile {folder}/sshd-{name}.pid
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
"""
SSH_CONF = """\
IdentityFile {folder}/id
UserKnownHostsFile {folder}/known_hosts
GlobalKnownHostsFile /dev/null
LogLevel ERROR
"""


@dataclass(frozen=True)
class Hosts:
    folder: Path
    mark: str  # what is in the names of all that was made
    addresses: dict[str, str]  # of each host name

    @property
    def ssh_arguments(self) -> str:
        """With which ssh knows the hosts' keys, and its own."""
        return f"-F {self.folder}/ssh.conf"

    def namespace(self, name: str) -> str:
        return f"{self.mark}-{name}"

    def inside(self, name: str, command: list[str]) -> list[str]:
        """The command that runs `command` on that host."""
        enter = ["ip", "netns", "exec", self.namespace(name), "unshare", "--uts"]
        return [*enter, "sh", "-c", f'hostname {name} && exec "$@"', "sh", *command]

    def cut_off(self, name: str) -> None:
        """Pull its cable."""
        subprocess.run(["ip", "-n", self.namespace(name), "link", "set", "e0", "down"], check=True)

    def connect_again(self, name: str) -> None:
        subprocess.run(["ip", "-n", self.namespace(name), "link", "set", "e0", "up"], check=True)

    def pids(self, name: str) -> list[int]:
        """Of all processes on that host."""
        listed = subprocess.run(["ip", "netns", "pids", self.namespace(name)], capture_output=True, text=True)
        return [int(pid) for pid in listed.stdout.split()]

    def running(self, name: str, word: str) -> list[int]:
        """Of those with `word` in their command line."""
        return [pid for pid in self.pids(name) if word in command_line(pid)]


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


@contextmanager
def network_hosts(folder: Path, count: int = 2) -> Iterator[Hosts]:
    """Hosts h1, h2, ...; skips the test, naming Debian's packages, where something that they need is missing."""
    missing = sorted({package for program, package in PROGRAMS.items() if not shutil.which(program)})
    if missing:
        pytest.skip(f"no {', '.join(missing)} (Debian's packages)")
    if os.geteuid() != 0:
        pytest.skip("network namespaces and sshd need root")
    folder.mkdir(parents=True)
    mark = f"ms{uuid.uuid4().hex[:6]}"
    made = subprocess.run(["ip", "link", "add", mark, "type", "bridge"], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
    try:
        yield start(folder, mark, count)
    finally:
        end(folder, mark, count)


def start(folder: Path, mark: str, count: int) -> Hosts:
    net = free_net()
    hosts = Hosts(folder, mark, {f"h{number}": f"{net}.{number}" for number in range(1, count + 1)})
    for name in ("id", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    key = (folder / "host_key.pub").read_text()
    known = [f"{name},{address} {key}" for name, address in hosts.addresses.items()]
    (folder / "known_hosts").write_text("".join(known))
    (folder / "ssh.conf").write_text(SSH_CONF.format(folder=folder))
    Path("/run/sshd").mkdir(exist_ok=True)
    run(f"ip addr add {net}.254/24 dev {mark}")
    run(f"ip link set {mark} up")
    names = "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in hosts.addresses.items())
    for number, (name, address) in enumerate(hosts.addresses.items(), 1):
        space = hosts.namespace(name)
        run(f"ip netns add {space}")
        run(f"ip link add {mark}v{number} type veth peer name e0 netns {space}")
        run(f"ip link set {mark}v{number} master {mark} up")
        run(f"ip -n {space} addr add {address}/24 dev e0")
        run(f"ip -n {space} link set e0 up")
        run(f"ip -n {space} link set lo up")
        Path(f"/etc/netns/{space}").mkdir(parents=True)
        Path(f"/etc/netns/{space}/hosts").write_text(names)
        conf = folder / f"sshd-{name}.conf"
        conf.write_text(SSHD_CONF.format(address=address, folder=folder, name=name))
        subprocess.run(hosts.inside(name, ["/usr/sbin/sshd", "-f", str(conf)]), check=True)
    for name in hosts.addresses:
        wait_for_sshd(hosts, name)
    return hosts


def wait_for_sshd(hosts: Hosts, name: str) -> None:
    command = ["ssh", *shlex.split(hosts.ssh_arguments), "-o", "BatchMode=yes", name, "true"]
    deadline = time.monotonic() + 20
    while (tried := subprocess.run(hosts.inside("h1", command), capture_output=True, text=True)).returncode:
        assert time.monotonic() < deadline, tried.stderr
        time.sleep(0.2)


def run(command: str) -> None:
    subprocess.run(command.split(), check=True)


def free_net() -> str:
    """The first three bytes of a network that this machine has no route to, 10.N.M."""
    routes = subprocess.run(["ip", "route"], capture_output=True, text=True, check=True).stdout
    while True:
        number = uuid.uuid4().int
        net = f"10.{64 + number % 128}.{number // 128 % 250}"
        if f"{net}." not in routes:
            return net


def end(folder: Path, mark: str, count: int) -> None:
    hosts = Hosts(folder, mark, {})
    for name in (f"h{number}" for number in range(1, count + 1)):
        space = hosts.namespace(name)
        deadline = time.monotonic() + 10
        while (pids := hosts.pids(name)) and time.monotonic() < deadline:
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)
        subprocess.run(["ip", "netns", "del", space], capture_output=True)
        shutil.rmtree(f"/etc/netns/{space}", ignore_errors=True)
    subprocess.run(["ip", "link", "del", mark], capture_output=True)
    assert mark not in {name for _, name in socket.if_nameindex()}
