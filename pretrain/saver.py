"""Saving while the run goes on: what a checkpoint costs a step is a copy in memory.

At a save every rank copies its pieces of weights and optimizer state to host memory, and a thread of it writes, hashes
and flushes them in a hidden directory. The thread takes part in no collective: that the others have written too is
learnt from the flags that the loop adds up at every step anyway, so all ranks hear of it at the same step. Then rank 0
writes the manifest, flushes it and renames the directory (`checkpoint` says what is in it). A crash before that leaves
the earlier checkpoints and a hidden leftover.

The price is host memory for one copy of what the rank saves, 12 bytes per parameter with AdamW divided by the number of
ranks; it is kept from one save to the next. One write goes on at a time: a save that is due meanwhile waits for it.

With a disk of the node's own (`checkpoint.local_dir`) this happens there, and a second thread copies the newest that is
finished to the run directory. It may take longer than the saves are apart: those in between are passed over.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from configs.phases import byte_counter, ring_path
from configs.schema import CheckpointConfig
from pretrain import checkpoint, local_copies
from pretrain.checkpoint import CheckpointError, Fragment
from pretrain.copies import copy_file
from pretrain.runtime import Runtime
from pretrain.state import TrainState
from pretrain.upload import Uploader, wait_at_end


class Writing(threading.Thread):
    """Makes this rank's file of one checkpoint; afterwards there is an `entry` for the manifest, or a `problem`."""

    def __init__(self, path: Path, make: Callable[[Path], dict[str, Any]], daemon: bool) -> None:
        super().__init__(name="checkpoint", daemon=daemon)
        self.path, self.make = path, make
        self.entry: dict[str, Any] | None = None
        self.problem: str | None = None
        self.seconds = 0.0

    def run(self) -> None:
        began = time.perf_counter()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.entry = self.make(self.path)
            self.seconds = time.perf_counter() - began
        except Exception as error:  # whatever it is, the other ranks have to hear of it
            self.problem = _described(error)
            self.path.unlink(missing_ok=True)  # at once: the room on a full disk is needed for the run's other files


@dataclass
class Save:
    """A checkpoint that is being made in `root`, the run directory or a folder on the node's own disk."""

    root: Path
    state: TrainState
    facts: dict[str, Any]
    layout: dict[str, Any]  # of this rank's file
    thread: Writing

    @property
    def target(self) -> Path:
        return self.root / "checkpoints" / f"step-{self.state.step:08d}"


