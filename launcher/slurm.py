"""`millstream submit slurm`: a readable sbatch script in the run directory, submitted.

    millstream submit slurm CONFIG [--nodes N | --nodes N-M] [--cluster FILE|NAME] [--dry-run] [key=value ...]

The script's upper part is made from the run's configuration and the cluster's (configs/clusters.py); its lower part is
that of launcher/scripts/slurm/pretrain.sbatch, which can also be used by hand. What can be wrong is found before
anything is submitted.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from configs.clusters import ClusterConfig, load_cluster
from configs.deepspeed_json import deepspeed_json
from configs.errors import ConfigError
from configs.launches import Launch, read_launch, write_launch
from configs.load import dump, flatten, load
from configs.schema import PretrainConfig
from launcher.restarts import Config, newest_checkpoint
from launcher.slurm_job import State, write_state

SOURCE = Path(__file__).resolve().parents[1]
BY_HAND = SOURCE / "launcher" / "scripts" / "slurm" / "pretrain.sbatch"
DASHES = re.compile(r"^# -+ the same for all runs -+$", re.MULTILINE)
USAGE = "millstream submit slurm CONFIG [--nodes N|N-M] [--cluster FILE|NAME] [--dry-run] [key=value ...]"
OF_ONE_MACHINE = ("btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs")  # file systems


def submit(words: list[str]) -> int:
    """Check, write and submit the script of a run; returns 0. Raises ConfigError for all that can be mended."""
    path, flags, overrides = understand(words)
    cluster_overrides = [word.removeprefix("cluster.") for word in overrides if word.startswith("cluster.")]
    config = load(path, [word for word in overrides if not word.startswith("cluster.")]).config
    cluster = load_cluster(flags.get("--cluster"), cluster_overrides)
    run_dir = Path(config.run_dir).absolute()
    config = config.model_copy(update={"run_dir": str(run_dir)})
    check_texts(config, cluster)
    smallest, largest = node_range(flags.get("--nodes", "1"))
    counts = sizes_that_fit(config, cluster, smallest, largest)
    text = script(config, cluster, (smallest, largest), counts)
    if "--dry-run" in flags:
        print(text, end="")
        return 0
    if not shutil.which("sbatch"):
        raise ConfigError("no program sbatch on this machine: submit from a login node, or see the script: --dry-run")
    refuse_a_second_job(run_dir)
    if largest > 1:
        warn_of_local_folders(run_dir, SOURCE)
    file = write_script(run_dir, text, config)
    job = run_sbatch(file)
    ranks = largest * cluster.tasks_per_node if smallest == largest else None
    command, name = ["millstream", "submit", *words], flags.get("--cluster")
    launch = Launch("slurm", command, job=job, num_ranks=ranks, script=str(file), cluster=name)
    if (begun := read_launch(run_dir)) and begun.job == job:  # the job has started already, and has written its part
        launch = replace(launch, num_ranks=begun.num_ranks, started=begun.started)
    write_launch(run_dir, launch)
    print(f"submitted job {job}: {file}")
    print(f"its output: {run_dir}/logs; state: squeue -j {job}; save and end: scancel --signal=TERM {job}")
    return 0


def understand(words: list[str]) -> tuple[str, dict[str, str], list[str]]:
    """Configuration, flags with their values, key=value words. Raises ConfigError for anything else."""
    if words[:1] != ["slurm"]:
        raise ConfigError(f"millstream submit {' '.join(words[:1])}: only slurm can be submitted to\n\n  {USAGE}")
    flags: dict[str, str] = {}
    others: list[str] = []
    left = words[1:]
    while left:
        name, equals, value = left.pop(0).partition("=")
        if name == "--dry-run" and not equals:
            flags[name] = ""
        elif name in ("--nodes", "--cluster"):
            if not equals and not left:
                raise ConfigError(f"{name}: its value is missing\n\n  {USAGE}")
            flags[name] = value if equals else left.pop(0)
        elif name.startswith("-"):
            raise ConfigError(f"unknown flag {name} (ranks_per_node, time and others: the cluster's file)\n\n  {USAGE}")
        else:
            others.append(name + equals + value)
    if not others or "=" in others[0]:
        raise ConfigError(f"a configuration file is missing\n\n  {USAGE}")
    return others[0], flags, others[1:]


def node_range(text: str) -> tuple[int, int]:
    """Of --nodes: `8` or `4-8`."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    smallest, largest = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= smallest <= largest:
        raise ConfigError(f"--nodes {text}: expected a number of nodes, 8, or the fewest and the most, 4-8")
    return smallest, largest


