"""ONNX: the graph of a model for onnxruntime and others, with batch and length left open, and on request in int8.

Inputs are `input_ids`, `attention_mask` (1 for tokens, 0 for padding) and of a BERT `token_type_ids`, (batch, seq)
int64; outputs `logits` (batch, seq, vocab) of a GPT, and `prediction_logits`, `seq_relationship_logits` (batch, 2) and
`last_hidden_state` (batch, seq, hidden) of a BERT. int8 is onnxruntime's dynamic quantisation of the matrices.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from configs.errors import ConfigError
from configs.model_sizes import style_name
from pretrain.formats.hugging_face import our_logits
from pretrain.formats.weights import Weights
from pretrain.models.bert import Bert
from pretrain.models.gpt import GPT
from pretrain.models.layers import rotations

FILE, INT8_FILE = "model.onnx", "model-int8.onnx"
OPSET = 20
LARGEST_FILE = 1_900_000_000  # bytes; a protocol buffer ends at 2^31, beyond that weights are in a file of their own
STYLES = ("gpt2", "llama", "qwen3", "bert")  # not those with local attention
NEEDED = ("onnx", "onnxruntime", "onnxscript")


class GPTGraph(nn.Module):
    """Logits of a GPT; positions count from a row's first token, so rows may be padded on either side."""

    outputs = ("logits",)

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        model, seq = self.model, input_ids.shape[1]
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        places = torch.arange(seq, device=input_ids.device)
        earlier = places[None, :] <= places[:, None]
        itself = places[None, :] == places[:, None]  # padding sees itself: a query must see some key
        mask = (earlier & (attention_mask[:, None, None, :] > 0)) | itself
        x = model.word_embeddings(input_ids)
        if model.shape.style.rope_theta is None:
            x = x + model.position_embeddings(positions)
        rotation = rotations(model.shape, positions)
        for layer, block in enumerate(model.blocks):
            x = block(x, mask, rotation[layer])
        return model.final_norm(x) @ model.output_weight.t()


class BertGraph(nn.Module):
    outputs = ("prediction_logits", "seq_relationship_logits", "last_hidden_state")

    def __init__(self, model: Bert) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        model, places = self.model, torch.arange(input_ids.shape[1], device=input_ids.device)
        mask = (attention_mask[:, None, None, :] > 0) | (places[None, :] == places[:, None])
        x = model.word_embeddings(input_ids) + model.position_embeddings(places)
        x = model.embedding_norm(x + model.token_type_embeddings(token_type_ids))
        for block in model.blocks:
            x = block(x, mask)
        words = model.mlm_hidden(x) @ model.word_embeddings.weight.t() + model.mlm_output.bias
        return words, model.nsp_output(torch.tanh(model.pooler(x[:, 0]))), x


def write(weights: Weights, directory: Path, int8: bool) -> None:
    """Write model.onnx, and with `int8` model-int8.onnx. Raises ConfigError where a package is missing."""
    if weights.shape.style.model_type not in STYLES:
        raise ConfigError(
            f"format=onnx is for styles {', '.join(STYLES)}, found {style_name(weights.shape)}; choose format=hf"
        )
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"format=onnx needs {', '.join(missing)}: pip install 'millstream[onnx]'")
    model = weights.model()
    graph = GPTGraph(model) if isinstance(model, GPT) else BertGraph(model)
    inputs = tuple(example_inputs(weights, torch.zeros(2, 3, dtype=torch.int64)).values())
    names = list(example_inputs(weights, torch.zeros(1, 1, dtype=torch.int64)))
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq", max=weights.shape.max_seq_len)}
    num_bytes = sum(4 * parameter.numel() for parameter in model.parameters())
    large = num_bytes > LARGEST_FILE
    with quiet():
        program = torch.onnx.export(
            graph.eval(), inputs, dynamo=True, verbose=False, opset_version=OPSET, input_names=names,
            output_names=list(graph.outputs), dynamic_shapes=(axes,) * len(inputs),
        )  # fmt: skip
        assert program is not None  # with dynamo there is one
        for node in program.model.graph:
            node.metadata_props.clear()  # the lines of Python it was made of, with this machine's paths
        program.save(directory / FILE, external_data=large)
        if int8:
            from onnxruntime.quantization import QuantType, quantize_dynamic

            target = directory / INT8_FILE
            # A scale a column, and unsigned, whose range need not be symmetric around 0: hidden states of
            # all-MiniLM-L6-v2 keep a cosine of 0.94 at least; by default, signed with a scale a matrix, it was 0.37
            quantize_dynamic(
                directory / FILE, target, weight_type=QuantType.QUInt8, per_channel=True, use_external_data_format=large
            )


@contextmanager
def quiet() -> Iterator[None]:
    """Without what the exporter and the quantiser say about themselves."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def example_inputs(weights: Weights, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs of the graph for rows without padding."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs if weights.architecture == "gpt" else inputs | {"token_type_ids": torch.zeros_like(ids)}


def run(file: Path, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All outputs of the graph as onnxruntime computes them on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return {output.name: torch.from_numpy(value) for output, value in zip(session.get_outputs(), found, strict=True)}


def logits(weights: Weights, file: Path, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """As `hugging_face.logits` gives them, by onnxruntime."""
    found = run(file, example_inputs(weights, ids))
    names = GPTGraph.outputs if weights.architecture == "gpt" else BertGraph.outputs[:2]
    return tuple(found[name] for name in names)


def int8_facts(weights: Weights, directory: Path, ids: torch.Tensor) -> dict[str, Any]:
    """What the rounding to int8 changes: the largest logit difference, and how often the most likely token stays."""
    ours, theirs = our_logits(weights.model(), ids)[0], logits(weights, directory / INT8_FILE, ids)[0]
    same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    return {"max_abs_logit_difference": (ours - theirs).abs().max().item(), "same_most_likely_token": same}
