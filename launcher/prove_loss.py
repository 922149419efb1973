"""`millstream prove loss CONFIG [--ranks N] [steps=4] [key=value ...]`: are all ways to run it one training?

A few steps of the configuration on its own data, once for every single change from a plain float32 reference to what is
configured (loss_variants.py); losses and gradient norms are compared step by step with what rounding explains
(loss_comparison.py). The runs of one number of ranks share their processes (pretrain/prove.py). run_dir is not touched.
"""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
from pathlib import Path

from configs.compiler import what_compile_lacks
from configs.load import ConfigError, load_pretrain
from configs.schema import PretrainConfig
from launcher.local import Signals, run_local, visible_devices
from launcher.loss_comparison import (
    QUANTITIES,
    Curve,
    Difference,
    compare,
    culprits,
    expected_rounding,
    first_too_large,
    largest,
)
from launcher.loss_variants import BF16, FP64, REFERENCE, Variant, batch_sizes, loss_variants
from launcher.resume_comparison import read_lines

PROGRAM = "pretrain.prove"
DEFAULT_STEPS = 4


def prove_loss(file: str, words: list[str], num_ranks: int | None) -> int:
    """Run, compare and print; returns 0, or 1 at a difference. Raises ConfigError where the proof cannot be made."""
    overrides = [word for word in words if not word.startswith("steps=")]
    config = load_pretrain(file, overrides)
    num_steps = read_steps(words)
    ranks = num_ranks or len(visible_devices()) or 2
    lacking = what_compile_lacks()
    variants = loss_variants(config, ranks, num_steps, can_compile=lacking is None)
    for variant in variants:  # faults of the configuration show before anything is started
        load_pretrain(file, [*overrides, *variant.words])
    parent = Path(config.run_dir).absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="prove-loss-", dir=parent))
    introduce(config, ranks, num_steps)
    if lacking:
        print(f"model.compile=true is not compared: torch.compile needs {lacking}", flush=True)
    try:
        signals = Signals()
        curves: dict[str, Curve] = {}
        for number in sorted({variant.num_ranks for variant in variants}):
            runs = [variant for variant in variants if variant.num_ranks == number]
            if code := make_runs(file, overrides, runs, folder, signals):
                return code
            curves |= {line["name"]: line["curve"] for line in read_lines(folder / f"curves-{number}.jsonl")}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    num_tokens = batch_sizes(config, ranks)[0] * config.train.seq_len
    return judge(variants, curves, num_tokens)


def read_steps(words: list[str]) -> int:
    value = next((word.removeprefix("steps=") for word in reversed(words) if word.startswith("steps=")), "")
    if value and (not value.isdigit() or int(value) < 2):
        raise ConfigError(f"steps={value}: expected 2 or more: the second step shows what the first has updated")
    return int(value or DEFAULT_STEPS)


def introduce(config: PretrainConfig, num_ranks: int, num_steps: int) -> None:
    whole, _ = batch_sizes(config, num_ranks)
    print(
        f"{num_steps} steps of {whole} samples x {config.train.seq_len} tokens, at the peak rate "
        f"{config.train.optimizer.lr:g}, on 1 rank" + (f" and on {num_ranks}" if num_ranks > 1 else "")
    )
    if config.model.dropout or config.model.attention_dropout:
        print("dropout is 0 in all of them: every rank draws its own, so with it losses depend on their number")
    print("each is compared with plain PyTorch in float32 in one process, every document alone", flush=True)


def make_runs(file: str, overrides: list[str], runs: list[Variant], folder: Path, signals: Signals) -> int:
    """Make the runs, all of one number of ranks; returns 0, or the exit code of a stop or a failure."""
    number = runs[0].num_ranks
    listed = [
        {"name": run.name, "words": [*overrides, *run.words]} | ({"plain": run.plain} if run.plain else {})
        for run in runs
    ]
    jobs = folder / f"jobs-{number}.json"
    jobs.write_text(json.dumps({"config": file, "folder": str(folder), "runs": listed}), encoding="utf-8")
    print(f"{len(runs)} runs on {number} rank{'s' * (number > 1)} ...", flush=True)
    outcome = run_local(PROGRAM, [str(jobs)], number, folder, signals)
    if signals.number is not None:
        print(f"stopped by {signal.Signals(signals.number).name}: nothing is proven")
    return outcome.code


def judge(variants: list[Variant], curves: dict[str, Curve], num_tokens: int) -> int:
    """Print the table and the culprits; the exit code."""
    reference = curves[REFERENCE]
    allowed = {
        "fp32": expected_rounding(reference, curves[FP64], "fp32", num_tokens),
        "bf16": expected_rounding(curves[BF16], reference, "bf16", num_tokens),
    }
    judged = [variant for variant in variants if variant.parents]
    found = {v.name: compare(reference, curves[v.name], allowed[v.precision]) for v in judged}
    faults = {name: first_too_large(differences) for name, differences in found.items()}
    parents = {v.name: v.parents for v in judged}
    named = culprits(parents, {REFERENCE: False, **{name: fault is not None for name, fault in faults.items()}})
    print_table(found, faults, named)
    if not named:
        print(f"\nall {len(judged)} are one training: they differ by rounding alone")
        return 0
    for variant in judged:
        if variant.name in named:
            print(f"\nculprit: {variant.name}\n  {faults[variant.name]}\n  look at: {variant.look}")
    return 1


def print_table(found: dict[str, list[Difference]], faults: dict[str, Difference | None], named: list[str]) -> None:
    """Per run and quantity the difference that is largest beside what rounding explains, and that."""
    width = max(map(len, found))
    print(f"\n{'relative difference':{width}} {'loss':>8}  {'rounding':>8}  {'gradient':>8}  {'rounding':>8}")
    for name, differences in found.items():
        numbers = [largest(differences, quantity) for quantity in QUANTITIES]
        shown = "  ".join(f"{d.relative:8.1e}  {d.allowed:8.1e}" for d in numbers)
        verdict = "ok" if faults[name] is None else "DIFFERS" if name in named else "differs, too"
        print(f"{name:{width}} {shown}  {verdict}")
