"""A model in one of the formats that others read, and its logits as they read it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from configs.errors import ConfigError
from configs.model_sizes import BertShape, style_name
from pretrain.formats import gguf_file, google_bert, hugging_face, onnx_model, parity
from pretrain.formats.weights import DTYPES, FormatError, Weights
from pretrain.models import gpt

SHARD_BYTES = 4 << 30
LLAMA_TOLERANCE = 2e-2  # of the largest logit; llama.cpp rounds activations to the matrices' dtype


@dataclass(frozen=True)
class Form:
    format: str = "hf"  # one of FORMATS
    dtype: str = "fp32"  # one of DTYPES
    shard_bytes: int = SHARD_BYTES  # hf
    int8: bool = False  # onnx: also a quantised file


@dataclass(frozen=True)
class Task:
    """What a writer gets: it writes into `directory`, which has the tokenizer's files already."""

    model: Weights
    tokenizer: Tokenizer
    directory: Path
    form: Form
    ids: torch.Tensor
    name: str  # of the model


# What a format's writer returns: the logits of what it wrote, read back as its readers do, and more for parity.json
Written = tuple[tuple[torch.Tensor, ...], dict[str, Any]]


def write(model: Weights, tokenizer: Tokenizer, directory: Path, form: Form, seq_len: int, name: str) -> dict[str, Any]:
    """Write the model `name` into `directory` and return what parity.json says; `parity.finish` judges it.

    The logits of what was written are compared with those of the training model with its weights rounded to the
    format's dtype, on rows of `seq_len` random tokens. Raises ConfigError for what the format cannot hold.
    """
    usual = without_mup(model)
    ids = parity.token_ids(model.shape.vocab_size, seq_len)
    theirs, about = FORMATS[form.format](Task(usual, tokenizer, directory, form, ids, name))
    trained = hugging_face.our_logits(model.model(), ids)
    expected = trained
    if form.dtype != "fp32":
        expected = hugging_face.our_logits(usual.rounded(DTYPES[form.dtype]).model(), ids)
    rounding = parity.compare(trained, expected)["max_abs_logit_difference"]
    said = {"format": form.format, "dtype": form.dtype, "max_abs_logit_change_by_rounding": rounding}
    return said | parity.compare(expected, theirs) | about


def without_mup(model: Weights) -> Weights:
    """The same model as a usual GPT-2: others' programs have no factors of muP's, so they go into its weights."""
    shape = model.shape
    if isinstance(shape, BertShape) or shape.width_ratio == shape.head_dim_ratio == 1:
        return model
    usual = replace(shape, width_ratio=1.0, head_dim_ratio=1.0)
    return Weights(usual, lambda name: gpt.without_mup(shape, name, model.weight(name)))


def write_hugging_face(task: Task) -> Written:
    special = hugging_face.special_ids(task.tokenizer)
    rounded = task.model.rounded(DTYPES[task.form.dtype])  # which refuses what has no room in the dtype
    hugging_face.write(rounded, task.directory, special, DTYPES[task.form.dtype], task.form.shard_bytes)
    return hugging_face.logits(task.directory, task.ids), {}


def write_tensorflow(task: Task) -> Written:
    style = task.model.shape.style
    if style.model_type != "bert" or task.form.dtype != "fp32":
        raise ConfigError(
            f"format=tensorflow is Google's BERT in fp32, found style {style_name(task.model.shape)} and "
            f"dtype={task.form.dtype}; choose format=hf"
        )
    vocabulary = sorted(task.tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    if task.tokenizer.model.__class__.__name__ != "WordPiece":
        raise FormatError("format=tensorflow: the tokenizer is no WordPiece, which vocab.txt is for; choose format=hf")
    for file in list(task.directory.iterdir()):  # vocab.txt is all that Google's code knows
        file.unlink()
    google_bert.write(task.model, task.directory, [token for token, _ in vocabulary])
    gelu = "tanh" if style.activation == "gelu_tanh" else "erf"
    back = google_bert.read(task.directory / google_bert.CHECKPOINT, gelu)
    about = {"gelu": gelu, "read_back_by": "millstream"}
    return hugging_face.our_logits(back.model(), task.ids), about


def write_onnx(task: Task) -> Written:
    if task.form.dtype != "fp32":
        raise ConfigError(
            f"format=onnx is in fp32, found dtype={task.form.dtype}; int8=true writes a quantised file too"
        )
    onnx_model.write(task.model, task.directory, task.form.int8)
    about = {"read_back_by": "onnxruntime"}
    facts = {"int8": onnx_model.int8_facts(task.model, task.directory, task.ids)} if task.form.int8 else {}
    return onnx_model.logits(task.model, task.directory / onnx_model.FILE, task.ids), about | facts


def write_gguf(task: Task) -> Written:
    rounded = task.model.rounded(DTYPES[task.form.dtype])
    gguf_file.write(rounded, task.tokenizer, task.directory, task.form.dtype, task.name)
    for file in list(task.directory.iterdir()):  # the tokenizer is in the file
        if file.name != gguf_file.FILE:
            file.unlink()
    file = task.directory / gguf_file.FILE
    theirs = hugging_face.our_logits(gguf_file.read(file).model(), task.ids)
    if importlib.util.find_spec("llama_cpp") is None:
        return theirs, {"read_back_by": "gguf"}
    compared = parity.compare(theirs, [gguf_file.llama_logits(file, task.ids)], LLAMA_TOLERANCE)
    if not compared["max_abs_logit_difference"] <= compared["tolerance"]:
        raise FormatError(f"{file}: not kept: llama.cpp's logits are others ({compared}); choose dtype=fp32 or fp16")
    return theirs, {"read_back_by": "gguf and llama.cpp", "llama_cpp": compared}


FORMATS: dict[str, Callable[[Task], Written]] = {
    "hf": write_hugging_face,
    "tensorflow": write_tensorflow,
    "onnx": write_onnx,
    "gguf": write_gguf,
}
