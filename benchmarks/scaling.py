"""Scaling curves from 8 to 16,384 GPUs by the plan's model: `python -m benchmarks.scaling [--picture FILE]`.

Prints for each cluster size the fastest way that fits, and draws docs/scaling.png. Nothing is run: see
launcher/plan_scale.py for what is modelled and from which papers.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.hardware import NETWORKS, gpu
from configs.model_sizes import GPT_SIZES
from configs.schema import PretrainConfig
from launcher.plan_job import Cluster, Job, make_cluster, make_job
from launcher.plan_scale import STRATEGIES, scaled

COUNTS = [2**power for power in range(3, 15)]
LABELS = {
    "zero1": "ZeRO-1", "zero3": "ZeRO-3", "hpz": "ZeRO-3 + hpZ", "qwz": "ZeRO-3 + qwZ", "qgz": "ZeRO-3 + qgZ",
    "zero++": "ZeRO++ (all three)", "mics": "MiCS",
}  # fmt: skip
PANELS = (  # model, network, micro batch, accumulation
    ("gpt3-1.3b", "ib-8x200", 1, 1),
    ("gpt3-13b", "eth-100", 1, 8),
    ("gpt3-13b", "ib-8x200", 1, 1),
    ("gpt3-13b", "ib-8x200", 1, 8),
    ("gpt3-175b", "ib-8x400", 1, 8),
)
LONG, LONG_BATCH_TOKENS = 131_072, 4_194_304
DEGREES = (1, 8, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--picture", type=Path, default=Path("docs/scaling.png"))
    arguments = parser.parse_args()
    panels = [
        (f"{preset}, {network}, micro batch {micro} x {accumulation}", curves(preset, network, micro, accumulation))
        for preset, network, micro, accumulation in PANELS
    ]
    for title, found in panels:
        print(f"\n{title}: tokens/s of a GPU, the fastest in brackets")
        print_table(found, LABELS)
    long = long_curves()
    print(
        f"\ngpt3-1.3b, {LONG:,} tokens a sample, {LONG_BATCH_TOKENS / 1e6:.1f} M tokens a step: million tokens/s in all"
    )
    print_table(long, {degree: f"Ulysses {degree}" for degree in DEGREES})
    draw(panels, long, arguments.picture)
    print(f"\n{arguments.picture}")


def job_of(preset: str, micro: int, seq_len: int | None = None) -> Job:
    shape = GPT_SIZES[preset]
    seq_len = seq_len or shape.max_seq_len
    config = PretrainConfig.model_validate({
        "run_dir": "unused",
        "model": {"preset": preset, "max_seq_len": seq_len, "activation_checkpointing": True},
        "train": {"seq_len": seq_len, "micro_batch_size": micro, "global_batch_size": micro},
    })  # fmt: skip
    return make_job(config, None, 1)


def cluster_of(num_gpus: int, network: str) -> Cluster:
    return make_cluster(num_gpus, None, gpu("h100-80g"), NETWORKS[network])


def curves(preset: str, network: str, micro: int, accumulation: int) -> dict[Any, list[float | None]]:
    """Tokens/s of a GPU by strategy and cluster size; None: does not fit."""
    found: dict[Any, list[float | None]] = {name: [] for name in STRATEGIES}
    for num_gpus in COUNTS:
        job = replace(job_of(preset, micro), num_gpus=num_gpus, global_batch_size=micro * accumulation * num_gpus)
        for name in STRATEGIES:
            result = scaled(job, cluster_of(num_gpus, network), name)
            found[name].append(result.tokens_per_second if result.fits else None)
    return found


def long_curves() -> dict[Any, list[float | None]]:
    """Million tokens/s of the whole cluster by Ulysses degree, for a given global batch. None: no sample is left."""
    found: dict[Any, list[float | None]] = {degree: [] for degree in DEGREES}
    samples = LONG_BATCH_TOKENS // LONG
    for num_gpus in COUNTS:
        job = replace(job_of("gpt3-1.3b", 1, LONG), num_gpus=num_gpus, global_batch_size=samples)
        for degree in DEGREES:
            possible = degree <= num_gpus <= degree * samples
            result = scaled(job, cluster_of(num_gpus, "ib-8x400"), "zero3", degree) if possible else None
            found[degree].append(result.tokens_per_second * num_gpus / 1e6 if result and result.fits else None)
    return found


def print_table(found: dict[Any, list[float | None]], labels: dict[Any, str]) -> None:
    print(f"{'GPUs':>8}" + "".join(f"{labels[name]:>20}" for name in found))
    for place, num_gpus in enumerate(COUNTS):
        values = [found[name][place] for name in found]
        best = max((value for value in values if value is not None), default=None)
        shown = ["-" if v is None else f"[{v:,.5g}]" if v == best else f"{v:,.5g}" for v in values]
        print(f"{num_gpus:>8}" + "".join(f"{text:>20}" for text in shown))


def draw(
    panels: list[tuple[str, dict[Any, list[float | None]]]], long: dict[Any, list[float | None]], file: Path
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(16, 9))
    for axis, (title, found) in zip(axes.flat, panels, strict=False):
        for name, values in found.items():
            axis.plot(
                COUNTS, [v if v is not None else float("nan") for v in values], marker="o", ms=3, label=LABELS[name]
            )
        axis.set(title=title, xlabel="GPUs (H100)", ylabel="tokens/s of a GPU", xscale="log", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    axis = axes.flat[5]
    for degree, values in long.items():
        axis.plot(
            COUNTS, [v if v is not None else float("nan") for v in values], marker="o", ms=3, label=f"Ulysses {degree}"
        )
    axis.set(
        title=f"gpt3-1.3b, {LONG // 1024}k tokens a sample, 4 M a step", xlabel="GPUs (H100)",
        ylabel="million tokens/s", xscale="log", yscale="log",
    )  # fmt: skip
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    figure.suptitle("Estimated by launcher/plan_scale.py, not measured")
    figure.tight_layout()
    figure.savefig(file, dpi=80)


if __name__ == "__main__":
    main()
