"""`millstream replay RUN_DIR|CONFIG STEP [exact=false] [key=value ...]`: finds the run, then starts the ranks."""

from __future__ import annotations

import json
from pathlib import Path

from configs.load import ConfigError, load_pretrain
from launcher.local import Signals, default_num_ranks, run_local, visible_devices

FINISHED = "checkpoints/step-*/manifest.json"


def replay(place: str, step: str, words: list[str], num_ranks: int | None) -> int:
    """Returns the exit code of the ranks. Raises ConfigError for what is no run or no step of it."""
    own = [word for word in words if word.startswith("exact=")]
    overrides = [word for word in words if word not in own]
    file = Path(place) / "config.yaml" if Path(place).is_dir() else Path(place)
    if not file.exists():
        raise ConfigError(f"{place}: no run directory with a config.yaml, and no configuration")
    if Path(place).is_dir():
        overrides.insert(0, f"run_dir={place}")
    config = load_pretrain(file, overrides)
    if not step.isdigit() or not 1 <= int(step) <= config.train.num_steps:
        raise ConfigError(f"step {step}: expected a number from 1 to train.num_steps={config.train.num_steps}")
    folder = folder_of_step(Path(config.run_dir), int(step))
    ranks = num_ranks or ranks_of(folder, int(step)) or default_num_ranks()
    if devices := visible_devices():
        ranks = min(ranks, len(devices))
    rank_words = ["--config", str(file), *overrides, f"run_dir={folder}", f"step={step}", *own]
    outcome = run_local("pretrain.replay", rank_words, ranks, folder / "replay", Signals())
    return outcome.code


def folder_of_step(run_dir: Path, step: int) -> Path:
    """Where checkpoints and batch of the step are: what a stop of the guard has left, or the run directory."""
    about = run_dir / "stopped" / "batch" / "batch.json"
    if about.exists() and json.loads(about.read_text(encoding="utf-8"))["step"] == step - 1:
        return run_dir / "stopped"
    return run_dir


def ranks_of(folder: Path, step: int) -> int | None:
    """How many ranks wrote the newest checkpoint before the step: on as many the numbers are bitwise the same."""
    manifests = {int(path.parent.name.removeprefix("step-")): path for path in folder.glob(FINISHED)}
    before = [number for number in manifests if number < step]
    if not before:
        return None
    return len(json.loads(manifests[max(before)].read_text(encoding="utf-8"))["files"])
