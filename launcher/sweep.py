"""`millstream sweep CONFIG [key=value ...]`: fine-tunings with other settings, chosen by Optuna, one after the other.

The section `sweep` of the file has the ranges. RUN_DIR/sweep.db is Optuna's storage (SQLite), RUN_DIR/trial-0003 the
run directory of a trial. A sweep that was stopped or killed goes on with the trial it was in, from that one's
checkpoint: a choice depends on the seed, its number and the results before it, on nothing else.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from configs.load import ConfigError, changes, dump, load, load_finetune
from configs.tuning import LOWER_IS_BETTER, FinetuneConfig, RangeConfig, SweepConfig
from launcher import restarts
from launcher.local import GUARD

MAY_CHANGE = ("run_dir", "log.", "launch.", "sweep")  # of the ranges Optuna knows what may


def sweep(file: str, overrides: list[str], num_ranks: int | None) -> int:
    """Make the trials that are missing, write the table and the best trial's configuration; returns the exit code."""
    config = load_finetune(file, overrides)
    if config.sweep is None:
        raise ConfigError(f"{file}: has no section `sweep`, with a metric and ranges; see docs/finetuning.md")
    check_ranges(file, overrides, config.sweep)
    run_dir = prepare(config)
    study = open_study(run_dir, config.sweep)
    while (trial := next_trial(study, config.sweep)) is not None:
        own = load_finetune(
            file, [*overrides, *words_of(trial.params), "sweep=null", f"run_dir={run_of(run_dir, trial)}"]
        )
        path = run_of(run_dir, trial).with_suffix(".yaml")
        path.write_text(dump(own), encoding="utf-8")
        print(f"trial {trial.number + 1} of {config.sweep.num_trials}: {describe(trial.params)}", flush=True)
        code = restarts.run("finetune.run", ["--config", str(path)], own, num_ranks)
        if code == GUARD:  # the settings do not work: that is a result
            study.tell(trial.number, state=failed())
        elif code != 0:
            print(f"trial {trial.number + 1} ended with {code}; the same command goes on with it", flush=True)
            return code
        else:
            study.tell(trial.number, result_of(run_of(run_dir, trial), config.sweep.metric))
        report(file, overrides, config, study, run_dir)
    report(file, overrides, config, study, run_dir)
    print((run_dir / "sweep.md").read_text(encoding="utf-8"))
    return 0


def check_ranges(file: str, overrides: list[str], settings: SweepConfig) -> None:
    """Raises ConfigError where an end of a range, or a value, is none that the configuration may have."""
    for key, of in settings.ranges.items():
        if key.partition(".")[0] in ("run_dir", "sweep"):
            raise ConfigError(f"sweep.ranges: {key} is no setting of a trial; leave it out")
        for value in [of.low, of.high] if isinstance(of, RangeConfig) else of:
            try:
                load(file, [*overrides, *words_of({key: value})])
            except ConfigError as error:
                raise ConfigError(f"sweep.ranges: {key}={value} is not valid: {error}") from None


def prepare(config: FinetuneConfig) -> Path:
    """Make the run directory; a sweep that has begun there must be of the same configuration."""
    run_dir = Path(config.run_dir)
    if (run_dir / "sweep.db").exists() and (
        changed := changes(load_finetune(run_dir / "config.yaml"), config, MAY_CHANGE)
    ):
        raise ConfigError(
            f"run_dir={run_dir}: holds a sweep with {'; '.join(changed)}. Restore it to go on, or choose another "
            f"run_dir"
        )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(dump(config), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"run_dir={run_dir}: cannot be written ({error}); choose one you can write to") from None
    return run_dir


