"""Anybody's GPT or BERT -> a directory from which a run can begin: `millstream import SOURCE DEST [key=value ...]`.

DEST is a Hugging Face directory with all of our heads. `pretrain.yaml` in it is the beginning of a configuration that
goes on from there: `model.init_from` and the sizes. DEST gets its name only after transformers has loaded it and its
logits, and where transformers can load the source also those of the source, were compared with our model's.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: the packages lie beside this folder, not in it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import yaml
from tokenizers import Tokenizer
from transformers.utils import logging

from configs.load import ConfigError
from data_pipeline.shards import DataError
from data_pipeline.tokenizer import load_tokenizer, num_ids, save_tokenizer
from pretrain.formats import deepspeed_files, gguf_file, google_bert, hugging_face, nanogpt, parity
from pretrain.formats.weights import FormatError, Weights, model_section

USAGE = "usage: millstream import SOURCE DEST [tokenizer=DIR] [gelu=erf|tanh]"
SHARD_BYTES = 4 << 30


def main() -> int:
    try:
        return run(sys.argv[1:])
    except (ConfigError, DataError) as error:
        print(error, file=sys.stderr)
        return 2


def run(words: list[str]) -> int:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options = dict(word.partition("=")[::2] for word in words[2:])
    if len(words) < 2 or set(options) - {"tokenizer", "gelu"} or options.get("gelu", "erf") not in ("erf", "tanh"):
        raise ConfigError(USAGE)
    source, dest = Path(words[0]), Path(words[1])
    if not source.exists() and google_bert.find(source) is None:
        raise ConfigError(f"{source}: does not exist; {USAGE}")
    if dest.exists() and not (dest / "parity.json").is_file():
        raise ConfigError(f"{dest}: exists and is no imported model; choose another directory")
    model = read(source, options.get("gelu"))
    tokenizer = find_tokenizer(source, options.get("tokenizer"), model)
    difference = write(model, tokenizer, source, dest)
    print(f"imported {source} to {dest} (largest logit difference {difference:.1e})")
    for note in model.notes:
        print(note)
    print(f"{dest / 'pretrain.yaml'} is the beginning of a configuration that goes on from it")
    return 0


def read(source: Path, gelu: str | None) -> Weights:
    """The model at `source`, whatever its format; `gelu` where the format does not say it. Raises FormatError."""
    if (source / "config.json").is_file():
        return hugging_face.read(source)
    if (prefix := google_bert.find(source)) is not None:
        return google_bert.read(prefix, gelu or "erf")
    if source.suffix == ".gguf" and source.is_file():
        return gguf_file.read(source)
    deepspeed_files.refuse(source)
    file = source / "ckpt.pt" if source.is_dir() else source
    if file.suffix == ".pt" and file.is_file():
        return nanogpt.read(file, gelu or "erf")
    raise FormatError(
        f"{source}: is no model that is known; expected a directory with config.json and weights, Google's BERT "
        f"(bert_model.ckpt.index), nanoGPT's ckpt.pt or a .gguf file"
    )


def find_tokenizer(source: Path, given: str | None, model: Weights) -> Tokenizer | None:
    """That of `given`, else that beside the model, else None. Raises ConfigError for one with more ids than rows."""
    if source.suffix == ".gguf" and given is None:
        return gguf_file.read_tokenizer(source)
    folder = Path(given) if given else source if source.is_dir() else source.parent
    try:
        tokenizer = load_tokenizer(folder)
    except DataError:
        if given or any(folder.glob("tokenizer.json")):
            raise
        print(f"{source}: has no tokenizer, so neither has the imported model; give tokenizer=DIR", file=sys.stderr)
        return None
    if num_ids(tokenizer) > model.shape.vocab_size:
        raise ConfigError(
            f"{folder}: its tokenizer has {num_ids(tokenizer)} ids, the model {model.shape.vocab_size} rows; they do "
            f"not belong together"
        )
    return tokenizer


def write(model: Weights, tokenizer: Tokenizer | None, source: Path, dest: Path) -> float:
    """Write `dest`; returns the largest logit difference. Raises FormatError, and writes nothing, where it is large."""
    with parity.writing(dest) as aside:
        if tokenizer is not None:
            save_tokenizer(tokenizer, aside, model.shape.max_seq_len)
        hugging_face.write(model, aside, hugging_face.special_ids(tokenizer), torch.float32, SHARD_BYTES)
        (aside / "pretrain.yaml").write_text(configuration(model, dest, tokenizer is not None), encoding="utf-8")
        ours = model.model()
        ids = parity.token_ids(model.shape.vocab_size, model.shape.max_seq_len)
        compared = parity.compare(hugging_face.our_logits(ours, ids), hugging_face.logits(aside, ids))
        if (source / "config.json").is_file():
            of_source = hugging_face.compare_with_source(ours, source, ids, model.fresh)
            compared = max(compared, of_source, key=lambda one: one["max_abs_logit_difference"] / one["tolerance"])
        parity.finish(aside, dest, {"format": "hf", "dtype": "fp32", **compared})
    return float(compared["max_abs_logit_difference"])


def configuration(model: Weights, dest: Path, has_tokenizer: bool) -> str:
    """The beginning of a configuration that goes on from `dest`, as YAML."""
    head = "# Sources, steps and rates are yours to choose; every setting is in configs/schema.py\n"
    tokenizer = {"type": "pretrained", "path": str(dest)}
    data: dict[str, object] = {"dir": "data/corpus"}
    if has_tokenizer:
        data["build"] = {"sources": ["YOUR_TEXTS.jsonl"], "tokenizer": tokenizer}
    if model.architecture == "bert" and not model.shape.style.has_pairs:
        data["masking"] = {"pairs": "none"}
    settings = {
        "run_dir": "runs/continued",
        "model": model_section(model.shape) | {"init_from": str(dest)},
        "data": data,
        "train": {"seq_len": model.shape.max_seq_len},
    }
    return head + yaml.safe_dump(settings, sort_keys=False)


if __name__ == "__main__":
    sys.exit(main())
