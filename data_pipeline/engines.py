"""Who does the tasks of a build: processes of this machine, MPI's ranks on many, or datatrove, locally or under SLURM.

A task is a function of this repository with arguments that can be pickled; it reads and writes files of the working
directory and returns little. So an engine needs to do only one thing, run tasks in any order, and every engine gives
the same dataset. MPI goes through `mpi4py.futures`, which has the interface of Python's own process pool.

datatrove is the engine for more machines than one launcher reaches: it is made for this kind of work, its tasks are
SLURM array jobs that are requeued and skipped when done, and it needs no service to be running, unlike Ray and Spark.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, as_completed
from contextlib import closing, contextmanager
from functools import partial
from itertools import pairwise
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from configs.load import ConfigError
from configs.schema import BuildConfig
from data_pipeline.errors import DataError
from data_pipeline.store import writing

Task = tuple[Any, ...]  # the arguments of one call
Run = Callable[[Callable[..., Any], Sequence[Task]], Iterator[Any]]  # function, tasks -> results as they are ready
POLL_SECONDS = 2  # between two looks at the tasks that datatrove runs
RANKS_A_WORKER = 2  # of datatrove, at most, for each pass
SLOW_LOOKS = 10  # after the end of a SLURM job, until a shared file system must have shown what it left
KILLED = (
    "a worker process has ended in the middle of its work: it was killed, by the system if memory ran out (`dmesg` "
    "says so; fewer data.build.num_workers need less), or could not start (its error is above). Finished parts are "
    "kept, the same command goes on from them"
)


@contextmanager
def open_engine(settings: BuildConfig, work: Path, num_workers: int) -> Iterator[tuple[Run, int]]:
    """(run, number of workers) of the engine that `settings` ask for.

    `run(function, tasks)` yields results in any order; the first exception of a task is raised, and ends the others
    with the context, in the middle of what they do. `work` is a folder that all workers see.
    """
    if settings.engine == "datatrove":
        yield partial(_run_datatrove, settings, work, num_workers), num_workers
    elif num_workers == 1:
        yield run_here, 1
    else:
        with _open_processes(num_workers) as executor:
            yield partial(_run_executor, executor), num_workers


def default_workers(settings: BuildConfig) -> int:
    """As many as are asked for, or one a core."""
    return settings.num_workers or len(os.sched_getaffinity(0))


def mpi_world_size() -> int:
    """Ranks of the MPI job that this process is part of, 1 without: told from the environment, without starting MPI."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 1


@contextmanager
def open_mpi() -> Iterator[tuple[Run, int] | None]:
    """On rank 0 (run, number of workers), as `open_engine`; None on the others, after they have done their tasks."""
    from mpi4py import MPI
    from mpi4py.futures import MPICommExecutor

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    with MPICommExecutor(MPI.COMM_WORLD, root=0) as executor:
        yield None if executor is None else (partial(_run_executor, executor), MPI.COMM_WORLD.Get_size() - 1)


def abort_mpi() -> None:
    """End all ranks at once: without, they would first finish what they have begun, and that may take hours."""
    from mpi4py import MPI

    MPI.COMM_WORLD.Abort(1)


def run_here(function: Callable[..., Any], tasks: Sequence[Task]) -> Iterator[Any]:
    """Run the tasks in this process, for what is done before workers could have been started."""
    for task in tasks:
        yield function(*task)


def _run_executor(executor: Any, function: Callable[..., Any], tasks: Sequence[Task]) -> Iterator[Any]:
    try:
        futures = [executor.submit(function, *task) for task in tasks]
        # Python's pool looks for its workers' ends each time it is given something, before it starts a worker for that.
        # So without this it would not notice the end of the last one until another one has finished what it does.
        if len(futures) > 1:
            executor.submit(os.getpid)
        for future in as_completed(futures):
            yield future.result()
    except BrokenExecutor as error:
        raise DataError(KILLED) from error


def start_server() -> None:
    """Start the process that forks workers, if it does not run yet: safe where this process has threads.

    It imports for 0.3 s what workers need; whatever is done here before the first task is not held up by that.
    """
    forkserver.set_forkserver_preload(["data_pipeline.passes"])
    # a terminal sends Ctrl-C to all of its processes; while it imports, the server would answer with a traceback
    resource_tracker.ensure_running()  # it would be started there, and let the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _open_processes(num_workers: int) -> Iterator[Executor]:
    """A pool of processes that end at once with an exception here, or with this process, however it ends."""
    start_server()
    context = multiprocessing.get_context("forkserver")
    theirs, ours = context.Pipe(duplex=False)
    with closing(theirs), closing(ours), ProcessPoolExecutor(num_workers, context, _start_worker, (theirs,)) as pool:
        try:
            yield pool
        except BaseException:
            ours.close()
            raise


