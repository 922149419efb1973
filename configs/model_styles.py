"""Styles of models: what is inside of a block, whatever its size. A style is settings of one block, not a class.

Each has the name, or nearly so, of the class of transformers that an export becomes (`pretrain/models/hf.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Style:
    """How the blocks of a model are made; the defaults are GPT-2's."""

    model_type: str  # in the config.json of transformers
    is_causal: bool = True
    norm: Literal["layer", "rms"] = "layer"  # layer normalisation, or RMSNorm (Zhang and Sennrich 2019)
    norm_eps: float = 1e-5
    norm_first: bool = True  # x + f(norm(x)); False: norm(x + f(x)), as in BERT
    norms_embeddings: bool = False  # with norm_first the first block then has no norm before its attention
    norms_qk: bool = False  # RMSNorm of every head's queries and keys (Dehghani et al. 2023), before they are rotated
    activation: Literal["gelu_tanh", "gelu", "silu"] = "gelu_tanh"
    is_gated: bool = False  # activation(gate) x up: SwiGLU with silu, GeGLU with gelu (Shazeer 2020)
    has_bias: bool = True  # of linear layers and layer norms
    has_qkv_bias: bool = True
    has_tied_output: bool = True  # the output layer is the word embedding
    has_pairs: bool = False  # BERT: pooler, next sentence, token types
    rope_theta: float | None = None  # base of rotary positions (Su et al. 2021); None: learned positions
    # A local block looks at so many tokens: itself and those before it, or, not causal, half before and half after it
    local_window: int | None = None
    local_rope_theta: float | None = None  # of local blocks; None: rope_theta
    global_every: int = 1  # blocks 0, n, 2 n, ... look at everything, the others are local

    def window(self, layer: int) -> int | None:
        """Of this block, in tokens; None: it looks at everything."""
        return None if layer % self.global_every == 0 else self.local_window

    def theta(self, layer: int) -> float | None:
        """Of this block's rotary positions."""
        is_local = self.window(layer) is not None
        return self.local_rope_theta if is_local and self.local_rope_theta is not None else self.rope_theta


LLAMA = Style(
    "llama", norm="rms", activation="silu", is_gated=True, has_bias=False, has_qkv_bias=False, has_tied_output=False,
    rope_theta=10_000.0,
)  # fmt: skip

GPT_STYLES = {
    "gpt2": Style("gpt2"),  # Radford et al. 2019
    # GPT-3's alternating dense and locally banded attention (Brown et al. 2020, section 2.1, where no width of the band
    # is given; 256 is GPT-Neo's); without biases of queries, keys and values, which transformers' GPT-Neo does not have
    "gpt-neo": Style("gpt_neo", has_qkv_bias=False, local_window=256, global_every=2),
    "llama": LLAMA,  # Touvron et al. 2023; with num_kv_heads grouped-query attention (Ainslie et al. 2023)
    "qwen3": Style(
        "qwen3", norm="rms", norm_eps=1e-6, norms_qk=True, activation="silu", is_gated=True, has_bias=False,
        has_qkv_bias=False, has_tied_output=True, rope_theta=1_000_000.0,
    ),  # Yang et al. 2025: Llama with QK-norm
}  # fmt: skip

BERT_STYLES = {
    "bert": Style(
        "bert", is_causal=False, norm_eps=1e-12, norm_first=False, norms_embeddings=True, activation="gelu",
        has_pairs=True,
    ),  # Devlin et al. 2019
    "modernbert": Style(
        "modernbert", is_causal=False, norms_embeddings=True, activation="gelu", is_gated=True, has_bias=False,
        has_qkv_bias=False, rope_theta=160_000.0, local_window=128, local_rope_theta=10_000.0, global_every=3,
    ),  # Warner et al. 2024
}  # fmt: skip
