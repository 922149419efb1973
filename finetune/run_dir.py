"""The run directory of fine-tuning: what it must agree with, and what a finished run leaves in it.

config.yaml, checkpoints/ (of the seed or fold that is going on), results.json (over all of them)
seed-N/ or fold-N/: metrics.jsonl, result.json (once it is finished); of folds also predictions.jsonl
predictions.jsonl, model/: of the first seed
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from configs.load import ConfigError, changes, dump, load_finetune
from configs.tuning import FinetuneConfig
from finetune.batches import count_targets
from finetune.training import Run, remove_checkpoints
from pretrain import checkpoint
from pretrain.runtime import Runtime

# What may change between the start of a run and the command that goes on with it; everything else is in its numbers.
MAY_CHANGE = (
    "run_dir",
    "log.",
    "launch.",
    "zero.",
    "deepspeed",
    "tuning.seeds",
    "tuning.micro_batch_size",
    "tuning.save_every",
    "tuning.non_finite_limit",
)


def prepare_run_dir(config: FinetuneConfig, ranks: Runtime) -> Path:
    """Make the run directory with the resolved configuration; what has begun there must be of the same one.

    Raises ConfigError on every rank where it is not, or cannot be written.
    """
    run_dir, problem = Path(config.run_dir), None
    if ranks.is_first:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            problem = other_configuration(config, run_dir)
            if problem is None:
                (run_dir / "config.yaml").write_text(dump(config), encoding="utf-8")
        except OSError as error:
            problem = f"run_dir={run_dir}: cannot be written ({error}); choose a directory you can write to"
    if reasons := [reason for reason in ranks.gather(problem) if reason]:
        raise ConfigError(str(reasons[0]))
    return run_dir


def other_configuration(config: FinetuneConfig, run_dir: Path) -> str | None:
    """What is wrong with going on in `run_dir` with `config`; None where nothing is, or nothing has begun."""
    if not (checkpoint.step_directories(run_dir) or list(run_dir.glob("*/result.json"))):
        return None
    cure = "Restore it to go on, or choose another run_dir"
    try:
        before = load_finetune(run_dir / "config.yaml")
    except ConfigError as error:
        return f"run_dir={run_dir}: holds a run of another version of millstream ({error}). Choose another run_dir"
    changed = changes(before, config, MAY_CHANGE)
    return f"run_dir={run_dir}: holds a run with {'; '.join(changed)}. {cure}" if changed else None


def say_cuts(run: Run) -> None:
    """Print how many texts were cut, of tasks that count it, and how many rows have nothing to learn from."""
    for name, rows in (("train", run.train_rows), ("dev", run.dev_rows)):
        if cut := [row["cut"] for row in rows if row.get("cut")]:
            print(f"{name}: {len(cut)} of {len(rows)} sources cut to fit tuning.max_seq_len, by {sum(cut)} tokens")
    if without := sum(not count_targets(row) for row in run.train_rows):
        print(
            f"train: {without} of {len(run.train_rows)} examples left out: their targets do not fit tuning.max_seq_len"
        )


def result_of(run_dir: Path, run: Run, ranks: Runtime) -> dict[str, float] | None:
    """The metrics of a run that is finished, else None. Raises ConfigError if it saw other examples."""
    path = run_dir / run.name / "result.json"
    found: Any = ranks.gather(json.loads(path.read_text()) if ranks.is_first and path.exists() else None)[0]
    if found is None:
        return None
    for name, now in run.facts.items():
        if found["facts"].get(name) != now:
            what = {"model.weights": "of other weights in model="}.get(name, f"of another file {name}=")
            raise ConfigError(f"{path}: is {what}, or they were changed since; choose another run_dir")
    metrics: dict[str, float] = found["metrics"]
    return metrics


def finish_run(run_dir: Path, run: Run, metrics: dict[str, float], about: dict[str, Any], ranks: Runtime) -> None:
    """Write NAME/result.json, from which on the run is finished, and remove its checkpoints; every rank calls it."""
    if ranks.is_first:
        path = run_dir / run.name / "result.json"
        write_json(path, {"metrics": metrics, **about, "facts": run.facts})
    remove_checkpoints(run_dir, ranks)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a file in one move."""
    aside = path.with_name(f".writing-{path.name}")
    aside.write_text(json.dumps(value, indent=2), encoding="utf-8")
    aside.replace(path)


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def summarise(results: list[dict[str, float]], unit: str = "seed") -> dict[str, Any]:
    """Of each metric over the runs: the mean, the spread (largest minus smallest) and the single values."""
    summary = {}
    for name in results[0]:
        values = [result[name] for result in results]
        summary[name] = {
            "mean": sum(values) / len(values),
            "spread": max(values) - min(values),
            f"per_{unit}": values,
        }
    return summary
