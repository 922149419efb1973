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
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from configs.schema import BuildConfig
from data_pipeline.shards import DataError

Task = tuple[Any, ...]  # the arguments of one call
Run = Callable[[Callable[..., Any], Sequence[Task]], Iterator[Any]]  # function, tasks -> results as they are ready
POLL_SECONDS = 2  # between two looks at the tasks of a SLURM job


@contextmanager
def open_engine(settings: BuildConfig, work: Path, num_workers: int) -> Iterator[tuple[Run, int]]:
    """(run, number of workers) of the engine that `settings` ask for.

    `run(function, tasks)` yields results in any order; the first exception of a task is raised, and ends the others
    with the context, in the middle of what they do. `work` is a folder that all workers see.
    """
    if settings.engine == "datatrove":
        yield partial(_run_datatrove, settings, work, num_workers), num_workers
    elif num_workers == 1:
        yield _run_here, 1
    else:
        with _open_processes(num_workers) as executor:
            yield partial(_run_executor, executor), num_workers


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


def _run_here(function: Callable[..., Any], tasks: Sequence[Task]) -> Iterator[Any]:
    for task in tasks:
        yield function(*task)


def _run_executor(executor: Any, function: Callable[..., Any], tasks: Sequence[Task]) -> Iterator[Any]:
    futures = [executor.submit(function, *task) for task in tasks]
    try:
        for future in as_completed(futures):
            yield future.result()
    except BrokenExecutor as error:
        raise DataError(
            "a worker process has ended in the middle of its work: it was killed, by the system if memory ran out "
            "(`dmesg` says so; fewer data.build.num_workers need less), or could not start (its error is above). "
            "Finished parts are kept, the same command goes on from them"
        ) from error
    finally:
        for future in futures:
            future.cancel()


@contextmanager
def _open_processes(num_workers: int) -> Iterator[Executor]:
    """A pool of processes that end at once with an exception here, or with this process, however it ends."""
    # A server process that has imported everything, once, and forks workers: safe where this process has threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_pipeline.passes"])
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
    """One datatrove executor for `tasks`; results come back through files. Its logs are kept if a task fails."""
    if not tasks:
        return
    try:
        from datatrove.executor.local import LocalPipelineExecutor
        from datatrove.executor.slurm import SlurmPipelineExecutor
    except ImportError as error:
        raise DataError(
            f"data.build.engine=datatrove needs datatrove ({error}); pip install 'millstream[datatrove]'"
        ) from error
    work.mkdir(parents=True, exist_ok=True)
    logs = Path(tempfile.mkdtemp(prefix="datatrove-", dir=work)).resolve()
    step = partial(_datatrove_step, function, list(tasks), logs)
    if settings.slurm:
        executor = SlurmPipelineExecutor(
            pipeline=[step], tasks=len(tasks), workers=num_workers, logging_dir=str(logs), **settings.slurm
        )
        executor.run()
        _wait_for_slurm(executor, logs, len(tasks))
    else:
        local = LocalPipelineExecutor(
            pipeline=[step], tasks=len(tasks), workers=num_workers, logging_dir=str(logs), start_method="forkserver"
        )
        local.run()
    yield from (_read_result(logs, rank) for rank in range(len(tasks)))
    shutil.rmtree(logs)


def _datatrove_step(
    function: Callable[..., Any], tasks: list[Task], logs: Path, data: object, rank: int, world_size: int
) -> None:
    import pickle

    try:
        result = function(*tasks[rank])
    except DataError as error:  # told to the build, which says it to the user; others fail the task, with a traceback
        result = error
    (logs / f"result-{rank}.pickle").write_bytes(pickle.dumps(result))


def _read_result(logs: Path, rank: int) -> Any:
    import pickle

    result = pickle.loads((logs / f"result-{rank}.pickle").read_bytes())
    if isinstance(result, DataError):
        raise result
    return result


def _wait_for_slurm(executor: Any, logs: Path, num_tasks: int) -> None:
    """Until every task has left its result; DataError if the job has gone from the queue without."""
    import subprocess

    def missing() -> int:
        return num_tasks - sum((logs / f"result-{rank}.pickle").exists() for rank in range(num_tasks))

    while missing():
        queued = subprocess.run(
            ["squeue", "--noheader", "--name", executor.job_name, "--me"], capture_output=True, text=True
        )
        if queued.returncode == 0 and not queued.stdout.strip() and missing():
            raise DataError(
                f"{missing()} of {num_tasks} SLURM tasks of job {executor.job_id} ended without a result; their output "
                f"is in {logs}/slurm_logs. Finished parts are kept: mend the cause and run the same command again"
            )
        time.sleep(POLL_SECONDS)