class Saver:
    """Saves checkpoints of a run, see above; made by `open_saver`."""

    def __init__(self, run_dir: Path, config: CheckpointConfig, runtime: Runtime, local: Path | None) -> None:
        self.run_dir, self.config, self.runtime, self.local = run_dir, config, runtime, local
        self._saving: Save | None = None
        self._copying: Save | None = None  # from `local` to the run directory
        self._to_copy: Save | None = None  # the newest in `local`, while an earlier one is being copied
        self._newest = 0  # step of the newest in the run directory by this saver
        self._host: dict[tuple[str, str], torch.Tensor] = {}
        self._waited = 0.0
        self._count = byte_counter(ring_path(run_dir, runtime.rank))
        self._longest: dict[Path, float] = {}  # seconds of this rank's writes, by where they went
        self.uploader = Uploader(run_dir, config.upload) if config.upload and runtime.is_first else None

    @property
    def flags(self) -> tuple[bool, bool, bool]:
        """Of this rank: whether it still writes, still copies, has failed. The loop gives `hear` those of all."""
        threads = [save.thread if save else None for save in (self._saving, self._copying)]
        writes, copies = (thread is not None and thread.is_alive() for thread in threads)
        return writes, copies, any(thread is not None and thread.problem is not None for thread in threads)

    def hear(self, some_write: bool, some_copy: bool, some_failed: bool) -> None:
        """Finish what no rank works on any more, or all if one has failed; all ranks give the same flags."""
        if self._copying and (some_failed or not some_copy):  # first: what the next line begins is not what was asked
            self._finish_copying()
        if self._saving and (some_failed or not some_write):
            self._finish_saving()

    def save(self, state: TrainState, pieces: Iterable[Fragment], facts: dict[str, Any]) -> None:
        """Begin the checkpoint of `state`; every rank calls it. A save that still goes on is waited for.

        Without `background` it is safe on disk when this returns. Raises CheckpointError as `finish` does.
        """
        self.runtime.mark("save", state.step)
        if self._saving:
            began = time.perf_counter()
            self._finish_saving()
            self._waited += time.perf_counter() - began
        copies = self._copied(pieces)
        tensors = {f"{key}/{p.name}": tensor for p in copies for key, tensor in p.tensors.items() if tensor.numel()}
        self._saving = self._begin(
            self.local or self.run_dir,
            state,
            facts,
            checkpoint.layout(copies),
            lambda path: write_safetensors(path, tensors, self._count),
        )
        if not self.config.background:
            self.finish()

    def waits(self) -> dict[str, float]:
        """`save_wait_seconds` since this was asked last, if a save that was due had to wait for the one before."""
        waited, self._waited = self._waited, 0.0
        return {"save_wait_seconds": waited} if waited else {}

    @property
    def write_seconds(self) -> float:
        """How long a save went on behind the steps, at most so far, until it was in the run directory."""
        return sum(self._longest.values()) if self.config.background else 0.0

    def finish(self) -> None:
        """Wait for all that goes on, until it is a checkpoint in the run directory; every rank calls it.

        Raises CheckpointError on every rank if any rank could not write; what it wrote is removed then, and every
        earlier checkpoint is untouched.
        """
        if self._saving:
            self._finish_saving()
        while self._copying:
            self._finish_copying()

    def forget_after(self, step: int) -> None:
        """Remove the checkpoints of later steps, which the run does not go on from; every rank calls it after `finish`.

        The newest first, so that at any moment the newest is one that the run has had. What was copied to an address
        stays there, until the run comes to its step again.
        """
        if self.runtime.is_first:
            with self.uploader.changed if self.uploader else nullcontext():
                checkpoint.remove_after(self.run_dir, step)
        if self.local is not None and self.runtime.local_rank == 0:
            checkpoint.remove_after(self.local, step)
        self.runtime.barrier()

    def close(self) -> None:
        """As `finish`, and wait for checkpoints on their way to an address; every rank calls it."""
        self.finish()
        if self.config.upload:
            wait_at_end(self.uploader, self._newest, self.runtime)
            self._remove_old()  # what had to stay as long as it was on its way

    def wait(self) -> None:
        """Wait for this rank's write alone; what it wrote does not become a checkpoint."""
        if self._saving:
            self._saving.thread.join()

    def _begin(self, root: Path, *about: Any) -> Save:
        state, facts, layout, make = about
        aside = root / "checkpoints" / f".writing-step-{state.step:08d}"
        is_copy = self.local is not None and root == self.run_dir  # after an error nobody waits for it
        thread = Writing(aside / f"rank-{self.runtime.rank:05d}.safetensors", make, is_copy)
        thread.start()
        return Save(root, state, facts, layout, thread)

    def _finish_saving(self) -> None:
        save, self._saving = self._saving, None
        assert save is not None
        if self.local is None:
            self._commit(save, self.runtime.is_first)
            self._announce(save)
            return
        if self._copying and self._copying.state.step == save.state.step:  # after a rollback: it would be replaced
            self._finish_copying()
        self._commit(save, self.runtime.local_rank == 0)
        if self._to_copy and self._must_stay(self._to_copy):
            self._finish_copying()  # which begins with this one, and leaves room for the new one
        self._to_copy = save
        if not self._copying:
            self._begin_copying()
        if self.runtime.local_rank == 0:
            steps = {wanted.state.step for wanted in (save, self._copying, self._to_copy) if wanted}
            checkpoint.remove_all_but(self.local, steps)

    def _begin_copying(self) -> None:
        save, self._to_copy = self._to_copy, None
        if save is None:
            return
        source, entry = save.target / save.thread.path.name, save.thread.entry
        self._copying = self._begin(
            self.run_dir, save.state, save.facts, save.layout, lambda path: copy_file(source, path, entry, self._count)
        )

    def _finish_copying(self) -> None:
        save, self._copying = self._copying, None
        assert save is not None
        self._commit(save, self.runtime.is_first)
        self._announce(save)
        self._begin_copying()

    def _commit(self, save: Save, is_mine: bool) -> None:
        """Wait for this rank's file and for what the others say of theirs; the rank whose `is_mine` is set ends it."""
        self.runtime.mark("save", save.state.step)
        save.thread.join()
        self._longest[save.root] = max(self._longest.get(save.root, 0.0), save.thread.seconds)
        told = (save.thread.path.name, save.thread.entry, save.layout, save.thread.problem)
        written: list[Any] = self.runtime.gather(told)
        self._agree(save, [problem for *_, problem in written], is_mine)
        problem = None
        if is_mine:
            files = {name: (entry, layout) for name, entry, layout, _ in written}
            aside, is_shared = save.thread.path.parent, save.root == self.run_dir
            problem = _attempt(
                lambda: checkpoint.commit(aside, save.target, save.state, files, save.facts, all_here=is_shared)
            )
        self._agree(save, self.runtime.gather(problem), is_mine)

    def _announce(self, save: Save) -> None:
        """A checkpoint is finished in the run directory."""
        self._newest = save.state.step
        self._remove_old()
        if self.uploader is not None:
            self.uploader.add(save.target)

    def _remove_old(self) -> None:
        if self.uploader is not None:
            with self.uploader.changed:
                checkpoint.remove_old(self.run_dir, self._newest, self.config, self.uploader.current)
        elif self.runtime.is_first:
            checkpoint.remove_old(self.run_dir, self._newest, self.config)

    def _must_stay(self, save: Save) -> bool:
        every = self.config.keep_every_steps
        return every is not None and save.state.step % every == 0

    def _copied(self, pieces: Iterable[Fragment]) -> list[Fragment]:
        """The pieces in this saver's own host memory: the next step changes the engine's."""
        copies, on_gpu = [], False
        for piece in pieces:
            tensors = {}
            for key, tensor in piece.tensors.items():
                host = self._host.get((piece.name, key))
                if host is None or host.numel() != tensor.numel():  # page-locked, or a GPU could not copy by itself
                    host = torch.empty(tensor.numel(), dtype=torch.float32, pin_memory=tensor.is_cuda)
                    self._host[piece.name, key] = host
                tensors[key] = host.copy_(tensor, non_blocking=True)
                on_gpu = on_gpu or tensor.is_cuda
            copies.append(replace(piece, tensors=tensors))
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return copies

    def _agree(self, save: Save, problems: list[Any], is_mine: bool) -> None:
        """Raise on every rank if any rank had a problem; `problems` is in the order of ranks."""
        for rank, reason in enumerate(problems):
            if reason is None:
                continue
            if is_mine:
                shutil.rmtree(save.thread.path.parent, ignore_errors=True)
            raise CheckpointError(
                f"{save.target.parent}: rank {rank} could not write its part of the checkpoint ({reason}). Earlier "
                f"checkpoints are untouched. Make room or write access there, then start the same command again: it "
                f"goes on from the newest."
            )


