"""What a SLURM cluster wants to be asked: the typed form of `configs/cluster/*.yaml`, for `millstream submit slurm`.

Loaded as a run's configuration is: unknown keys are errors that name the nearest key, and `cluster.KEY=VALUE` on the
command line goes first. Texts are SLURM's own, as after the option of that name.
"""

from __future__ import annotations

# ruff: noqa: RUF012 - a default of a pydantic model is copied
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from configs.errors import ConfigError
from configs.load import load_as
from configs.schema import PositiveInt, Section

FOLDER = Path(__file__).parent / "cluster"
# minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds
WALLTIME = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2}")
NAME = re.compile(r"[A-Za-z_]\w*")
SECRET = re.compile(r"(?i)token(?!iz)|secret|passw|credential|api_?key|access_?key|private_?key")
Word = Annotated[str, Field(pattern=r"^[^\s'\"\\`$;]+$")]  # it stands in a #SBATCH line, which no shell reads


class ContainerConfig(Section):
    """The image that ranks run in. The checkout of millstream, run_dir and the current folder are mounted as well."""

    type: Literal["pyxis", "apptainer"]
    image: Word  # pyxis: registry#name:tag or a .sqsh file; apptainer: a .sif file or docker://name:tag
    mounts: list[Word] = []  # /path, or /outside:/inside
    python: Word = "python3"  # inside of the image


class ClusterConfig(Section):
    account: Word | None = None
    partition: Word | None = None  # none: SLURM's default
    qos: Word | None = None
    gres: Word | None = None  # of each node, for example gpu:8 or gpu:h100:8
    constraint: Word | None = None  # features of the nodes, for example a100&ib
    exclusive: bool = False  # the whole of each node
    time: str | None = (
        None  # the limit of one job, 24:00:00 or 2-12; the run goes on in the next. none: SLURM's default
    )
    mem: Word | None = None  # of each node, for example 200G; 0: all of it. none: SLURM's default
    ranks_per_node: PositiveInt | None = None  # none: the number of GPUs in gres, or 1
    cpus_per_rank: PositiveInt | None = None  # cores, to which each rank is bound; none: SLURM's default
    options: list[Annotated[str, Field(pattern=r"^--[a-z][^\n]*$")]] = []  # further #SBATCH lines, each a whole option
    modules: list[Word] = []  # loaded in this order, after `module purge`
    env: dict[str, str] = {}  # set before the ranks start; no secrets: these stand in run_dir
    setup: list[str] = []  # further lines of shell, after modules and env, on the first node of the job
    # Which of the submitting shell's variables the job gets: ALL, NONE, or names. Secrets travel here, by name alone.
    export: Literal["ALL", "NONE"] | list[Word] = "ALL"
    srun_options: list[Word] = []  # for the step that starts the ranks, for example --mpi=none
    container: ContainerConfig | None = None
    # Before the time limit: to finish a step, evaluate and save. The signal may come up to a minute early.
    save_seconds: PositiveInt = 120
    requeues: Annotated[int, Field(ge=0)] = 3  # of a job that failed, in a row without progress

    @field_validator("time", mode="before")
    @classmethod
    def _minutes_are_a_number(cls, value: object) -> object:
        return str(value) if isinstance(value, int) else value

    @field_validator("time")
    @classmethod
    def _time_is_slurms(cls, value: str | None) -> str | None:
        if value is not None and not WALLTIME.fullmatch(value):
            raise ValueError(
                "expected minutes (90), hours:minutes:seconds (24:00:00) or days-hours[:minutes[:seconds]] (2-12)"
            )
        return value

    @model_validator(mode="after")
    def _names_are_names_and_hide_nothing(self) -> ClusterConfig:
        exported = [] if isinstance(self.export, str) else self.export
        for name in [*exported, *self.env]:
            if not NAME.fullmatch(name):
                raise ValueError(
                    f"`{name.partition('=')[0]}` is no name of a variable, or has a value; export takes names, so "
                    f"that no value stands in a script or on a command line"
                )
        given = [
            name for line in self.setup for name in re.findall(r"\b(\w+)=(?![\"']?\$)", line)
        ]  # $(cat FILE) is none
        if hidden := [name for name in [*self.env, *given] if SECRET.search(name)]:
            raise ValueError(
                f"{hidden[0]} looks like a secret, and env and setup are written into run_dir; set it in your shell "
                f"and name it under `export` (ALL, the default, has it already)"
            )
        if self.time is not None and 0 < walltime_seconds(self.time) <= self.save_seconds:
            raise ValueError(
                f"time={self.time} is not longer than save_seconds={self.save_seconds}: the job would be asked to save "
                f"as soon as it starts"
            )
        return self

    @property
    def tasks_per_node(self) -> int:
        """Ranks on each node: one per GPU of gres (`gpu:8`, `gpu:h100:8`, `gpu`), or as ranks_per_node says."""
        if self.ranks_per_node is not None:
            return self.ranks_per_node
        gpus = re.search(r"(?:^|,)(?:gres:)?gpu(?::[^:,(]*[A-Za-z][^:,(]*)?(?::(\d+))?", self.gres or "")
        return int(gpus[1] or 1) if gpus else 1


def walltime_seconds(time: str) -> int:
    """Of a text that `WALLTIME` matches. 0 means no limit."""
    days, dash, rest = time.rpartition("-")
    numbers = [int(number) for number in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    else:
        hours, minutes, seconds = ((0, numbers[0], 0), (0, *numbers), tuple(numbers))[len(numbers) - 1]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def load_cluster(name: str | None, overrides: list[str] | None = None) -> ClusterConfig:
    """The cluster of a file, of a shipped file's name (`gpu` is configs/cluster/gpu.yaml), or of defaults alone.

    Raises ConfigError with all faults.
    """
    if name is None:
        return load_as(ClusterConfig, None, overrides)
    shipped = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    if name in shipped and not Path(name).is_file():
        return load_as(ClusterConfig, FOLDER / f"{name}.yaml", overrides)
    if not Path(name).exists():
        raise ConfigError(f"--cluster {name}: no such file, and none of the shipped ones: {', '.join(shipped)}")
    return load_as(ClusterConfig, name, overrides)
