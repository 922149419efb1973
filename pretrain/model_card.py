"""The README.md of an export: what was trained on what, how far, at what cost, and what it reached there.

The head is what model hubs read. What a run does not know is said to be unknown: nothing here is guessed.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from configs.launches import read_launch
from configs.model_sizes import GPTShape, model_shape
from configs.schema import PretrainConfig
from data_pipeline.samples import tokens_before
from pretrain.checkpoint import Checkpoint
from pretrain.metrics import read_metrics
from pretrain.models.hf_config import CLASSES
from pretrain.report import curves, duration

METRICS = {
    "eval_loss": "held-out loss",
    "eval_loss_mlm": "held-out masked-word loss",
    "eval_loss_nsp": "held-out next-sentence loss",
    "eval_perplexity": "perplexity",
    "eval_ema_loss": "held-out loss of the averaged weights",
}
CURVE, DATA_CARD = "training_curve.svg", "data_card.html"

CARD = """---
library_name: transformers
pipeline_tag: {pipeline_tag}
tags: [{tag}, pretrained, millstream]
license: other
---
# {title}

{article} pretrained with millstream, a `{hf_class}`: {shape}.

## Training

| | |
| --- | --- |
{training}

{curve}## Evaluation

{evaluation}
## Data

{data}

## Licence and use

{terms}

## Loading

{loading}
"""
HF_LOADING = """    from transformers import {auto}, AutoTokenizer
    model = {auto}.from_pretrained("{name}")
    tokenizer = AutoTokenizer.from_pretrained("{name}")

`parity.json` holds the largest difference between the training model's logits and those of this directory, loaded by
transformers."""
OTHER_LOADING = """This is the format `{format}` of `millstream export`. `parity.json` holds the largest difference
between the training model's logits and those of the written files, read back."""


def write_card(
    config: PretrainConfig, found: Checkpoint, run_dir: Path, directory: Path, which: str, kind: str
) -> None:
    """Write README.md into `directory`, with the training curve and the dataset's card beside it where there are any.

    which: "last" or "ema", the weights exported; kind: the export's format.
    """
    lines = [line for line in read_metrics(run_dir) if line["step"] <= found.step]
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_loss" in line]
    if steps:
        (directory / CURVE).write_bytes(curves(steps, evaluations))
    folder = dataset_folder(config, found)
    if folder and (folder / "card.html").is_file():
        shutil.copyfile(folder / "card.html", directory / DATA_CARD)
    shape = model_shape(config.model, found.shapes["word_embeddings.weight"][0], config.train.longest_seq_len)
    is_gpt = isinstance(shape, GPTShape)
    auto = "AutoModelForCausalLM" if is_gpt else "AutoModelForMaskedLM"
    count = sum(math.prod(size) for size in found.shapes.values())
    licences = {Path(source).name: licence for source, licence in config.data.build.licences.items()}
    loading = HF_LOADING if kind == "hf" else OTHER_LOADING
    card = CARD.format(
        pipeline_tag="text-generation" if is_gpt else "fill-mask",
        tag="GPT" if is_gpt else "BERT",
        article="A GPT" if is_gpt else "A BERT",
        hf_class=CLASSES[shape.style.model_type],
        title=run_dir.resolve().name,
        shape=f"{shape.num_layers} layers of width {shape.hidden_size}, {shape.num_heads} heads"
        f"{f' ({shape.kv_heads} of keys and values)' * (shape.kv_heads != shape.num_heads)}, vocabulary "
        f"{shape.vocab_size:,}, {count:,} parameters",
        training="\n".join(f"| {name} | {value} |" for name, value in training(config, found, steps, which, run_dir)),
        curve=f"![loss, rate, gradient norm and speed]({CURVE})\n\n" if steps else "",
        evaluation=evaluation(evaluations, found.step),
        data=data(config, found, (directory / DATA_CARD).is_file()),
        terms=terms(licences),
        loading=loading.format(auto=auto, name=run_dir.resolve().name, format=kind),
    )
    (directory / "README.md").write_text(card, encoding="utf-8")


def training(
    config: PretrainConfig, found: Checkpoint, steps: list[dict[str, Any]], which: str, run_dir: Path
) -> list[tuple[str, str]]:
    """(name, value) of what was done, and of what it took."""
    train, ramp = config.train, config.train.batch_ramp
    rows = [("steps", f"{found.step:,} of {train.num_steps:,}")]
    if config.model.init_from:
        rows.append(("began with the weights of", f"`{Path(config.model.init_from).name}`"))
    if which == "ema":
        rows.append(("weights", f"their moving average, decay {train.optimizer.ema_decay}"))
    batch = str(train.global_batch_size) if ramp is None else f"{ramp.start_size} to {train.global_batch_size}"
    rows += [
        ("tokens seen", f"{tokens_before(train, found.step):,}"),
        ("sequence length", str(train.longest_seq_len)),
        ("global batch", batch),
        ("optimizer", f"{train.optimizer.type}, weight decay {train.optimizer.weight_decay:g}"),
        ("peak learning rate", f"{train.optimizer.lr:g}, {train.schedule.type}"),
        ("precision", train.precision),
        ("seed", str(train.seed)),
    ]
    if steps:
        seconds = sum(line["step_seconds"] for line in steps)
        launch = read_launch(run_dir)
        on = f", on {launch.num_ranks} ranks when it was started last" if launch and launch.num_ranks else ""
        rows.append(("time in training steps", duration(seconds) + on))
        rows.append(("energy", "not measured; `millstream plan` estimates it from the boards' power"))
    return rows


def evaluation(evaluations: list[dict[str, Any]], step: int) -> str:
    """A table of the evaluation of the exported step, or of the newest one before it."""
    if not evaluations:
        return "Not evaluated on held-out text.\n"
    last = evaluations[-1]
    rows = [f"| {name} | {last[key]:.4f} |" for key, name in METRICS.items() if key in last]
    when = "" if last["step"] == step else f" at step {last['step']:,}, the newest evaluation"
    return "\n".join([f"On the dataset's validation split{when}:", "", "| | |", "| --- | --- |", *rows, ""])


def data(config: PretrainConfig, found: Checkpoint, has_card: bool) -> str:
    names = ", ".join(f"`{Path(source).name}`" for source in config.data.build.sources) or "not recorded"
    if config.data.mixture:
        names = "a mixture of " + ", ".join(f"`{name}`" for name in config.data.mixture)
    card = f" [Its card]({DATA_CARD}) says what it is made of and what each stage of its build did." if has_card else ""
    return f"Text: {names}. The dataset's fingerprint is `{found.facts['dataset']}`.{card}"


def terms(licences: dict[str, str]) -> str:
    known = "; ".join(f"`{name}`: {licence}" for name, licence in licences.items())
    texts = f"Licences of the texts: {known}." if known else "The licences of the texts were not recorded."
    return (
        f"{texts} The licence of the model is for its publisher to choose: put it into `license` at the head. A model "
        "of this kind repeats what its texts say, also what is wrong, offensive or private in them; it was not made "
        "safe for any particular use."
    )


def dataset_folder(config: PretrainConfig, found: Checkpoint) -> Path | None:
    """The folder of the training data, if it still is the dataset that the checkpoint was trained on."""
    folder = Path(config.data.dir) / "train"
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return folder if manifest.get("fingerprint") == found.facts["dataset"] else None
