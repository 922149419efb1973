"""A checkpoint -> a Hugging Face directory: `millstream export RUN_DIR [step=N] [weights=ema] [output=DIR]`.

Parameters are read from the checkpoint one at a time and written in safetensors files of bounded size, so the weights
of a model of any size pass through the host's memory only. Then the directory is loaded by transformers and its logits
are compared with those of the training model; the directory gets its name only if they agree.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

if not __package__:  # started as a file: the packages lie beside this folder, not in it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.utils import logging

from configs.load import ConfigError, load_pretrain
from configs.model_sizes import BertShape, GPTShape
from configs.schema import PretrainConfig
from data_pipeline.samples import tokens_before
from data_pipeline.tokenizer import copy_tokenizer
from pretrain import checkpoint
from pretrain.checkpoint import Checkpoint, CheckpointError
from pretrain.metrics import read_metrics
from pretrain.models import build_model, hf
from pretrain.models.bert import Bert
from pretrain.models.gpt import GPT, without_mup
from pretrain.models.hf_config import CLASSES, hf_config
from pretrain.report import write_report

Weight = Callable[[str], torch.Tensor]  # parameter -> the whole of it, fp32
KEYS = {"last": "master", "ema": "ema"}  # what is exported -> what checkpoints call it
SHARD_BYTES = 4 << 30
TOLERANCE = 1e-4  # of the largest logit: fp32 on both sides, so only the order of additions differs
GENERATE_TOKENS = 120


def main() -> int:
    try:
        return run(sys.argv[1:])
    except (ConfigError, CheckpointError) as error:
        print(error, file=sys.stderr)
        return 2


def run(words: list[str]) -> int:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    run_dir, options = parse(words)
    config = load_pretrain(run_dir / "config.yaml")
    found = choose_checkpoint(run_dir, options.get("step"))
    output = Path(options.get("output", run_dir / "export"))
    which = options.get("weights", "last")
    if which == "ema" and config.train.optimizer.ema_decay is None:
        raise ConfigError(f"weights=ema: {run_dir} kept no average; train with train.optimizer.ema_decay")
    parity = export(config, found, run_dir, output, which)
    samples = generate(output) if config.model.architecture == "gpt" else []
    if samples:
        (run_dir / "samples.json").write_text(json.dumps(samples, ensure_ascii=False), encoding="utf-8")
    write_report(run_dir)
    print(f"exported step {found.step} to {output} (largest logit difference {parity:.1e})")
    for sample in samples:
        print(f"\n--- sample\n{sample}")
    return 0


def parse(words: list[str]) -> tuple[Path, dict[str, str]]:
    """`RUN_DIR [step=N] [weights=ema] [output=DIR]` -> the run directory and the options. Raises ConfigError."""
    usage = "usage: millstream export RUN_DIR [step=N] [weights=last|ema] [output=DIR]"
    if not words or "=" in words[0]:
        raise ConfigError(usage)
    options = dict(word.partition("=")[::2] for word in words[1:])
    if unknown := set(options) - {"step", "output", "weights"}:
        raise ConfigError(f"unknown option {sorted(unknown)}; {usage}")
    if options.get("weights", "last") not in KEYS:
        raise ConfigError(f"weights={options['weights']}: is neither last nor ema; {usage}")
    run_dir = Path(words[0])
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"{run_dir}: is not a run directory (no config.yaml)")
    return run_dir, options


def choose_checkpoint(run_dir: Path, step: str | None) -> Checkpoint:
    if step is not None:
        return checkpoint.open_checkpoint(run_dir / "checkpoints" / f"step-{int(step):08d}")
    found = checkpoint.newest_valid(run_dir)
    if found is None:
        raise CheckpointError(f"{run_dir}: has no valid checkpoint to export; train it first")
    return found


def export(config: PretrainConfig, found: Checkpoint, run_dir: Path, output: Path, which: str = "last") -> float:
    """Write `output` and return the largest absolute logit difference; `which` weights: "last" or "ema", the average.

    Raises CheckpointError if the reloaded model's logits differ by more than TOLERANCE times the largest logit; what
    stood at `output` before is kept then.
    """
    aside = output.with_name(f".writing-{output.name}")
    shutil.rmtree(aside, ignore_errors=True)
    copy_tokenizer(run_dir / "tokenizer", aside)
    tokenizer = AutoTokenizer.from_pretrained(aside)
    weight = checkpoint.weights(found, KEYS[which])
    model = load_model(config, weight, len(tokenizer))
    ids = {"eos": tokenizer.eos_token_id, "cls": tokenizer.cls_token_id, "sep": tokenizer.sep_token_id}
    (aside / "config.json").write_text(json.dumps(hf_config(model.shape, ids), indent=2))
    shape = model.shape  # transformers' GPT-2 has no factors of muP's: they go into its weights
    if isinstance(shape, BertShape) and not shape.style.has_pairs:
        without_token_types(aside)
    usual = weight if isinstance(shape, BertShape) else lambda name: without_mup(shape, name, weight(name))
    write_weights(found, usual, shape, aside)
    difference, largest = compare_logits(model, aside, len(tokenizer), config.train.longest_seq_len)
    if config.model.architecture == "bert":
        write_encoder(found, weight, shape, aside, run_dir / "tokenizer")
    (aside / "README.md").write_text(model_card(config, found, run_dir, model, which), encoding="utf-8")
    parity = {"max_abs_logit_difference": difference, "max_abs_logit": largest, "tolerance": TOLERANCE * largest}
    (aside / "parity.json").write_text(json.dumps(parity, indent=2), encoding="utf-8")
    if not difference <= TOLERANCE * largest:
        shutil.rmtree(aside)
        raise CheckpointError(
            f"{output}: not written: the reloaded model's logits differ by {difference:.3g} from the training model's "
            f"(allowed {TOLERANCE * largest:.3g})"
        )
    shutil.rmtree(output, ignore_errors=True)
    aside.rename(output)
    return difference


def load_model(config: PretrainConfig, weight: Weight, vocab_size: int) -> GPT | Bert:
    """The training model in fp32 on the CPU, filled from the checkpoint."""
    model = build_model(config.model, vocab_size, config.train.longest_seq_len)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weight(name))
    return model.eval()


def without_token_types(directory: Path) -> None:
    """Let the tokenizer there make no token_type_ids, which ModernBERT does not take."""
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(settings | {"model_input_names": ["input_ids", "attention_mask"]}, indent=2))


def write_encoder(
    found: Checkpoint, weight: Weight, shape: GPTShape | BertShape, directory: Path, tokenizer_dir: Path
) -> None:
    """Write `encoder/`: BERT without its pretraining heads.

    A classifier that transformers loads from the whole model reports the pretraining heads as unexpected; from here it
    has nothing to report but its own new head.
    """
    encoder = directory / "encoder"
    copy_tokenizer(tokenizer_dir, encoder)
    if not shape.style.has_pairs:
        without_token_types(encoder)
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    body = {"architectures": ["BertModel" if shape.style.has_pairs else "ModernBertModel"]}
    (encoder / "config.json").write_text(json.dumps(settings | body, indent=2))
    write_weights(found, weight, shape, encoder, heads=False)


def write_weights(
    found: Checkpoint, weight: Weight, shape: GPTShape | BertShape, directory: Path, heads: bool = True
) -> None:
    """Write the parameters under transformers' names into safetensors files of at most SHARD_BYTES each.

    Without `heads`, BERT's pretraining heads are left out.
    """
    shards: list[dict[str, torch.Tensor]] = [{}]
    weight_map: dict[str, str] = {}
    size = total = 0

    def close_shard() -> None:
        name = f"model-{len(shards):05d}.safetensors"
        save_file(shards[-1], directory / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shards[-1], name))
        shards[-1] = {}

    for ours in found.shapes:
        for name, tensor in hf.to_hf(shape, ours, weight(ours)):
            if not heads and hf.is_head(shape, name):
                continue
            bytes_more = tensor.numel() * tensor.element_size()
            if size and size + bytes_more > SHARD_BYTES:
                close_shard()
                shards.append({})
                size = 0
            shards[-1][name] = tensor.contiguous()
            size, total = size + bytes_more, total + bytes_more
    close_shard()
    if len(shards) == 1:
        (directory / "model-00001.safetensors").rename(directory / "model.safetensors")
        return
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


CARD = """---
library_name: transformers
pipeline_tag: {pipeline_tag}
tags: [{architecture}, pretrained, millstream]
---
# {title}

