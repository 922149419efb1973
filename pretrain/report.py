"""A run as one self-contained HTML page: what it reached, its curves, samples, configuration and environment."""

from __future__ import annotations

import base64
import html
import importlib.metadata
import io
import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.metrics import read_metrics

FILE = "report.html"
PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "datasets", "numpy")
INK, BLUE, ORANGE = "#222222", "#1f6fb2", "#d9822b"

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem; }}
h1 {{ font-size: 1.6rem; margin-bottom: 0; }} h2 {{ font-size: 1.15rem; margin-top: 2.2rem; }}
.sub {{ color: #666; margin-top: .2rem; }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(12.5rem, 1fr)); gap: .8rem; margin: 1.5rem 0; }}
.tile {{ border: 1px solid #ddd; border-radius: .5rem; padding: .7rem .9rem; }}
.tile b {{ display: block; font-size: 1.4rem; white-space: nowrap; font-variant-numeric: tabular-nums; }}
.tile span {{ color: #666; }}
img {{ max-width: 100%; height: auto; }} pre {{ background: #f6f6f6; border-radius: .5rem; padding: .9rem;
      overflow-x: auto; white-space: pre-wrap; font-size: .85rem; }}
table {{ border-collapse: collapse; }} td {{ padding: .15rem 1.2rem .15rem 0; vertical-align: top; }}
td:first-child {{ color: #666; }}
</style></head><body>
<h1>{title}</h1><p class="sub">{subtitle}</p>
<div class="tiles">{tiles}</div>
<h2>Curves</h2><img alt="loss, learning rate, gradient norm and throughput against the step" src="{curves}">
{samples}
<h2>Configuration</h2><pre>{config}</pre>
<h2>Environment</h2><table>{environment}</table>
</body></html>
"""


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html from config.yaml, metrics.jsonl and, if there, samples.json; returns its path."""
    lines = read_metrics(run_dir)
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_loss" in line]
    samples_file = run_dir / "samples.json"
    samples = json.loads(samples_file.read_text(encoding="utf-8")) if samples_file.exists() else []
    page = PAGE.format(
        title=html.escape(run_dir.name),
        subtitle=f"{len(steps):,} steps, {steps[-1]['tokens']:,} tokens" if steps else "no step yet",
        tiles="".join(f'<div class="tile"><b>{value}</b><span>{name}</span></div>' for name, value in tiles(lines)),
        curves=picture(steps, evaluations),
        samples=sample_section(samples),
        config=html.escape((run_dir / "config.yaml").read_text(encoding="utf-8")),
        environment="".join(f"<tr><td>{name}</td><td>{html.escape(value)}</td></tr>" for name, value in environment()),
    )
    path = run_dir / FILE
    path.write_text(page, encoding="utf-8")
    return path


def tiles(lines: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """(name, value) of the numbers that sum up a run."""
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_loss" in line]
    found = []
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        found.append(("held-out loss, before and after", f"{first['eval_loss']:.3f} → {last['eval_loss']:.3f}"))
        found.append(("held-out perplexity", f"{last['eval_perplexity']:.1f}"))
    if steps:
        found.append(("training loss of the last step", f"{steps[-1]['loss']:.3f}"))
        speed = statistics.median(line["tokens_per_second"] for line in steps)
        found.append(("tokens a second, median", f"{speed:,.0f}"))
        found.append(("in training steps", duration(sum(line["step_seconds"] for line in steps))))
    if skipped := sum("skipped" in line for line in steps):
        found.append(("steps without an update: loss or gradient not finite", f"{skipped:,}"))
    return found


def duration(seconds: float) -> str:
    """Seconds below two minutes, minutes below two hours, else hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def picture(steps: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]) -> str:
    """Four small plots as a data: URI."""
    return "data:image/svg+xml;base64," + base64.b64encode(curves(steps, evaluations)).decode()


def curves(steps: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]) -> bytes:
    """The four plots as SVG."""
    from matplotlib.figure import Figure  # the object interface: no window system, no global state

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    axes = figure.subplots(2, 2)
    plots = ("loss", "lr", "grad_norm", "tokens_per_second")
    titles = ("loss", "learning rate", "gradient norm, before clipping", "tokens a second")
    for axis, key, title in zip(axes.flat, plots, titles, strict=True):
        axis.plot([s["step"] for s in steps], [s[key] for s in steps], color=BLUE, linewidth=1.2, label="training")
        axis.set_title(title, loc="left", fontsize=11, color=INK)
        axis.grid(color="#eeeeee")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("step", fontsize=9)
    if evaluations:
        points = [e["step"] for e in evaluations], [e["eval_loss"] for e in evaluations]
        axes[0, 0].plot(*points, "o-", color=ORANGE, markersize=4, linewidth=1.2, label="held out")
        axes[0, 0].legend(frameon=False, fontsize=9)
    axes[1, 1].set_ylim(bottom=0)
    content = io.BytesIO()
    figure.savefig(content, format="svg")
    return content.getvalue()


def sample_section(samples: Sequence[str]) -> str:
    if not samples:
        return ""
    return "<h2>Samples</h2>" + "".join(f"<pre>{html.escape(sample)}</pre>" for sample in samples)


def environment() -> list[tuple[str, str]]:
    """(name, value): versions and the machine's processor, nothing that names a person or a path."""
    versions = [(name, importlib.metadata.version(name)) for name in PACKAGES]
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["none"]
    return [
        ("Python", platform.python_version()),
        *versions,
        ("processor", f"{platform.machine()}, {os.cpu_count()} cores"),
        ("GPUs", ", ".join(devices)),
    ]
