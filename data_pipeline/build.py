"""Raw text -> a dataset directory: `millstream data build CONFIG [key=value ...]`, or the same under `mpirun -np N`.

What is done is in build_steps.py. Here workers are seen to first: the server that forks them imports for a third of a
second what they need, and so does this process, on another core at the same time.
"""

from __future__ import annotations

import gc
import sys
import traceback

from configs.errors import ConfigError
from configs.load import load_pretrain
from configs.schema import PretrainConfig
from data_pipeline.engines import Run, abort_mpi, default_workers, mpi_world_size, open_mpi, start_server
from data_pipeline.errors import DataError

INTERRUPTED = 130  # exit code of a program ended by Ctrl-C


def main() -> int:
    try:
        if len(sys.argv) < 2:
            raise ConfigError("usage: millstream data build CONFIG [key=value ...]")
        config = load_pretrain(sys.argv[1], sys.argv[2:])
        if mpi_world_size() == 1:
            if config.data.build.engine == "processes" and default_workers(config.data.build) > 1:
                start_server()
            run(config)
            return 0
        with open_mpi() as engine:
            if engine is not None:
                run_or_abort(config, engine)
    except (ConfigError, DataError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; finished parts are kept, the same command goes on from them", file=sys.stderr)
        return INTERRUPTED
    return 0


def run(config: PretrainConfig, engine: tuple[Run, int] | None = None) -> None:
    """Build; with `engine` these are its tasks and its number of workers, see `open_engine`."""
    from rich.console import Console

    from data_pipeline.build_steps import build

    # what mpirun shows often goes to a file
    build(config, Console() if engine is None else Console(force_terminal=False), engine)


def run_or_abort(config: PretrainConfig, engine: tuple[Run, int]) -> None:
    """`run` on rank 0; an error is shown and ends all ranks."""
    try:
        run(config, engine)
    except BaseException as error:
        print(
            error if isinstance(error, ConfigError | DataError) else traceback.format_exc(), file=sys.stderr, flush=True
        )
        abort_mpi()


if __name__ == "__main__":
    code = main()
    gc.freeze()  # without, Python would search all that was loaded for cycles before it ends, for 50 ms
    sys.exit(code)