def open_study(run_dir: Path, settings: SweepConfig) -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(f"millstream sweep needs optuna ({error}); pip install 'millstream[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    direction = optuna.study.StudyDirection(1 if settings.metric in LOWER_IS_BETTER else 2)  # minimize, maximize
    storage = f"sqlite:///{(run_dir / 'sweep.db').absolute()}"
    return optuna.create_study(storage=storage, study_name=settings.metric, direction=direction, load_if_exists=True)


def next_trial(study: Any, settings: SweepConfig) -> Any:
    """The trial that was going on when the sweep ended, or a new one; None when there are enough."""
    import optuna

    trials = study.trials
    if interrupted := [trial for trial in trials if trial.state == optuna.trial.TrialState.RUNNING]:
        return interrupted[0]
    if len(trials) >= settings.num_trials:
        return None
    seed = settings.seed + 1_000_003 * len(trials)  # a generator of its own: there is no state to save
    sampler = optuna.samplers.TPESampler if settings.sampler == "tpe" else optuna.samplers.RandomSampler
    study.sampler = sampler(seed=seed)
    try:
        return study.ask({key: distribution(of) for key, of in settings.ranges.items()})
    except ValueError as error:
        raise ConfigError(f"sweep.ranges: {error}. Restore the lists of values, or choose another run_dir") from None


def distribution(of: RangeConfig | list[Any]) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(of, list):
        return CategoricalDistribution(of)
    if all(isinstance(value, int) for value in (of.low, of.high, of.step or 1)):
        return IntDistribution(int(of.low), int(of.high), of.log, int(of.step or 1))
    return FloatDistribution(of.low, of.high, of.log, of.step)


def words_of(params: dict[str, Any]) -> list[str]:
    """The parameters as words of a command line, values as YAML reads them."""
    return [f"{key}={json.dumps(value)}" for key, value in params.items()]


def failed() -> Any:
    from optuna.trial import TrialState

    return TrialState.FAIL


def run_of(run_dir: Path, trial: Any) -> Path:
    return run_dir / f"trial-{trial.number:04d}"


def result_of(trial_dir: Path, metric: str) -> float:
    """The metric's mean. Raises ConfigError where a run has none of that name."""
    results = json.loads((trial_dir / "results.json").read_text(encoding="utf-8"))
    if metric not in results or "mean" not in results[metric]:
        found = ", ".join(name for name, value in results.items() if isinstance(value, dict))
        raise ConfigError(f"sweep.metric={metric}: there is no such metric in {trial_dir}/results.json; it has {found}")
    return float(results[metric]["mean"])


def describe(params: dict[str, Any]) -> str:
    return ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in params.items()
    )


def report(file: str, overrides: list[str], config: FinetuneConfig, study: Any, run_dir: Path) -> None:
    """Write sweep.md, the best trial first, and best.yaml; keep the model of the best trial alone."""
    assert config.sweep is not None
    sign = 1 if config.sweep.metric in LOWER_IS_BETTER else -1
    trials = sorted(
        (trial for trial in study.trials if trial.state.is_finished()),
        key=lambda trial: (sign * trial.value if trial.value is not None else math.inf, trial.number),
    )
    keys = list(config.sweep.ranges)
    lines = [f"| trial | {config.sweep.metric} | spread | {' | '.join(keys)} |", "| --- " * (3 + len(keys)) + "|"]
    for trial in trials:
        result = "not finite | "
        if trial.value is not None:
            results = json.loads((run_of(run_dir, trial) / "results.json").read_text(encoding="utf-8"))
            result = f"{trial.value:.4f} | {results[config.sweep.metric]['spread']:.4f}"
        values = [describe({key: trial.params[key]}).partition("=")[2] for key in keys]
        lines.append(f"| {run_of(run_dir, trial).name} | {result} | {' | '.join(values)} |")
    (run_dir / "sweep.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if trials and trials[0].value is not None:
        best = [*overrides, *words_of(trials[0].params), "sweep=null", f"run_dir={run_dir / 'best'}"]
        (run_dir / "best.yaml").write_text(dump(load_finetune(file, best)), encoding="utf-8")
        for trial in trials[1:]:
            shutil.rmtree(run_of(run_dir, trial) / "model", ignore_errors=True)
