"""GGUF: a GPT-2 with its tokenizer in one file, for llama.cpp and what is built on it.

Matrices are in the export's dtype, norms, biases and positions in fp32, as llama.cpp's own converter has them.
llama.cpp computes GELU by the tanh formula, as GPT-2 does, from a table in fp16: its logits are near ours only.
Its BERT has no head for masked words, so no BERT is written.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from configs.errors import ConfigError
from configs.model_sizes import GPTShape, style_name
from data_pipeline.tokenizer import end_of_text_id
from pretrain.formats.weights import FormatError, Weights

FILE = "model.gguf"
NAMES = {
    "word_embeddings.": "token_embd.",
    "position_embeddings.": "position_embd.",
    "final_norm.": "output_norm.",
    "attention_norm.": "attn_norm.",
    "attention.qkv.": "attn_qkv.",
    "attention.output.": "attn_output.",
    "mlp_norm.": "ffn_norm.",
    "mlp.up.": "ffn_up.",
    "mlp.down.": "ffn_down.",
}


def gguf_name(name: str) -> str:
    """`blocks.3.mlp.up.weight` -> `blk.3.ffn_up.weight`"""
    prefix, inner = "", name
    if name.startswith("blocks."):
        _, number, inner = name.split(".", 2)
        prefix = f"blk.{number}."
    module, _, leaf = inner.rpartition(".")
    return f"{prefix}{NAMES[module + '.']}{leaf}"


def write(model: Weights, tokenizer: Tokenizer, directory: Path, dtype: str, name: str) -> None:
    """Write model.gguf. Raises ConfigError for what llama.cpp cannot compute and where the package is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("format=gguf needs gguf: pip install 'millstream[gguf]'")
    import gguf

    shape = model.shape
    if shape.style.model_type != "gpt2" or shape.style.activation != "gelu_tanh":
        raise ConfigError(
            f"format=gguf is for style gpt2 with gelu=tanh, found style {style_name(shape)} with "
            f"{shape.style.activation}; choose format=hf or onnx"
        )
    writer = gguf.GGUFWriter(directory / FILE, "gpt2")
    writer.add_name(name)
    writer.add_block_count(shape.num_layers)
    writer.add_context_length(shape.max_seq_len)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.mlp_size)
    writer.add_head_count(shape.num_heads)
    writer.add_layer_norm_eps(shape.style.norm_eps)
    kinds = {"fp32": gguf.LlamaFileType.ALL_F32, "fp16": gguf.LlamaFileType.MOSTLY_F16}
    writer.add_file_type(kinds.get(dtype, gguf.LlamaFileType.MOSTLY_BF16))
    add_tokenizer(writer, tokenizer, shape.vocab_size)
    for ours in model.names():
        tensor = model.weight(ours)
        is_matrix = tensor.dim() == 2 and not ours.startswith("position_embeddings")
        add_tensor(writer, gguf_name(ours), tensor, dtype if is_matrix else "fp32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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


def read(file: Path, shape: GPTShape) -> Weights:
    """The weights of a written file, through gguf's own reader."""
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}

    def weight(name: str) -> torch.Tensor:
        found = tensors[gguf_name(name)]
        whole = gguf.quants.dequantize(found.data, found.tensor_type)
        return torch.from_numpy(np.array(whole, dtype=np.float32)).view(*reversed(found.shape.tolist()))

    return Weights(shape, weight)


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
