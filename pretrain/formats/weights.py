"""A model on its way from one format to another: its shape, and its parameters one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from configs.errors import ConfigError
from configs.model_sizes import BertShape, GPTShape, style_name
from pretrain.models import bert, gpt

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

LARGEST = {
    "num_layers": 10_000, "hidden_size": 1 << 20, "num_heads": 1 << 16, "num_kv_heads": 1 << 16,
    "intermediate_size": 1 << 24, "max_seq_len": 1 << 24, "vocab_size": 1 << 24,
}  # fmt: skip


class FormatError(ConfigError):
    """A file of a model that cannot be used; the message has the file, what was found, what was expected, the cure."""


@dataclass(frozen=True)
class Weights:
    shape: GPTShape | BertShape
    weight: Callable[[str], torch.Tensor]  # our parameter's name -> the whole of it, fp32, on the CPU
    notes: tuple[str, ...] = ()  # what was left out or drawn anew when it was read, in words
    fresh: tuple[str, ...] = ()  # parameters that were drawn anew

    @property
    def architecture(self) -> str:
        return "gpt" if isinstance(self.shape, GPTShape) else "bert"

    def names(self) -> list[str]:
        """Of all parameters, in the model's order."""
        with torch.device("meta"):
            return [name for name, _ in empty_model(self.shape).named_parameters()]

    def rounded(self, dtype: torch.dtype) -> Weights:
        """The same model with its parameters rounded to `dtype`; raises FormatError where one has no room in it."""

        def weight(name: str) -> torch.Tensor:
            tensor = self.weight(name)
            fits = tensor.to(dtype).float()
            if not torch.isfinite(fits).all() and torch.isfinite(tensor).all():
                largest = tensor.abs().max().item()
                raise FormatError(f"{name}: has {largest:.3g}, more than {dtype} can hold; choose dtype=bf16 or fp32")
            return fits

        return self if dtype == torch.float32 else replace(self, weight=weight)

    def model(self) -> gpt.GPT | bert.Bert:
        """Our model with these weights, fp32, on the CPU, in evaluation."""
        model = empty_model(self.shape)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.weight(name))
        return model.eval()


def empty_model(shape: GPTShape | BertShape) -> gpt.GPT | bert.Bert:
    return gpt.GPT(shape) if isinstance(shape, GPTShape) else bert.Bert(shape)


def model_section(shape: GPTShape | BertShape) -> dict[str, object]:
    """The `model` section of a configuration with which a model of this shape is built."""
    style = shape.style
    section: dict[str, object] = {
        "architecture": "gpt" if isinstance(shape, GPTShape) else "bert",
        "style": style_name(shape),
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_heads": shape.num_heads,
        "intermediate_size": shape.mlp_size,
        "max_seq_len": shape.max_seq_len,
    }
    if style.model_type in ("gpt2", "bert"):
        return section | {"gelu": "tanh" if style.activation == "gelu_tanh" else "erf"}
    if style.local_window is not None:
        section["local_window"] = style.local_window
    if style.rope_theta is not None:
        section["rope_theta"] = style.rope_theta
        if style.is_causal:
            section |= {"num_kv_heads": shape.kv_heads, "tied_output": style.has_tied_output}
    return section


def check_sizes(file: Path, shape: GPTShape | BertShape) -> None:
    """Raise FormatError for sizes that no model has, whatever a file says: they come from strangers."""
    may_lack = ("num_kv_heads", "intermediate_size")  # which then follow from the others
    for name, largest in LARGEST.items():
        value = getattr(shape, name)
        if not (type(value) is int and 1 <= value <= largest) and not (value is None and name in may_lack):
            raise FormatError(f"{file}: {name} is {value!r}, expected a whole number from 1 to {largest:,}")
    style = shape.style
    numbers = {name: getattr(style, name) for name in ("norm_eps", "rope_theta", "local_rope_theta", "local_window")}
    for name, value in (numbers | {"initializer_range": getattr(shape, "init_std", None)}).items():
        if value is not None and not (type(value) in (int, float) and 0 < value < math.inf):
            raise FormatError(f"{file}: {name} is {value!r}, expected a number above 0")
    if shape.hidden_size % shape.num_heads or shape.num_heads % shape.kv_heads:
        raise FormatError(
            f"{file}: {shape.num_heads} heads, {shape.kv_heads} of keys and values, do not divide width "
            f"{shape.hidden_size}; get the model again"
        )


def inside(directory: Path, name: object, listed_in: Path) -> Path:
    """The file `name` of `directory`, as an index file lists it. Raises FormatError for one that lies elsewhere."""
    if not isinstance(name, str) or name != Path(name).name or name in ("", ".", ".."):
        raise FormatError(
            f"{listed_in}: lists the file {name!r}, expected a plain name in its own directory; nothing is read from "
            f"elsewhere: get the model again"
        )
    if not (directory / name).is_file():
        raise FormatError(f"{directory / name}: is missing, {listed_in} lists it; get the model again")
    return directory / name
