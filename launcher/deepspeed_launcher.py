"""`--launcher pdsh|openmpi|mpich|impi`: the ranks of a hostfile are started by deepspeed's own launcher.

It is started as a program and given all that it would otherwise guess, or probe with an ssh of its own: the hostfile,
the address and the port of rank 0, the variables for the other machines (a file that it reads, DS_ENV_FILE). It writes
those variables into the command lines that it starts on every machine, where every user can read them; so none that
looks like a secret gets that far, and a setting that a shell would change does not either, because the run's whole
configuration goes into a file in run_dir.

Each rank is `python launcher/rank.py`, which puts what it prints into run_dir/logs too.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from configs import stalls
from configs.load import ConfigError, dump
from launcher.exports import exports, files, is_secret
from launcher.local import GRACE_SECONDS, Signals, free_port, make_logs, tell_stall
from launcher.logs import begin_logs
from launcher.restarts import Config, note_launch, say
from launcher.ssh import address_of
from launcher.watch import Watch

PLAIN = re.compile(r"[\w@%+=:,./-]+")  # what a shell leaves as it is
RANKS_SECONDS = 60  # the ranks get to notice a stall and leave by themselves; see pretrain/watchdog.py
KEEP_ALIVE = "-o ServerAliveInterval=5 -o ServerAliveCountMax=3"  # an ssh to a host that is cut off ends after 20 s


def run_by_deepspeed(launcher: str, module: str, config: Config, hosts: dict[str, int]) -> int:
    """Run to the end; returns the exit code. Raises ConfigError for what deepspeed could not pass on."""
    program = "pdsh" if launcher == "pdsh" else "mpirun"
    if not shutil.which(program):
        raise ConfigError(f"--launcher {launcher}: no program {program} here; --launcher ssh needs none")
    run_dir, signals = Path(config.run_dir).absolute(), Signals()
    num_ranks = sum(hosts.values())
    if launcher != "pdsh" and len(set(hosts.values())) > 1 and launcher != "openmpi":
        raise ConfigError(f"--launcher {launcher}: all hosts must have the same slots=N, found {hosts}")
    logs = make_logs(run_dir)
    note_launch(run_dir, num_ranks, "hosts")
    begin_logs(logs, num_ranks)
    file = run_dir / "launch.yaml"
    if not PLAIN.fullmatch(str(file)):
        raise ConfigError(
            f"run_dir={run_dir}: --launcher {launcher} cannot pass on a path with blanks or shell characters"
        )
    file.write_text(dump(config), encoding="utf-8")
    stall_seconds = config.launch.stall_seconds
    watch = Watch(run_dir, num_ranks, stall_seconds and stall_seconds + RANKS_SECONDS)
    with tempfile.TemporaryDirectory() as folder:
        command = deepspeed_command(launcher, Path(folder), hosts, [module, str(run_dir), "--config", str(file)])
        process = subprocess.Popen(command, env=environment(Path(folder)), process_group=0)
        return wait(process, watch, signals)


def deepspeed_command(launcher: str, folder: Path, hosts: dict[str, int], words: list[str]) -> list[str]:
    """Write the hostfile and the variables into `folder`, and name both."""
    variables = exports(os.environ)
    if secret := next((name for name in variables if is_secret(name)), None):
        where = ", ".join(map(str, files(os.environ)))
        raise ConfigError(
            f"{where}: {name_of(secret)} would stand on the command line of every machine with --launcher {launcher}; "
            f"use --launcher ssh, which sends it over the connection, or put it into a file that the ranks read"
        )
    addr = os.environ.get("MASTER_ADDR") or address_of(next(iter(hosts)))
    port = os.environ.get("MASTER_PORT") or free_port("")
    variables |= {"MASTER_ADDR": addr, "MASTER_PORT": port, "PYTHONUNBUFFERED": "1"}
    root = str(Path(__file__).resolve().parents[1])
    variables["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [variables.get("PYTHONPATH")])])
    (folder / "variables").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    (folder / "hosts").write_text("".join(f"{host} slots={slots}\n" for host, slots in hosts.items()))
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(folder / "hosts"), "--force_multi"]
    command += ["--launcher", launcher, "--no_ssh_check", "--master_addr", addr, "--master_port", port]
    # A file, not a module: with --module deepspeed 0.19.8 starts MPICH's ranks wrongly.
    return [*command, "--no_local_rank", str(Path(__file__).with_name("rank.py")), *words]


def name_of(variable: str) -> str:
    return f"the variable {variable}"


def environment(folder: Path) -> dict[str, str]:
    """Of deepspeed's launcher: it exports whole prefixes (MLFLOW, ...), so what looks like a secret is not in it."""
    own = os.environ.get("MILLSTREAM_SSH_ARGS", "")
    kept = {name: value for name, value in os.environ.items() if not is_secret(name)}
    appended = " ".join(filter(None, [kept.get("PDSH_SSH_ARGS_APPEND", ""), own, "-o BatchMode=yes", KEEP_ALIVE]))
    kept |= {"DS_ENV_FILE": str(folder / "variables"), "PDSH_SSH_ARGS_APPEND": appended}
    if own:
        kept.setdefault("OMPI_MCA_plm_rsh_agent", f"ssh {own}")
        kept.setdefault("HYDRA_LAUNCHER_EXTRA_ARGS", own)
    return kept


def wait(process: subprocess.Popen[bytes], watch: Watch, signals: Signals) -> int:
    """Until deepspeed's launcher has ended; told to, it ends its ranks, without a checkpoint."""
    stalled, told = False, 0.0
    while process.poll() is None:
        running = [rank for rank in range(watch.num_ranks) if watch.ring(rank)]
        if not told and (seconds := watch.stalled(running)):
            tell_stall(watch, seconds, [])
            stalled = True
        if not told and (stalled or signals.number is not None):
            process.send_signal(signal.SIGTERM)
            told = time.monotonic()
        if told and time.monotonic() - told > GRACE_SECONDS:
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.2)
    code = process.returncode if process.returncode >= 0 else 128 - process.returncode
    if signals.number is not None:
        return 128 + signals.number
    if code:
        say(f"deepspeed's launcher ended with exit code {code}; `millstream logs {watch.run_dir}` has the cause")
    return stalls.EXIT_CODE if code and stalls.report_path(watch.run_dir).exists() else code