def sizes_that_fit(config: Config, cluster: ClusterConfig, smallest: int, largest: int) -> list[int]:
    """The numbers of nodes over whose ranks the batch divides, largest first. Raises ConfigError if there is none."""
    counts, problem = [], ""
    for nodes in range(largest, smallest - 1, -1):
        try:
            deepspeed_json(config, nodes * cluster.tasks_per_node)
            counts.append(nodes)
        except ConfigError as error:
            problem = problem or str(error)
    if not counts:
        asked = f"{largest}" if smallest == largest else f"{smallest}-{largest}"
        raise ConfigError(f"--nodes {asked} with {cluster.tasks_per_node} ranks a node: {problem}")
    return counts


def check_texts(config: Config, cluster: ClusterConfig) -> None:
    """Raises ConfigError for what would not survive an sbatch script, or must not stand in one."""
    if found := re.search(r"[%'\"\\`$\s]", config.run_dir):
        raise ConfigError(
            f"run_dir={config.run_dir}: `{found[0]}` means something to sbatch; choose a name without quotes, blanks, "
            f"$, % and backslashes"
        )
    for key, value in flatten(config).items():
        if re.search(r"://[^/@\s]+:[^/@\s]+@", str(value)):
            raise ConfigError(f"{key} holds a password, and the configuration is written into run_dir; use the "
                              f"environment or a file of your home for it")  # fmt: skip
    if cluster.container and not shutil.which("srun") and cluster.container.type == "pyxis":
        print("warning: whether SLURM has pyxis cannot be seen here: there is no srun", file=sys.stderr)


def script(config: Config, cluster: ClusterConfig, nodes: tuple[int, int], counts: list[int]) -> str:
    """The text of the sbatch script. Pure, but for the current folder and this interpreter's place."""
    run_dir, folder = config.run_dir, os.getcwd()
    asked = str(nodes[1]) if nodes[0] == nodes[1] else f"{nodes[0]}-{nodes[1]}"
    lines = [
        "#!/bin/bash",
        "# Written by `millstream submit slurm`: it trains until the run is done, over as many jobs as that takes",
        f"# (docs/clusters.md). May be edited, and submitted by hand: sbatch {run_dir}/slurm/job.sbatch",
        "#",
        *(f"#SBATCH {option}" for option in sbatch_options(config, cluster, asked)),
        "",
        f"run_dir={run_dir}",
        f"module={'pretrain.train' if isinstance(config, PretrainConfig) else 'finetune.run'}",
        "config=$run_dir/slurm/config.yaml    # as resolved when this was submitted",
        "overrides=()",
        f"source={shlex.quote(str(SOURCE))}",
        f"python={shlex.quote(cluster.container.python if cluster.container else sys.executable)}",
        f"ranks_per_node={cluster.tasks_per_node}",
        f"node_counts=({' '.join(map(str, counts))})    # over which the batch divides, largest first",
        f"requeues={cluster.requeues}",
        *container_lines(cluster, [str(SOURCE), run_dir, folder]),
        "unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT    # of the shell that submitted",
        *environment_lines(cluster),
        "",
    ]
    shipped = BY_HAND.read_text(encoding="utf-8")
    found = DASHES.search(shipped)
    assert found is not None
    return "\n".join(lines) + "\n" + shipped[found.start() :]


def sbatch_options(config: Config, cluster: ClusterConfig, nodes: str) -> list[str]:
    run_dir = Path(config.run_dir)
    exported = cluster.export if isinstance(cluster.export, str) else ",".join(cluster.export)
    named = {
        "job-name": re.sub(r"[^\w.-]", "_", run_dir.name),
        "account": cluster.account,
        "partition": cluster.partition,
        "qos": cluster.qos,
        "nodes": nodes,
        # Left out where it is 1, which is the default: with it, SLURM 22.05 takes 1-2 nodes for one task on one node.
        "ntasks-per-node": cluster.tasks_per_node if cluster.tasks_per_node > 1 else None,
        "cpus-per-task": cluster.cpus_per_rank,
        "gres": cluster.gres,
        "constraint": cluster.constraint,
        "mem": cluster.mem,
        "time": cluster.time,
        "signal": f"B:USR1@{cluster.save_seconds}",
        "chdir": shlex.quote(os.getcwd()),
        "output": f"{run_dir}/logs/slurm-%j.log",
        "open-mode": "append",
        "export": exported or "NONE",
    }
    options = [f"--{name}={value}" for name, value in named.items() if value is not None]
    return [*options, *(["--exclusive"] if cluster.exclusive else []), "--requeue", *cluster.options]


