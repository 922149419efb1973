"""nanoGPT's `ckpt.pt`: a dictionary of torch.save with the weights, the sizes, and an optimizer that is left out.

It is read as tensors, numbers and texts only, so no code of it runs. Models without biases (`bias=False`) get biases of
zeros, which are the same function until they are trained on.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from configs.model_sizes import GPTShape
from configs.model_styles import GPT_STYLES
from pretrain.formats.hugging_face import check_shape, read_torch_file
from pretrain.formats.weights import FormatError, Weights, check_sizes, empty_model
from pretrain.models import hf

COMPILED = "_orig_mod."  # what torch.compile puts before every name
OUTPUT = "lm_head.weight"


def read(file: Path, gelu: str = "erf") -> Weights:
    """The model of a checkpoint; nanoGPT computes GELU exactly since 2023, and before by the tanh formula.

    Raises FormatError.
    """
    found = read_torch_file(file)
    sizes, state = found.get("model_args"), found.get("model")
    if not isinstance(sizes, dict) or not isinstance(state, dict):
        keys = ", ".join(sorted(map(str, found))[:8])
        raise FormatError(f"{file}: holds {keys}; expected nanoGPT's ckpt.pt, which has model and model_args")
    tensors = {str(name).removeprefix(COMPILED): tensor for name, tensor in state.items()}
    shape = read_shape(file, sizes, gelu)
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in empty_model(shape).named_parameters()}
    theirs = {name: next(hf.to_hf(shape, name, torch.empty(size, device="meta")))[0] for name, size in expected.items()}
    lost = [name for name in expected if theirs[name] not in tensors and not name.endswith(".bias")]
    if lost:
        raise FormatError(f"{file}: lacks the tensor {theirs[lost[0]]} and {len(lost) - 1} more; copy it again")
    if OUTPUT in tensors and not torch.equal(tensors[OUTPUT], tensors[theirs["word_embeddings.weight"]]):
        raise FormatError(f"{file}: {OUTPUT} is not {theirs['word_embeddings.weight']}; here they are one")
    without_bias = tuple(name for name in expected if theirs[name] not in tensors)

    def weight(name: str) -> torch.Tensor:
        if name in without_bias:
            return torch.zeros(expected[name])
        tensor = tensors[theirs[name]]
        check_shape(file, theirs[name], tensor, expected[name])
        return tensor.float()

    return Weights(shape, weight, ("the model has no biases; here they begin as zeros",) if without_bias else ())


def read_shape(file: Path, sizes: dict[str, Any], gelu: str) -> GPTShape:
    names = ("n_layer", "n_embd", "n_head", "block_size", "vocab_size")
    if lost := [name for name in names if type(sizes.get(name)) is not int]:
        raise FormatError(f"{file}: model_args has {lost[0]}={sizes.get(lost[0])!r}, expected a whole number")
    num_layers, hidden_size, num_heads, max_seq_len, vocab_size = (sizes[name] for name in names)
    style = replace(GPT_STYLES["gpt2"], activation="gelu" if gelu == "erf" else "gelu_tanh")
    shape = GPTShape(num_layers, hidden_size, num_heads, max_seq_len, vocab_size, style=style)
    check_sizes(file, shape)
    return shape
