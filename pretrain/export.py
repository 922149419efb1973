"""A checkpoint -> a directory that others read: `millstream export RUN_DIR [format=...] [key=value ...]`.

Parameters are read from the checkpoint one at a time and written in files of bounded size. Then what was written is
read back, by transformers or whatever is usual for the format (formats/), and its logits are compared with those of the
training model; the directory gets its name only if they agree.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

if not __package__:  # started as a file: the packages lie beside this folder, not in it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

from configs.load import ConfigError, load_pretrain
from configs.model_sizes import model_shape
from configs.schema import PretrainConfig
from data_pipeline.shards import DataError
from data_pipeline.tokenizer import copy_tokenizer, load_tokenizer, save_tokenizer
from pretrain import checkpoint
from pretrain.checkpoint import Checkpoint, CheckpointError
from pretrain.formats import hugging_face, parity
from pretrain.formats.weights import DTYPES, Weights
from pretrain.formats.write import FORMATS, SHARD_BYTES, Form, write
from pretrain.model_card import write_card
from pretrain.report import write_report

KEYS = {"last": "master", "ema": "ema"}  # what is exported -> what checkpoints call it
CHOICES = {
    "weights": list(KEYS),
    "dtype": list(DTYPES),
    "format": list(FORMATS),
    "int8": ["false", "true"],
}  # the first is the default
HF = Form()
USAGE = (
    "usage: millstream export RUN_DIR|MODEL_DIR [format=hf|tensorflow|onnx|gguf] [step=N] [weights=last|ema] "
    "[dtype=fp32|bf16|fp16] [shard_size=5GB] [int8=true] [output=DIR]"
)
GENERATE_TOKENS = 120


def main() -> int:
    try:
        return run(sys.argv[1:])
    except (ConfigError, CheckpointError, DataError) as error:
        print(error, file=sys.stderr)
        return 2


def run(words: list[str]) -> int:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    run_dir, options = parse(words)
    form = Form(
        options.get("format", "hf"),
        options.get("dtype", "fp32"),
        size_in_bytes(options["shard_size"]) if "shard_size" in options else SHARD_BYTES,
        options.get("int8") == "true",
    )
    if not (run_dir / "config.yaml").is_file():
        return convert(run_dir, options, form)
    config = load_pretrain(run_dir / "config.yaml")
    found = choose_checkpoint(run_dir, options.get("step"))
    output = Path(options.get("output", run_dir / ("export" if form.format == "hf" else f"export-{form.format}")))
    which = options.get("weights", "last")
    if which == "ema" and config.train.optimizer.ema_decay is None:
        raise ConfigError(f"weights=ema: {run_dir} kept no average; train with train.optimizer.ema_decay")
    difference = export(config, found, run_dir, output, which, form)
    samples = generate(output) if config.model.architecture == "gpt" and form.format == "hf" else []
    if samples:
        (run_dir / "samples.json").write_text(json.dumps(samples, ensure_ascii=False), encoding="utf-8")
    write_report(run_dir)
    print(f"exported step {found.step} to {output} (largest logit difference {difference:.1e})")
    for sample in samples:
        print(f"\n--- sample\n{sample}")
    return 0


def parse(words: list[str]) -> tuple[Path, dict[str, str]]:
    """`RUN_DIR [key=value ...]` -> the run directory and the options. Raises ConfigError."""
    if not words or "=" in words[0]:
        raise ConfigError(USAGE)
    options = dict(word.partition("=")[::2] for word in words[1:])
    if unknown := set(options) - {"step", "output", *CHOICES, "shard_size"}:
        raise ConfigError(f"unknown option {sorted(unknown)}; {USAGE}")
    for key, choices in CHOICES.items():
        if options.get(key, choices[0]) not in choices:
            raise ConfigError(f"{key}={options[key]}: expected {' or '.join(choices)}; {USAGE}")
    run_dir = Path(words[0])
    if not any((run_dir / file).is_file() for file in ("config.yaml", "config.json")):
        raise ConfigError(f"{run_dir}: is not a run directory (no config.yaml), nor a Hugging Face directory")
    return run_dir, options


def convert(directory: Path, options: dict[str, str], form: Form) -> int:
    """Write a Hugging Face directory, as `millstream import` makes one, in another form."""
    if "output" not in options or {"step", "weights"} & options.keys():
        raise ConfigError(f"{directory}: is no run but a model; give output=DIR, and neither step nor weights")
    output = Path(options["output"])
    if output.exists() and not (output / "parity.json").is_file():
        raise ConfigError(f"{output}: exists and is no export; choose another directory")
    model, tokenizer = hugging_face.read(directory), load_tokenizer(directory)
    with parity.writing(output) as aside:
        save_tokenizer(tokenizer, aside, model.shape.max_seq_len)
        said = write(model, tokenizer, aside, form, model.shape.max_seq_len, directory.resolve().name)
        parity.finish(aside, output, said)
    print(f"exported {directory} to {output} (largest logit difference {said['max_abs_logit_difference']:.1e})")
    return 0


def size_in_bytes(text: str) -> int:
    """ "2GB", "500MB" -> bytes, in powers of 1000 as transformers counts. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(KB|MB|GB)", text)
    if not match or not float(match[1]):
        raise ConfigError(f"shard_size={text}: expected a number with KB, MB or GB, as in 5GB")
    return int(float(match[1]) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[match[2]])


def choose_checkpoint(run_dir: Path, step: str | None) -> Checkpoint:
    if step is not None:
        return checkpoint.open_checkpoint(run_dir / "checkpoints" / f"step-{int(step):08d}")
    found = checkpoint.newest_valid(run_dir)
    if found is None:
        raise CheckpointError(f"{run_dir}: has no valid checkpoint to export; train it first")
    return found


def export(
    config: PretrainConfig, found: Checkpoint, run_dir: Path, output: Path, which: str = "last", form: Form = HF
) -> float:
    """Write `output` and return the largest absolute logit difference; `which` weights: "last" or "ema", the average.

    Raises FormatError if the logits of what was written differ from the training model's by more than
    parity.TOLERANCE times the largest; what stood at `output` before is kept then.
    """
    tokenizer = load_tokenizer(run_dir / "tokenizer")
    shape = model_shape(config.model, found.shapes["word_embeddings.weight"][0], config.train.longest_seq_len)
    model = Weights(shape, checkpoint.weights(found, KEYS[which]))
    with parity.writing(output) as aside:
        copy_tokenizer(run_dir / "tokenizer", aside)
        said = write(model, tokenizer, aside, form, config.train.longest_seq_len, run_dir.resolve().name)
        write_card(config, found, run_dir, aside, which, form.format)
        parity.finish(aside, output, said)
    return float(said["max_abs_logit_difference"])


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
