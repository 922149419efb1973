"""Checkpoints that are whole or do not exist, and that any number of ranks can read.

A checkpoint is a directory `step-00000100/` with one safetensors file per rank (its piece of every parameter and of
the optimizer's state, flat fp32) and `manifest.json`: sizes and xxh3 hashes of the files, where each piece belongs and
which tensors it has, the run's `TrainState`, the facts the run depends on, and in its last line a checksum of all lines
before it, so no byte of a checkpoint is used unchecked. All of it is written into a hidden directory, flushed to disk,
and renamed at the end by rank 0 (see `saver`), so a crash at any moment leaves the earlier checkpoints and at most a
hidden leftover. No pickle is involved.

Why not DeepSpeed's own files: they are pickles, they hold one opaque buffer per rank, and another number of ranks needs
an offline conversion. Here a rank that loads reads the slices it owns out of whatever pieces there are.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from configs.schema import CheckpointConfig
from pretrain.checkpoint_check import manifest_fault
from pretrain.runtime import Runtime
from pretrain.state import TrainState

FORMAT = 3
BLOCK_BYTES = 1 << 24  # written and hashed at once, without holding the interpreter
FLUSH_BYTES = 1 << 28


@dataclass
class Fragment:
    """One rank's contiguous piece of one parameter; the tensors are flat, fp32, of equal length."""

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    start: int  # index of the first element in the flattened parameter
    tensors: dict[str, torch.Tensor]  # master, exp_avg, exp_avg_sq


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message names the file, the rank and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    state: TrainState
    facts: dict[str, Any]
    pieces: dict[str, list[dict[str, Any]]]  # parameter -> [{file, start, length, keys}, ...] in order of start
    shapes: dict[str, tuple[int, ...]]

    @property
    def step(self) -> int:
        return self.state.step


def newest_valid(
    run_dir: Path,
    say: Callable[[str], None] = print,
    runtime: Runtime | None = None,
    last: float = math.inf,
) -> Checkpoint | None:
    """The checkpoint with the highest step, at most `last`, whose every file has its recorded size and hash.

    Damaged ones are named through `say` and passed over, never removed. With a `runtime` every rank calls it, and all
    get the same one: the first rank's list is taken, and they share the checking, see `open_checkpoint`.
    """
    paths: Any = [path for path in step_directories(run_dir) if (step_of(path.name) or 0) <= last]
    if runtime is not None:
        paths = runtime.gather(paths)[0]
    for path in reversed(paths):
        try:
            return open_checkpoint(path, runtime)
        except CheckpointError as error:
            say(f"{error}; going back to an earlier checkpoint")
    return None


def open_checkpoint(path: Path, runtime: Runtime | None = None) -> Checkpoint:
    """Check sizes and hashes of all files and return where everything lies. Raises CheckpointError naming the file.

    With a `runtime` every rank calls it: each hashes its share of the files, and what any of them finds is raised on
    all. So a checkpoint is read once to be checked, not once per rank.
    """
    rank, world_size = (runtime.rank, runtime.world_size) if runtime else (0, 1)
    found, problem = None, None
    try:
        found = _check(path, rank, world_size)
    except CheckpointError as error:
        problem = str(error)
    problems = [p for p in (runtime.gather(problem) if runtime else [problem]) if p is not None]
    if problems or found is None:
        raise CheckpointError(problems[0])
    return found


