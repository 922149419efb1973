"""Saving while the run goes on: what a checkpoint costs a step is a copy in memory.

At a save every rank copies its pieces of weights and optimizer state to host memory, and a thread of it writes, hashes
and flushes them in a hidden directory. The thread takes part in no collective: that the others have written too is
learnt from the flags that the loop adds up at every step anyway, so all ranks hear of it at the same step. Then rank 0
writes the manifest, flushes it and renames the directory (`checkpoint` says what is in it). A crash before that leaves
the earlier checkpoints and a hidden leftover.

The price is host memory for one copy of what the rank saves, 12 bytes per parameter with AdamW divided by the number of
ranks; it is kept from one save to the next. One write goes on at a time: a save that is due meanwhile waits for it.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import xxhash

from configs.schema import CheckpointConfig
from pretrain import checkpoint
from pretrain.checkpoint import CheckpointError, Fragment
from pretrain.runtime import Runtime
from pretrain.state import TrainState
from pretrain.upload import Uploader, wait_at_end

BLOCK_BYTES = 1 << 24  # written and hashed at once, without holding the interpreter


class Write(threading.Thread):
    """Writes this rank's file of one checkpoint; afterwards there is an `entry` for the manifest, or a `problem`."""

    def __init__(self, aside: Path, rank: int, pieces: list[Fragment]) -> None:
        super().__init__(name="checkpoint")
        self.path, self.pieces = aside / f"rank-{rank:05d}.safetensors", pieces
        self.entry: dict[str, Any] | None = None
        self.problem: str | None = None

    def run(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.entry = write_safetensors(self.path, _tensors(self.pieces))
        except Exception as error:  # whatever it is, the other ranks have to hear of it
            self.problem = _described(error)
            self.path.unlink(missing_ok=True)  # at once: the room on a full disk is needed for the run's other files


class Saver:
    """Saves checkpoints of a run, see above; made by `open_saver`."""

    def __init__(self, run_dir: Path, config: CheckpointConfig, runtime: Runtime) -> None:
        self.run_dir, self.config, self.runtime = run_dir, config, runtime
        self._write: Write | None = None
        self._about: tuple[TrainState, dict[str, Any]] = (TrainState(), {})
        self._host: dict[tuple[str, str], torch.Tensor] = {}
        self.uploader = Uploader(run_dir, config.upload) if config.upload and runtime.is_first else None

    @property
    def is_writing(self) -> bool:
        """Whether this rank's write still goes on."""
        return self._write is not None and self._write.is_alive()

    @property
    def has_failed(self) -> bool:
        return self._write is not None and self._write.problem is not None

    def save(self, state: TrainState, pieces: Iterable[Fragment], facts: dict[str, Any]) -> None:
        """Begin the checkpoint of `state`; every rank calls it. A save that still goes on is waited for.

        Without `background` it is safe on disk when this returns. Raises CheckpointError as `finish` does.
        """
        self.finish()
        self.runtime.mark("save", state.step)
        copies = [self._copied(piece) for piece in pieces]
        self._about = (state, facts)
        self._write = Write(self._aside, self.runtime.rank, copies)
        self._write.start()
        if not self.config.background:
            self.finish()

    def hear(self, some_write: bool, some_failed: bool) -> None:
        """Finish the save when no rank writes any more or one has failed; all ranks give the same two flags."""
        if some_failed or not some_write:
            self.finish()

    def finish(self) -> None:
        """If a save goes on, wait for it and give it its manifest and name; every rank calls it.

        Raises CheckpointError on every rank if any rank could not write; what it wrote is removed then, and every
        earlier checkpoint is untouched.
        """
        write, self._write = self._write, None
        if write is None:
            return
        (state, facts), aside = self._about, self._aside
        self.runtime.mark("save", state.step)
        write.join()
        layout = checkpoint.layout(write.pieces)
        written: list[Any] = self.runtime.gather((write.path.name, write.entry, layout, write.problem))
        self._agree([problem for *_, problem in written])
        problem = None
        if self.runtime.is_first:
            files = {name: (entry, of_rank) for name, entry, of_rank, _ in written}
            problem = _attempt(lambda: checkpoint.commit(aside, self._target, state, files, facts))
        self._agree(self.runtime.gather(problem))
        if self.runtime.is_first:
            self._remove_old(state.step)
        if self.uploader is not None:
            self.uploader.add(self._target)

    def close(self) -> None:
        """Finish the save that goes on, and wait for checkpoints on their way to an address; every rank calls it."""
        self.finish()
        if self.config.upload:
            wait_at_end(self.uploader, self._about[0].step, self.runtime)
            if self.runtime.is_first:
                self._remove_old(self._about[0].step)  # what had to stay as long as it was on its way

    def wait(self) -> None:
        """Wait for this rank's write alone; what it wrote does not become a checkpoint."""
        if self._write is not None:
            self._write.join()

    @property
    def _target(self) -> Path:
        return self.run_dir / "checkpoints" / f"step-{self._about[0].step:08d}"

    @property
    def _aside(self) -> Path:
        return self._target.with_name(f".writing-{self._target.name}")

    def _remove_old(self, newest: int) -> None:
        if self.uploader is None:
            checkpoint.remove_old(self.run_dir, newest, self.config)
        else:
            with self.uploader.changed:
                checkpoint.remove_old(self.run_dir, newest, self.config, self.uploader.current)

    def _copied(self, piece: Fragment) -> Fragment:
        """The piece in this saver's own host memory: the next step changes the engine's."""
        copies = {}
        for key, tensor in piece.tensors.items():
            host = self._host.get((piece.name, key))
            if host is None or host.numel() != tensor.numel():
                host = self._host[piece.name, key] = torch.empty(tensor.numel(), dtype=torch.float32)
            copies[key] = host.copy_(tensor)
        return replace(piece, tensors=copies)

    def _agree(self, problems: list[Any]) -> None:
        """Raise on every rank if any rank had a problem; `problems` is in the order of ranks."""
        for rank, reason in enumerate(problems):
            if reason is None:
                continue
            if self.runtime.is_first:
                shutil.rmtree(self._aside, ignore_errors=True)
            raise CheckpointError(
                f"{self._target.parent}: rank {rank} could not write its part of the checkpoint ({reason}). Earlier "
                f"checkpoints are untouched. Make room or write access there, then start the same command again: it "
                f"goes on from the newest."
            )


@contextmanager
def open_saver(run_dir: Path, config: CheckpointConfig, runtime: Runtime) -> Iterator[Saver]:
    """The saver of a run; every rank opens it. At the end the save that goes on is finished.

    After an error there is no asking the other ranks any more, which may not have met it: only this rank's write is
    waited for, and the checkpoint before is the newest.
    """
    if runtime.is_first:
        checkpoint.remove_leftovers(run_dir)
    runtime.barrier()  # nobody writes before
    saver = Saver(run_dir, config, runtime)
    try:
        yield saver
    except BaseException:
        saver.wait()
        raise
    saver.close()


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Write flat fp32 CPU `tensors` into a file, flushed to disk; returns its size and hash for the manifest.

    Why not safetensors' own `save_file`: it holds the interpreter while it writes, and the training loop with it. The
    layout is https://huggingface.co/docs/safetensors: the header's length, the header in JSON, the numbers.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, num_bytes = xxhash.xxh3_128(), 0
    with path.open("wb", buffering=0) as file:
        views = [memoryview(len(text).to_bytes(8, "little") + text)]
        views += [tensor.numpy().data.cast("B") for tensor in tensors.values()]
        for view in views:
            for start in range(0, len(view), BLOCK_BYTES):
                block = view[start : start + BLOCK_BYTES]
                digest.update(block)
                num_bytes += len(block)
                while block:  # a disk that gets full takes a part first, and the rest with an error
                    block = block[file.write(block) :]
        os.fsync(file.fileno())
    return {"bytes": num_bytes, "xxh3_128": digest.hexdigest()}


def _tensors(pieces: list[Fragment]) -> dict[str, torch.Tensor]:
    return {f"{key}/{p.name}": tensor for p in pieces for key, tensor in p.tensors.items() if tensor.numel()}


def _attempt(action: Callable[[], object]) -> str | None:
    try:
        action()
    except Exception as error:  # as in Write.run
        return _described(error)
    return None


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
