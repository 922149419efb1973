"""GGUF: a GPT-2, Llama or Qwen3 with its tokenizer in one file, for llama.cpp and what is built on it.

Matrices are in the export's dtype, norms, biases and positions in fp32, as llama.cpp's own converter has them.
llama.cpp computes GELU by the tanh formula, as GPT-2 does, from a table in fp16: its logits are near ours only.
Its llama rotates neighbouring numbers of a head where ours and transformers' rotates its halves, so rows of queries and
keys are written in that order. Its BERT has no head for masked words, so no BERT is written.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from configs.errors import ConfigError
from configs.model_sizes import GPTShape, style_name
from configs.model_styles import GPT_STYLES
from data_pipeline.tokenizer import end_of_text_id, load_tokenizer
from pretrain.formats.hugging_face import check_shape
from pretrain.formats.weights import FormatError, Weights, check_sizes, empty_model

FILE = "model.gguf"
UNUSED = 5  # the type of a token that is none
STYLES = ("gpt2", "llama", "qwen3")  # the names of llama.cpp's architectures too
NAMES = {
    "word_embeddings": "token_embd",
    "position_embeddings": "position_embd",
    "final_norm": "output_norm",
    "word_output": "output",
    "attention_norm": "attn_norm",
    "attention.qkv": "attn_qkv",
    "attention.query_norm": "attn_q_norm",
    "attention.key_norm": "attn_k_norm",
    "attention.output": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}
PARTS = {"attention.qkv": ("attn_q", "attn_k", "attn_v"), "mlp.gate_up": ("ffn_gate", "ffn_up")}  # not gpt2


def gguf_names(shape: GPTShape, name: str) -> list[str]:
    """`blocks.3.mlp.up.weight` -> `["blk.3.ffn_up.weight"]`; several where ours is fused."""
    prefix, inner = "", name
    if name.startswith("blocks."):
        _, number, inner = name.split(".", 2)
        prefix = f"blk.{number}."
    module, _, leaf = inner.rpartition(".")
    parts = PARTS.get(module) if shape.style.model_type != "gpt2" else None
    return [f"{prefix}{part}.{leaf}" for part in parts or (NAMES[module],)]


def to_gguf(shape: GPTShape, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """(GGUF's name, tensor) for one of our parameters."""
    names = gguf_names(shape, name)
    if len(names) == 1:
        yield names[0], tensor
        return
    kv_rows = shape.kv_heads * shape.head_dim
    rows = [shape.hidden_size, kv_rows, kv_rows] if ".qkv." in name else [shape.mlp_size] * 2
    for theirs, piece in zip(names, tensor.split(rows), strict=True):
        yield theirs, _neighbours(shape, piece) if _is_reordered(shape, theirs) else piece


def _is_reordered(shape: GPTShape, name: str) -> bool:
    return shape.style.model_type == "llama" and (".attn_q." in name or ".attn_k." in name)


def _neighbours(shape: GPTShape, rows: torch.Tensor) -> torch.Tensor:
    """Rows of each head, (a1, a2, ..., b1, b2, ...), as (a1, b1, a2, b2, ...)."""
    return rows.view(-1, 2, shape.head_dim // 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def _halves(shape: GPTShape, rows: torch.Tensor) -> torch.Tensor:
    """The way back."""
    return rows.view(-1, shape.head_dim // 2, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def write(model: Weights, tokenizer: Tokenizer, directory: Path, dtype: str, name: str) -> None:
    """Write model.gguf. Raises ConfigError for what llama.cpp cannot compute and where the package is missing."""
    need_gguf("format=gguf")
    import gguf

    shape, style = model.shape, model.shape.style
    if style.model_type not in STYLES or (style.model_type == "gpt2" and style.activation != "gelu_tanh"):
        raise ConfigError(
            f"format=gguf is for styles {', '.join(STYLES)}, gpt2 with gelu=tanh, found {style_name(shape)} with "
            f"{style.activation}; choose format=hf or onnx"
        )
    assert isinstance(shape, GPTShape)
    writer = gguf.GGUFWriter(directory / FILE, style.model_type)
    writer.add_name(name)
    writer.add_block_count(shape.num_layers)
    writer.add_context_length(shape.max_seq_len)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.mlp_size)
    writer.add_head_count(shape.num_heads)
    if style.rope_theta is None:
        writer.add_layer_norm_eps(style.norm_eps)
    else:
        writer.add_head_count_kv(shape.kv_heads)
        writer.add_key_length(shape.head_dim)
        writer.add_value_length(shape.head_dim)
        writer.add_layer_norm_rms_eps(style.norm_eps)
        writer.add_rope_dimension_count(shape.head_dim)
        writer.add_rope_freq_base(style.rope_theta)
        writer.add_vocab_size(shape.vocab_size)
    kinds = {"fp32": gguf.LlamaFileType.ALL_F32, "fp16": gguf.LlamaFileType.MOSTLY_F16}
    writer.add_file_type(kinds.get(dtype, gguf.LlamaFileType.MOSTLY_BF16))
    add_tokenizer(writer, tokenizer, shape.vocab_size)
    for ours in model.names():
        tensor = model.weight(ours)
        is_matrix = tensor.dim() == 2 and not ours.startswith("position_embeddings")
        for theirs, piece in to_gguf(shape, ours, tensor):
            add_tensor(writer, theirs, piece, dtype if is_matrix else "fp32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def need_gguf(what: str) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"{what} needs gguf: pip install 'millstream[gguf]'")


def add_tensor(writer: Any, name: str, tensor: torch.Tensor, dtype: str) -> None:
    import gguf

    if dtype == "bf16":  # numpy has none: the upper halves of fp32
        bits = tensor.bfloat16().contiguous().view(torch.int16).numpy().view(np.uint8)
        writer.add_tensor(name, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
        return
    writer.add_tensor(name, tensor.to(torch.float16 if dtype == "fp16" else torch.float32).contiguous().numpy())


def add_tokenizer(writer: Any, tokenizer: Tokenizer, vocab_size: int) -> None:
    """The vocabulary and merges of a byte-level BPE. Raises FormatError for other tokenizers."""
    import gguf

    layout = json.loads(tokenizer.to_str())
    cutter = layout.get("pre_tokenizer") or {}
    plain = cutter.get("type") == "ByteLevel" and not cutter.get("add_prefix_space") and cutter.get("use_regex", True)
    if layout["model"]["type"] != "BPE" or not plain or layout.get("normalizer"):
        raise FormatError(
            "format=gguf is for GPT-2's kind of tokenizer, byte-level BPE, found "
            f"{layout['model']['type']} after {cutter.get('type')}; choose format=hf or onnx"
        )
    special = {token["id"] for token in layout["added_tokens"]}
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    normal, control, unused = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.UNUSED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([by_id.get(number, f"[PAD{number}]") for number in range(vocab_size)])
    writer.add_token_types(
        [control if number in special else normal if number in by_id else unused for number in range(vocab_size)]
    )
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in layout["model"]["merges"]])
    end = end_of_text_id(tokenizer)
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(False)


def read(file: Path) -> Weights:
    """The model of a GGUF file of one of STYLES, quantised ones in fp32. Raises FormatError.

    A GGUF file has no checksums: numbers that were damaged on the way are read as they are.
    """
    import gguf

    fields, found = open_file(file)
    tensors = {tensor.name: tensor for tensor in found}
    shape = read_shape(file, fields, tensors)

    def whole(theirs: str) -> torch.Tensor:
        if theirs not in tensors:
            raise FormatError(f"{file}: lacks the tensor {theirs}; get the file again")
        stored = tensors[theirs]
        numbers = gguf.quants.dequantize(stored.data, stored.tensor_type)
        tensor = torch.from_numpy(np.array(numbers, dtype=np.float32)).view(*reversed(stored.shape.tolist()))
        return _halves(shape, tensor) if _is_reordered(shape, theirs) else tensor

    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in empty_model(shape).named_parameters()}

    def weight(name: str) -> torch.Tensor:
        tensor = torch.cat([whole(theirs) for theirs in gguf_names(shape, name)])
        check_shape(file, name, tensor, expected[name])
        return tensor

    return Weights(shape, weight)


def open_file(file: Path) -> tuple[dict[str, Any], list[Any]]:
    """What a GGUF file says (key -> value), and its tensors. Raises FormatError where it is damaged."""
    need_gguf("a .gguf file")
    import gguf

    try:
        reader = gguf.GGUFReader(file)
        return {key: field.contents() for key, field in reader.fields.items()}, list(reader.tensors)
    except (ValueError, KeyError, IndexError, TypeError, OSError, OverflowError, MemoryError) as error:
        raise FormatError(
            f"{file}: is no GGUF file or damaged ({type(error).__name__}: {error}); copy it again"
        ) from error


def read_shape(file: Path, fields: dict[str, Any], tensors: dict[str, Any]) -> GPTShape:
    kind = fields.get("general.architecture")
    if kind not in STYLES:
        raise FormatError(f"{file}: general.architecture is {kind!r}, expected {', '.join(STYLES)}")
    keys = {"num_layers": "block_count", "hidden_size": "embedding_length", "num_heads": "attention.head_count",
            "max_seq_len": "context_length", "intermediate_size": "feed_forward_length"}  # fmt: skip
    style = replace(GPT_STYLES[kind], has_tied_output="output.weight" not in tensors)
    numbers = {"norm_eps": "attention.layer_norm_epsilon"}
    if style.rope_theta is not None:
        keys |= {"num_kv_heads": "attention.head_count_kv"}
        numbers = {"norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base"}
    embedding = tensors.get("token_embd.weight")
    if lost := [key for key in (*keys.values(), *numbers.values()) if f"{kind}.{key}" not in fields]:
        raise FormatError(f"{file}: does not say {kind}.{lost[0]}; get the file again")
    if embedding is None or f"{kind}.rope.scaling.type" in fields:
        raise FormatError(f"{file}: has no token_embd.weight, or scaled rotary positions; such a model is not read")
    # numbers are in fp32 there: 1e-5 reads as 9.99999975e-06
    given: dict[str, Any] = {name: float(f"{fields[f'{kind}.{key}']:.6g}") for name, key in numbers.items()}
    sizes = {name: fields[f"{kind}.{key}"] for name, key in keys.items()}
    shape = GPTShape(**sizes, vocab_size=int(embedding.shape[1]), style=replace(style, **given))
    check_sizes(file, shape)
    return shape


def read_tokenizer(file: Path) -> Tokenizer:
    """The byte-level BPE of a GGUF file. Raises FormatError for other kinds, whose rules the file does not have."""
    fields, _ = open_file(file)
    kind, cutting = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    tokens, merges = fields.get("tokenizer.ggml.tokens"), fields.get("tokenizer.ggml.merges")
    if kind != "gpt2" or cutting != "gpt-2" or not tokens or merges is None:
        raise FormatError(
            f"{file}: its tokenizer is {kind!r}, cut by {cutting!r}, expected 'gpt2' and 'gpt-2'; give tokenizer=DIR"
        )
    kinds = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    used = {token: number for number, token in enumerate(tokens) if kinds[number] != UNUSED}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps(used), encoding="utf-8")
        Path(folder, "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
        return load_tokenizer(Path(folder))


def llama_logits(file: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the rows `ids` (batch, seq) as llama.cpp computes them, (batch, seq, vocab); needs llama-cpp-python."""
    import llama_cpp

    model = llama_cpp.Llama(str(file), n_ctx=ids.shape[1], logits_all=True, verbose=False)
    rows = []
    for row in ids.tolist():
        model.reset()
        model.eval(row)
        rows.append(torch.from_numpy(np.array(model.scores[: len(row)])))
    model.close()
    return torch.stack(rows)