A {architecture} pretrained with millstream, a `{hf_class}`: {shape}.

| | |
| --- | --- |
| steps | {step:,} of {num_steps:,} |
{average}| tokens seen | {tokens:,} |
| sequence length | {seq_len} |
| global batch | {batch} samples |
| peak learning rate | {lr:g}, {schedule} |
{evaluation}
Text: {sources}. The dataset's fingerprint is `{dataset}`, the seed {seed}.

`parity.json` holds the largest difference between the training model's logits and those of this directory, loaded by
transformers.

    from transformers import {auto}, AutoTokenizer
    model = {auto}.from_pretrained("{name}")
    tokenizer = AutoTokenizer.from_pretrained("{name}")
"""


def model_card(config: PretrainConfig, found: Checkpoint, run_dir: Path, model: GPT | Bert, which: str) -> str:
    """The README.md of an export: what was trained on what, how far, and what it reached there."""
    train, is_gpt = config.train, config.model.architecture == "gpt"
    metrics = read_metrics(run_dir)
    at_step = [line for line in metrics if line["step"] == found.step and "eval_loss" in line]
    names = {
        "eval_loss": "held-out loss",
        "eval_loss_mlm": "held-out masked-word loss",
        "eval_perplexity": "perplexity",
    }
    evaluation = [f"| {names[key]} | {value:.4f} |\n" for key, value in (at_step or [{}])[-1].items() if key in names]
    shape = model.shape
    return CARD.format(
        pipeline_tag="text-generation" if is_gpt else "fill-mask",
        architecture="GPT" if is_gpt else "BERT",
        hf_class=CLASSES[model.shape.style.model_type],
        title=run_dir.name,
        shape=f"{shape.num_layers} layers of width {shape.hidden_size}, {shape.num_heads} heads"
        f"{f' ({shape.kv_heads} of keys and values)' * (shape.kv_heads != shape.num_heads)}, vocabulary "
        f"{shape.vocab_size:,}, {sum(p.numel() for p in model.parameters()):,} parameters",
        step=found.step,
        num_steps=train.num_steps,
        average=f"| weights | their moving average, decay {train.optimizer.ema_decay}; losses below are those of the "
        "last weights |\n"
        if which == "ema"
        else "",
        tokens=tokens_before(train, found.step),
        seq_len=train.longest_seq_len,
        batch=train.global_batch_size
        if train.batch_ramp is None
        else f"{train.batch_ramp.start_size} to {train.global_batch_size}",
        lr=train.optimizer.lr,
        schedule=train.schedule.type,
        evaluation="".join(evaluation),
        sources=", ".join(f"`{Path(source).name}`" for source in config.data.build.sources) or "not recorded",
        dataset=found.facts["dataset"],
        seed=train.seed,
        auto="AutoModelForCausalLM" if is_gpt else "AutoModelForMaskedLM",
        name=run_dir / "export",
    )


def compare_logits(model: GPT | Bert, directory: Path, vocab_size: int, seq_len: int) -> tuple[float, float]:
    """The largest absolute difference and the largest absolute logit, over all heads, on random ids (2, seq_len)."""
    ids = torch.randint(vocab_size, (2, seq_len), generator=torch.Generator().manual_seed(0))
    has_pairs = model.shape.style.has_pairs
    auto = AutoModelForCausalLM if isinstance(model, GPT) else AutoModelForMaskedLM
    reloaded = (AutoModelForPreTraining if has_pairs else auto).from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        ours, theirs = model(ids), reloaded(ids)
    if has_pairs:
        pairs = list(zip(ours, (theirs.prediction_logits, theirs.seq_relationship_logits), strict=True))
    else:
        pairs = [(ours, theirs.logits)]
    difference = max((a.float() - b.float()).abs().max().item() for a, b in pairs)
    return difference, max(a.abs().max().item() for a, _ in pairs)


def generate(directory: Path) -> list[str]:
    """Three texts sampled from the exported model (top-k 40, temperature 0.8), reproducibly."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    torch.manual_seed(0)
    start = torch.full((3, 1), tokenizer.eos_token_id)  # what stands before every document
    length = min(GENERATE_TOKENS, model.config.max_position_embeddings)
    sampling = GenerationConfig(
        do_sample=True, top_k=40, temperature=0.8, max_length=length, pad_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    ids = model.generate(start, attention_mask=torch.ones_like(start), generation_config=sampling)
    return [str(tokenizer.decode(row, skip_special_tokens=True)).strip() for row in ids]


if __name__ == "__main__":
    sys.exit(main())
