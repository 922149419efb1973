"""Checkpoints on disks of the nodes' own (`checkpoint.local_dir`): fast, but each node has its ranks' files only.

    LOCAL_DIR/NAME-ID/checkpoints/step-00000100/    NAME is the run directory's, ID lies in its checkpoints/.local-id

A node keeps the last one, and the one that is being copied to the run directory. A run always goes on from the run
directory: if the nodes that are here have together all files of a newer checkpoint, its copying is finished first. So
the number of ranks may change, and what is used has been checked as a whole. A node that is gone takes its files with
it; then the newest in the run directory is the one. The ID keeps a run that is begun anew, with its directory removed,
from finding what the one before has left on the nodes; that has to be removed by hand.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from pretrain import checkpoint
from pretrain.checkpoint import Checkpoint, CheckpointError
from pretrain.copies import bring, copy_file, on_first
from pretrain.runtime import Runtime


def folder(local_dir: str, run_dir: Path, runtime: Runtime) -> Path:
    """Where on this node the checkpoints of the run are; every rank calls it."""
    place = run_dir / "checkpoints" / ".local-id"

    def identity() -> str:
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        return place.read_text(encoding="utf-8")

    name = run_dir.absolute().name
    return Path(local_dir).expanduser().absolute() / f"{name}-{on_first(str(run_dir), identity, runtime)}"


def bring_newer(
    local_dir: str, run_dir: Path, found: Checkpoint | None, say: Callable[[str], None], runtime: Runtime
) -> Checkpoint | None:
    """The newest checkpoint that the nodes have whole between them, copied into `run_dir`; `found` if none is newer.

    Every rank calls it. Those with missing or damaged files are named through `say` and passed over.
    """
    here = _complete(folder(local_dir, run_dir, runtime))
    everywhere: list[Any] = runtime.gather({name: (held.hash, held.files) for name, held in here.items()})
    steps = {checkpoint.step_of(name) or 0: name for one in everywhere for name in one}
    for step in sorted(steps, reverse=True):
        if found is not None and step <= found.step:
            break
        held = [one.get(steps[step], ("", [])) for one in everywhere]  # by rank
        try:
            return _bring(here.get(steps[step]), held, run_dir / "checkpoints" / steps[step], say, runtime)
        except CheckpointError as error:
            say(f"{error}; going back to an earlier checkpoint")
    return found


@dataclass(frozen=True)
class _Held:
    """What this node has of one checkpoint."""

    path: Path
    manifest: bytes
    files: list[str]  # of the size that the manifest says

    @property
    def hash(self) -> str:
        return xxhash.xxh3_128_hexdigest(self.manifest)


def _complete(root: Path) -> dict[str, _Held]:
    """All that this node has, by the checkpoint's name."""
    found = {}
    for path in checkpoint.step_directories(root):
        try:
            content = (path / "manifest.json").read_bytes()
            files = checkpoint.parse_manifest(content, str(path))["files"]
            here = [f for f, e in files.items() if (path / f).is_file() and (path / f).stat().st_size == e["bytes"]]
        except (CheckpointError, OSError, ValueError, KeyError, TypeError):
            continue  # unfinished or damaged; others may have it
        found[path.name] = _Held(path, content, here)
    return found


def _bring(
    here: _Held | None,
    held: list[tuple[str, list[str]]],
    target: Path,
    say: Callable[[str], None],
    runtime: Runtime,
) -> Checkpoint:
    """Copy one checkpoint into the run directory; `held` is each rank's (hash of the manifest, files)."""
    source = f"{target.name} in checkpoint.local_dir"
    first = next(rank for rank, (hash, _) in enumerate(held) if hash)
    holders: dict[str, list[int]] = {}
    for rank, (hash, files) in enumerate(held):
        for file in files if hash == held[first][0] else []:
            holders.setdefault(file, []).append(rank)
    manifests: list[Any] = runtime.gather(here.manifest if here and runtime.rank == first else None)
    content: bytes = manifests[first]
    if missing := sorted(checkpoint.parse_manifest(content, source)["files"].keys() - holders.keys()):
        raise CheckpointError(f"{source}: no node that is here has {', '.join(missing)}")

    def share(names: list[str]) -> list[str]:
        return [name for n, name in enumerate(names) if holders[name][n % len(holders[name])] == runtime.rank]

    def get(name: str, path: Path) -> None:
        assert here is not None
        copy_file(here.path / name, path)

    say(f"copying {source}")
    return bring(source, content, get, share, target, runtime)