@contextmanager
def open_saver(run_dir: Path, config: CheckpointConfig, runtime: Runtime) -> Iterator[Saver]:
    """The saver of a run; every rank opens it. At the end the save that goes on is finished.

    After an error there is no asking the other ranks any more, which may not have met it: only this rank's write is
    waited for, and the checkpoint before is the newest.
    """
    local = local_copies.folder(config.local_dir, run_dir, runtime) if config.local_dir else None
    if runtime.is_first:
        checkpoint.remove_leftovers(run_dir)
    if local and runtime.local_rank == 0:
        checkpoint.remove_leftovers(local)
    runtime.barrier()  # nobody writes before
    saver = Saver(run_dir, config, runtime, local)
    try:
        yield saver
    except BaseException:
        saver.wait()
        raise
    saver.close()


def write_safetensors(
    path: Path, tensors: dict[str, torch.Tensor], count: Callable[[int], None] = lambda num_bytes: None
) -> dict[str, Any]:
    """Write flat fp32 CPU `tensors` into a file, flushed to disk; returns its size and hash for the manifest.

    `count` as in `checkpoint.write_hashed`.

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
    views = [memoryview(len(text).to_bytes(8, "little") + text)]
    views += [tensor.numpy().data.cast("B") for tensor in tensors.values()]
    size = checkpoint.BLOCK_BYTES
    blocks = (view[start : start + size] for view in views for start in range(0, len(view), size))
    return checkpoint.write_hashed(path, blocks, count)


def _attempt(action: Callable[[], object]) -> str | None:
    try:
        action()
    except Exception as error:  # as in Write.run
        return _described(error)
    return None


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