def _start_worker(parent: Connection) -> None:
    """End with the other end of `parent`; leave Ctrl-C, which all processes of a terminal get, to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism

    def watch() -> None:
        multiprocessing.connection.wait([parent])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run_datatrove(
    settings: BuildConfig, work: Path, num_workers: int, function: Callable[..., Any], tasks: Sequence[Task]
) -> Iterator[Any]:
    """One datatrove executor for `tasks`; results come back through files. Its logs are kept if a task fails.

    Neighbouring tasks are done by one rank, since to start one takes seconds; a rank that is started again skips what
    is finished.
    """
    if not tasks:
        return
    num_ranks = min(len(tasks), RANKS_A_WORKER * num_workers)
    bounds = [rank * len(tasks) // num_ranks for rank in range(num_ranks + 1)]
    groups = [list(tasks[first:after]) for first, after in pairwise(bounds)]
    try:
        from datatrove.executor.local import LocalPipelineExecutor
        from datatrove.executor.slurm import SlurmPipelineExecutor
    except ImportError as error:
        raise DataError(
            f"data.build.engine=datatrove needs datatrove ({error}); pip install 'millstream[datatrove]'"
        ) from error
    work.mkdir(parents=True, exist_ok=True)
    logs = Path(tempfile.mkdtemp(prefix="datatrove-", dir=work)).resolve()
    step = _DatatroveStep(function, groups, logs)
    if settings.slurm:
        try:
            executor = SlurmPipelineExecutor(
                pipeline=[step], tasks=num_ranks, workers=num_workers, logging_dir=str(logs), **settings.slurm
            )
        except TypeError as error:
            raise ConfigError(f"data.build.slurm: {error}; it takes the settings of SlurmPipelineExecutor") from error
        executor.run()
        _wait_for_slurm(executor, logs, num_ranks)
    else:
        local = LocalPipelineExecutor(
            pipeline=[step], tasks=num_ranks, workers=num_workers, logging_dir=str(logs), start_method="forkserver"
        )
        _run_local(local, logs, num_ranks)
    for rank in range(num_ranks):
        yield from _read_results(logs, rank)
    shutil.rmtree(logs)


class _DatatroveStep:
    """Does the tasks of a rank and leaves the results in a file."""

    def __init__(self, function: Callable[..., Any], groups: list[list[Task]], logs: Path) -> None:
        self.function, self.groups, self.logs = function, groups, logs

    def __repr__(self) -> str:
        return getattr(self.function, "func", self.function).__name__  # of a partial too; every rank logs it

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        import pickle

        (self.logs / f"pid-{rank}").write_text(str(os.getpid()))
        results: Any
        try:
            results = [self.function(*task) for task in self.groups[rank]]
        except (ConfigError, DataError) as error:  # told to the build, which says it to the user;
            results = error  # others fail the rank, with a traceback
        with writing(self.logs / f"result-{rank}.pickle") as file:
            file.write(pickle.dumps(results))


def _run_local(executor: Any, logs: Path, num_ranks: int) -> None:
    """Run datatrove's processes on this machine; if one is killed, which it does not notice, DataError."""
    ended, killed = threading.Event(), threading.Event()

    def watch() -> None:
        while not ended.wait(POLL_SECONDS):
            if any(_is_gone(logs, rank) for rank in _missing(logs, num_ranks)):
                killed.set()
                main = threading.main_thread().ident
                signal.pthread_kill(main or 0, signal.SIGINT)  # wakes it up, which no exception of Python would
                return

    watcher = threading.Thread(target=watch, daemon=True)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    watcher.start()
    try:
        executor.run()
    except KeyboardInterrupt:
        if killed.is_set():
            raise DataError(KILLED) from None
        raise
    finally:
        ended.set()
        watcher.join()
        signal.signal(signal.SIGINT, handler)


def _is_gone(logs: Path, rank: int) -> bool:
    """Whether the process that began this task has ended without a result."""
    pid = logs / f"pid-{rank}"
    if not pid.exists() or not (number := pid.read_text()) or Path("/proc", number).exists():
        return False
    return not (logs / f"result-{rank}.pickle").exists()  # it may have been left just now


def _missing(logs: Path, num_ranks: int) -> list[int]:
    """The ranks that have not left a result."""
    return [rank for rank in range(num_ranks) if not (logs / f"result-{rank}.pickle").exists()]


def _read_results(logs: Path, rank: int) -> list[Any]:
    import pickle

    results = pickle.loads((logs / f"result-{rank}.pickle").read_bytes())
    if isinstance(results, ConfigError | DataError):
        raise results
    return results


def _wait_for_slurm(executor: Any, logs: Path, num_ranks: int) -> None:
    """Until the job has gone from the queue and every task has left its result; DataError if some have not."""
    import subprocess

    looks_left = SLOW_LOOKS
    while True:
        command = ["squeue", "--noheader", "--name", executor.job_name, "--me"]
        queued = subprocess.run(command, capture_output=True, text=True)
        is_over = queued.returncode == 0 and not queued.stdout.strip()
        missing = _missing(logs, num_ranks)
        if not missing and (is_over or queued.returncode):
            return
        if is_over and not looks_left:
            raise DataError(
                f"{len(missing)} of {num_ranks} SLURM tasks of job {executor.job_id} ended without a result; their "
                f"output is in {logs}/slurm_logs. Finished parts are kept: mend the cause, run the same command again"
            )
        looks_left -= is_over
        time.sleep(POLL_SECONDS)