def _check(path: Path, rank: int, world_size: int) -> Checkpoint:
    """The checkpoint, after this rank has looked at all sizes and at the hash of every `world_size`-th file."""
    try:
        manifest = _read_manifest(path)
        for number, (name, expected) in enumerate(sorted(manifest["files"].items())):
            _check_size(path / name, expected)
            if number % world_size == rank:
                _check_hash(path / name, expected)
        shapes = {name: tuple(entry["shape"]) for name, entry in manifest["parameters"].items()}
        pieces = {name: entry["pieces"] for name, entry in manifest["parameters"].items()}
        return Checkpoint(path, TrainState.from_json(manifest["state"]), manifest["facts"], pieces, shapes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: manifest.json cannot be read ({type(error).__name__}: {error})") from error


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint at `path`, every byte of it checked.

    Raises CheckpointError, and OSError, ValueError, KeyError or TypeError for what is no manifest at all.
    """
    return parse_manifest((path / "manifest.json").read_bytes(), str(path))


def parse_manifest(content: bytes, place: str) -> dict[str, Any]:
    """The manifest with this `content`, of the checkpoint at `place`; raises as `_read_manifest` does."""
    try:
        manifest: dict[str, Any] = json.loads(content)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{place}: format {manifest['format']} is not the {FORMAT} this version reads")
    text = content[: content.rfind(b",")]
    if content != text + _last_line(text):
        raise CheckpointError(f"{place}: manifest.json is damaged or was edited (its checksum does not fit)")
    if fault := manifest_fault(manifest):
        raise CheckpointError(f"{place}: manifest.json: {fault}")
    return manifest


def _last_line(text: bytes) -> bytes:
    return f',\n"checksum": "{xxhash.xxh3_128_hexdigest(text)}"\n}}\n'.encode()


def check_facts(checkpoint: Checkpoint, facts: dict[str, Any]) -> None:
    """Raises CheckpointError unless `facts`, what samples and optimizer state depend on, are those it was written with.

    The optimizer's are compared where both have them: the first checkpoints did not say its type.
    """
    for name in sorted(facts.keys() | checkpoint.facts.keys()):
        now = facts.get(name)
        is_of_optimizer = name.startswith("optimizer.")
        if is_of_optimizer and (name not in checkpoint.facts or name not in facts):
            continue
        if name not in checkpoint.facts:
            raise CheckpointError(
                f"{checkpoint.path}: does not say what {name} was, now it is {now}: written without that setting or by "
                f"another version of millstream. Go on without it or with that version, or start a new run_dir"
            )
        if checkpoint.facts[name] != now:
            why = "the order of the samples would change in the middle of the run"
            if name.startswith("model."):
                why = "the same weights would be another model"
            if is_of_optimizer:
                why = "the optimizer's saved state means something else to another one"
            raise CheckpointError(
                f"{checkpoint.path}: was written with {name}={checkpoint.facts[name]}, now it is {now}; {why}. "
                f"Restore it, or start a new run_dir"
            )


def check_parameters(checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError unless the parameters of the model, name -> shape, are those it was written with.

    Slices of a parameter of another shape would be numbers like any other, and the run would go on with them.
    """
    for name in sorted(shapes.keys() | checkpoint.shapes.keys()):
        then, now = checkpoint.shapes.get(name), shapes.get(name)
        if then != now:
            raise CheckpointError(
                f"{checkpoint.path}: has {_described(then)} as parameter `{name}`, the model has {_described(now)}: "
                f"the model section is not the one it was written with. Restore it, or start a new run_dir"
            )


def _described(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else " x ".join(map(str, shape))


def reader(checkpoint: Checkpoint) -> Callable[[str, str, int, int], torch.Tensor]:
    """A function (parameter, "master" or a state's key, start, length) -> flat fp32 tensor, from the pieces on disk."""
    try:
        files = {name: safe_open(checkpoint.path / name, framework="pt") for name in file_names(checkpoint)}
    except SafetensorError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error

    def read(parameter: str, key: str, start: int, length: int) -> torch.Tensor:
        if parameter not in checkpoint.pieces:
            raise CheckpointError(
                f"{checkpoint.path}: has no parameter `{parameter}`; the model section of the configuration is not the "
                f"one this checkpoint was written with"
            )
        parts = []
        for piece in checkpoint.pieces[parameter]:
            low, high = max(start, piece["start"]), min(start + length, piece["start"] + piece["length"])
            if low < high:
                if key not in piece["keys"]:
                    raise CheckpointError(
                        f"{checkpoint.path}: has no `{key}` of parameter `{parameter}`, which the optimizer keeps: "
                        f"train.optimizer is not what it was written with. Restore it, or start a new run_dir"
                    )
                try:
                    whole = files[piece["file"]].get_slice(f"{key}/{parameter}")
                except SafetensorError as error:
                    raise CheckpointError(f"{checkpoint.path / piece['file']}: {error}") from error
                if whole.get_shape() != [piece["length"]]:
                    found = f"{key}/{parameter} of shape {whole.get_shape()}"
                    raise CheckpointError(
                        f"{checkpoint.path / piece['file']}: has {found}, the manifest says {piece['length']} elements"
                    )
                parts.append(whole[low - piece["start"] : high - piece["start"]])
        if sum(map(len, parts)) != length:
            raise CheckpointError(
                f"{checkpoint.path}: the pieces of parameter `{parameter}` do not make up its elements from {start} to "
                f"{start + length - 1}"
            )
        return torch.cat(parts) if parts else torch.empty(0)

    return read


def weights(checkpoint: Checkpoint, key: str = "master") -> Callable[[str], torch.Tensor]:
    """A function parameter -> its whole fp32 tensor, or its average with key "ema"; only that one is in memory."""
    read = reader(checkpoint)

    def weight(parameter: str) -> torch.Tensor:
        shape = checkpoint.shapes.get(parameter, ())  # `read` says so if it has none
        return read(parameter, key, 0, torch.Size(shape).numel()).view(shape)

    return weight


def layout(pieces: list[Fragment]) -> dict[str, Any]:
    """What the manifest says about one rank's pieces: parameter -> {shape, start, length, keys}."""
    return {
        p.name: {"shape": p.shape, "start": p.start, "length": p.tensors["master"].numel(), "keys": list(p.tensors)}
        for p in pieces
    }


def commit(
    aside: Path,
    target: Path,
    state: TrainState,
    files: dict[str, tuple[dict[str, Any], Any]],
    facts: dict[str, Any],
    all_here: bool = True,
) -> None:
    """Make a checkpoint of the directory `aside`, in which all ranks have written: the manifest, flushed, and its name.

    `files` has each rank's file, in the order of ranks: its size and hash, and the `layout` of its pieces. Raises
    CheckpointError if one is not there, as when ranks do not share the file system; a node's own disk, which they do
    not share, has not `all_here`.
    """
    parameters: dict[str, Any] = {}
    for name, (expected, pieces) in files.items():
        if all_here:
            _check_size(aside / name, expected)
        for parameter, piece in pieces.items():
            entry = parameters.setdefault(parameter, {"shape": piece["shape"], "pieces": []})
            if piece["length"]:
                entry["pieces"].append({"file": name} | {key: piece[key] for key in ("start", "length", "keys")})
    about = {"format": FORMAT, "state": state.to_json(), "facts": facts}
    manifest = {**about, "files": {name: expected for name, (expected, _) in files.items()}, "parameters": parameters}
    text = json.dumps(manifest).removesuffix("}").encode()
    (aside / "manifest.json").write_bytes(text + _last_line(text))
    flush(aside / "manifest.json")
    flush(aside)
    give_name(aside, target)


def give_name(aside: Path, target: Path) -> None:
    """The last act of a checkpoint's making: all that lies in `aside` was flushed."""
    old = target.with_name(f".removing-{target.name}")
    if target.exists():  # the same step once more, after a resume from an earlier one: the new one replaces it
        target.rename(old)  # not removed first: at a crash meanwhile there would be neither
    aside.rename(target)
    flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_old(run_dir: Path, newest: int, config: CheckpointConfig, busy: Path | None = None) -> None:
    """Remove the checkpoints before step `newest`, which was just written, that `config` does not keep.

    Those of later steps stay: they were found damaged when the run went on from an earlier one. So does `busy`, which
    is being copied elsewhere.
    """
    paths = {step: path for path in step_directories(run_dir) if (step := step_of(path.name) or 0) <= newest}
    losses = {step: _eval_loss(path) for step, path in paths.items()} if config.keep_best else {}
    for step in paths.keys() - kept(list(paths), losses, config):
        if paths[step] != busy:
            _remove(paths[step])


def remove_all_but(run_dir: Path, steps: set[int]) -> None:
    """Remove all checkpoints but those of `steps`."""
    for path in step_directories(run_dir):
        if step_of(path.name) not in steps:
            _remove(path)


def remove_after(run_dir: Path, step: int) -> None:
    """Remove all checkpoints of steps after `step`, the newest first."""
    for path in reversed(step_directories(run_dir)):
        if (step_of(path.name) or 0) > step:
            _remove(path)


def _remove(path: Path) -> None:
    aside = path.with_name(f".removing-{path.name}")
    path.rename(aside)  # first, or a crash would leave half of it under its name
    shutil.rmtree(aside)


def kept(steps: list[int], losses: dict[int, float | None], config: CheckpointConfig) -> set[int]:
    """Which of `steps` stay: the newest, every so many, and the best by their evaluation; of equals the earlier."""
    newest = sorted(steps)[-config.keep_last :]
    regular = [step for step in steps if config.keep_every_steps and step % config.keep_every_steps == 0]
    ranked = sorted((loss, step) for step, loss in losses.items() if loss is not None and not math.isnan(loss))
    return {*newest, *regular, *(step for _, step in ranked[: config.keep_best])}


def remove_leftovers(run_dir: Path) -> None:
    """Remove what saves and removals that were interrupted have left; only while no rank saves."""
    for pattern in (".writing-*", ".removing-*"):
        for leftover in (run_dir / "checkpoints").glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)  # where nothing can be removed, the next save says why


def _eval_loss(path: Path) -> float | None:
    """Of the newest evaluation before it was saved; None if there was none or if it is damaged."""
    try:
        loss: float | None = _read_manifest(path)["state"]["eval_loss"]
    except (CheckpointError, OSError, ValueError, KeyError, TypeError):
        return None
    return loss


def step_directories(run_dir: Path) -> list[Path]:
    """What may be checkpoints of a run, the oldest first."""
    found = (run_dir / "checkpoints").glob("step-*")
    return sorted((path for path in found if step_of(path.name) is not None), key=lambda path: step_of(path.name) or 0)


def step_of(name: str) -> int | None:
    """The step of the checkpoint of this name; None if no checkpoint is named so."""
    match = re.fullmatch(r"step-(\d{8,})", name)
    return int(match[1]) if match else None


def state_keys(checkpoint: Checkpoint) -> set[str]:
    """Of the tensors that it has of parameters: "master" and what the optimizer kept."""
    return {key for pieces in checkpoint.pieces.values() for piece in pieces for key in piece["keys"]}


def file_names(checkpoint: Checkpoint) -> set[str]:
    return {piece["file"] for pieces in checkpoint.pieces.values() for piece in pieces}


def _check_size(path: Path, expected: dict[str, Any]) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise CheckpointError(f"{path}: has {size} bytes, the manifest says {expected['bytes']}")


def _check_hash(path: Path, expected: dict[str, Any]) -> None:
    found = file_hash(path)
    if found != expected["xxh3_128"]:
        raise CheckpointError(f"{path}: is damaged (xxh3 {found}, the manifest says {expected['xxh3_128']})")


def write_hashed(path: Path, blocks: Iterable[memoryview], count: Callable[[int], None]) -> dict[str, Any]:
    """Write a file, flushed to disk; returns its size and hash for the manifest.

    `count` is told of the bytes that are on the disk, every FLUSH_BYTES: what the kernel has taken may still wait for
    minutes. So a file of many gigabytes on a slow disk is not taken for one that stands still.
    """
    digest, num_bytes, flushed = xxhash.xxh3_128(), 0, 0
    with path.open("wb", buffering=0) as file:
        for block in blocks:
            digest.update(block)
            num_bytes += len(block)
            left = block
            while left:  # a disk that gets full takes a part first, and the rest with an error
                left = left[file.write(left) :]
            if num_bytes - flushed >= FLUSH_BYTES:
                os.fdatasync(file.fileno())
                count(num_bytes - flushed)
                flushed = num_bytes
        os.fsync(file.fileno())
        count(num_bytes - flushed)
    return {"bytes": num_bytes, "xxh3_128": digest.hexdigest()}


def file_hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