def container_lines(cluster: ClusterConfig, folders: list[str]) -> list[str]:
    """What stands before Python, and what srun is told, as arrays of the shell."""
    options = list(cluster.srun_options)
    if cluster.cpus_per_rank:
        options = [f"--cpus-per-task={cluster.cpus_per_rank}", "--cpu-bind=cores", *options]
    inner: list[str] = []
    decide: list[str] = []
    if cluster.container:
        container = cluster.container
        mounts = list(dict.fromkeys([*folders, *container.mounts]))
        pairs = [mount if ":" in mount else f"{mount}:{mount}" for mount in mounts]
        if container.type == "pyxis":
            image = [f"--container-image={container.image}", f"--container-mounts={','.join(pairs)}"]
            image.append(f"--container-workdir={os.getcwd()}")
            options += image
            decide = ["srun", "--nodes=1", "--ntasks=1", *image]
        else:
            nvidia = ["--nv"] if "gpu" in (cluster.gres or "") else []
            binds = [word for pair in pairs for word in ("--bind", pair)]
            inner = decide = ["apptainer", "exec", *nvidia, *binds, "--pwd", os.getcwd(), container.image]
    return [
        f"srun_options=({shlex.join(options)})",
        f"container=({shlex.join(inner)})",
        f"decide=({shlex.join(decide)})    # before the programs at the start and the end, on the first node",
    ]


def environment_lines(cluster: ClusterConfig) -> list[str]:
    lines = []
    if cluster.modules:
        lines += ["type module &> /dev/null || source /etc/profile", "module purge"]
        lines.append(f"module load {' '.join(cluster.modules)} || exit")
    lines += [f"export {name}={shlex.quote(value)}" for name, value in cluster.env.items()]
    lines += cluster.setup
    if cluster.cpus_per_rank:
        lines.append(f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{cluster.cpus_per_rank}}}")
    return lines


def refuse_a_second_job(run_dir: Path) -> None:
    """Raises ConfigError if the job that launch.json names is still in the queue: two would write the same files."""
    launch = read_launch(run_dir)
    if launch is None or launch.kind != "slurm" or launch.job is None:
        return
    asked = subprocess.run(["squeue", "-h", "-j", launch.job, "-o", "%T"], capture_output=True, text=True)
    if state := asked.stdout.strip():
        raise ConfigError(
            f"run_dir={run_dir}: its job {launch.job} is {state.lower()}; wait for it, end it (scancel {launch.job}), "
            f"or choose another run_dir"
        )


def warn_of_local_folders(*folders: Path) -> None:
    """Say which of them seem to be on a disk of this machine, where the other nodes would not see them."""
    for folder in folders:
        if (kind := file_system(folder)) in OF_ONE_MACHINE:
            print(f"warning: {folder} is on {kind}, which other machines usually do not see; the run needs a file "
                  f"system that all nodes share", file=sys.stderr)  # fmt: skip


def file_system(folder: Path) -> str:
    """The type of the file system that `folder` is on, or will be: ext4, nfs4, lustre, ..."""
    best, kind = "", ""
    place = str(folder.resolve())
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, type_of_it, *_ = line.split()
        mount = mount.replace("\\040", " ")
        if len(mount) >= len(best) and f"{place}/".startswith(f"{mount.rstrip('/')}/"):
            best, kind = mount, type_of_it
    return kind


def write_script(run_dir: Path, text: str, config: Config) -> Path:
    """Write run_dir/slurm/: the script, the configuration it runs, and that no job has failed yet."""
    file = run_dir / "slurm" / "job.sbatch"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        (run_dir / "logs").mkdir(exist_ok=True)  # SLURM opens the job's output there, and makes no folder
        file.write_text(text, encoding="utf-8")
        (file.parent / "config.yaml").write_text(dump(config), encoding="utf-8")
        write_state(run_dir, State(step=newest_checkpoint(run_dir)))
    except OSError as error:
        raise ConfigError(
            f"run_dir={run_dir}: cannot be written ({error}); choose a directory you can write to"
        ) from None
    return file


def run_sbatch(file: Path) -> str:
    """Submit the script; returns the job's number. Raises ConfigError with what sbatch says."""
    done = subprocess.run(["sbatch", "--parsable", str(file)], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"{done.stderr.strip()}\nnothing was submitted; the script is {file}")
    print(done.stderr, end="", file=sys.stderr)
    return done.stdout.strip().partition(";")[0]
