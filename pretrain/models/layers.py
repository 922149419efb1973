"""What GPT and BERT share: initialised layers, attention inside documents, the MLP, and the block made of them.

Initialisation happens in `reset_parameters`, which torch calls while the layer is being made: under ZeRO-3 a parameter
is whole only there, and cut into the ranks' pieces as soon as its layer exists.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from configs.model_sizes import Shape
from configs.model_styles import Style
from pretrain.kernels.activation import linear_activation, linear_gated_activation
from pretrain.kernels.add_norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from pretrain.kernels.attention import SequenceBlock, attention, varlen_attention
from pretrain.kernels.rotary import Rotation, rotary, rotation

# Who may look at whom: an `attention_mask`, None for everybody (or all earlier ones), or the sequences of one long row.
Visible = torch.Tensor | list[SequenceBlock] | None
# Of a norm: norm(x), or (norm(s), s) with s = residual + dropout(x), which is one pass over memory on a GPU.
Normed = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class Linear(nn.Linear):
    """nn.Linear with weights from N(0, std) and zero bias, as GPT-2 and BERT draw them."""

    def __init__(self, in_features: int, out_features: int, std: float, bias: bool = True) -> None:
        self.std = std
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """nn.Embedding with rows from N(0, std); the row `padding_idx`, if any, starts at zero and is not looked up."""

    def __init__(self, num_embeddings: int, embedding_dim: int, std: float, padding_idx: int | None = None) -> None:
        self.std = std
        super().__init__(num_embeddings, embedding_dim, padding_idx)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        self._fill_padding_idx_with_zero()


class Bias(nn.Module):
    """A parameter of zeros, (size,), that a module of its own owns, so that ZeRO-3 finds it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size))


class RMSNorm(nn.Module):
    """`rms_norm` with a weight of its own, (size,), which starts at one; with a `residual`, `add_rms_norm`."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None, dropout: float = 0.0) -> Normed:
        if residual is None:
            return rms_norm(x, self.weight, self.eps)
        return add_rms_norm(x, residual, self.weight, self.eps, dropout)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm by `layer_norm`; with a `residual`, `add_layer_norm`."""

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, residual: torch.Tensor | None = None, dropout: float = 0.0
    ) -> Normed:
        if residual is None:
            return layer_norm(x, self.weight, self.bias, self.eps)
        return add_layer_norm(x, residual, self.weight, self.bias, self.eps, dropout)


def make_norm(size: int, style: Style) -> nn.Module:
    if style.norm == "rms":
        return RMSNorm(size, style.norm_eps)
    return LayerNorm(size, style.norm_eps, bias=style.has_bias)


def attention_mask(segment_ids: torch.Tensor | None, causal: bool) -> torch.Tensor | None:
    """Who may look at whom: (batch, 1, seq, seq) bool, or None where nothing but causality restricts it.

    A token sees the tokens with its own segment id (its document), and with `causal` only the earlier ones of those.
    Where no row holds more than one segment the mask is None, which lets attention take its fastest path.
    """
    if segment_ids is None or bool((segment_ids == segment_ids[:, :1]).all()):
        return None
    mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return mask.tril() if causal else mask


def rotations(shape: Shape, position_ids: torch.Tensor) -> list[Rotation | None]:
    """Of each block, for position_ids (batch, seq) or (seq,); None where positions are learned."""
    thetas = [shape.style.theta(layer) for layer in range(shape.num_layers)]
    found = {theta: rotation(position_ids, shape.head_dim, theta) for theta in set(thetas) if theta is not None}
    return [None if theta is None else found[theta] for theta in thetas]


class Attention(nn.Module):
    """Multi-head self-attention of block `layer`; query, key and value come from one matrix product.

    query_scale: of the queries.
    """

    def __init__(
        self, shape: Shape, layer: int, dropout: float, std: float, output_std: float, query_scale: float = 1.0
    ) -> None:
        super().__init__()
        style = shape.style
        self.num_heads, self.kv_heads, self.head_dim = shape.num_heads, shape.kv_heads, shape.head_dim
        self.dropout, self.causal, self.query_scale = dropout, style.is_causal, query_scale
        self.window = style.window(layer)
        num_heads = shape.num_heads + 2 * shape.kv_heads
        self.qkv = Linear(shape.hidden_size, num_heads * shape.head_dim, std, style.has_qkv_bias)
        self.query_norm = RMSNorm(shape.head_dim, style.norm_eps) if style.norms_qk else None
        self.key_norm = RMSNorm(shape.head_dim, style.norm_eps) if style.norms_qk else None
        self.output = Linear(shape.hidden_size, shape.hidden_size, output_std, style.has_bias)

    def forward(self, x: torch.Tensor, mask: Visible, rotation: Rotation | None = None) -> torch.Tensor:
        batch, seq, hidden_size = x.shape
        qkv = self.qkv(x).view(batch, seq, -1, self.head_dim)  # heads of queries, then of keys, then of values
        if rotation is not None:
            qkv = self.normed_and_rotated(qkv, rotation)
        dropout = self.dropout if self.training else 0.0
        if isinstance(mask, list):  # one long row of sequences
            thirds = qkv.view(seq, 3, self.num_heads, self.head_dim)
            mixed = varlen_attention(thirds, mask, self.causal, dropout, self.window)  # (seq, heads, head_dim)
        else:
            q, k, v = qkv.transpose(1, 2).split([self.num_heads, self.kv_heads, self.kv_heads], 1)
            if self.query_scale != 1:
                q = q * self.query_scale
            mixed = attention(q, k, v, mask, self.causal, dropout, self.window).transpose(1, 2)
        return self.output(mixed.reshape(batch, seq, hidden_size))

    def normed_and_rotated(self, qkv: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        """qkv (batch, seq, heads, head_dim) with what is done to queries and keys by their positions."""
        if self.query_norm is None or self.key_norm is None:
            return rotary(qkv, rotation, self.num_heads + self.kv_heads)
        q, k, v = qkv.split([self.num_heads, self.kv_heads, self.kv_heads], 2)
        looking = torch.cat([self.query_norm(q), self.key_norm(k)], 2)
        return torch.cat([rotary(looking, rotation), v], 2)


class ActivatedLinear(Linear):
    """A linear layer with the style's activation on it: of each column, or of `columns` gates, times as many values."""

    def __init__(self, in_features: int, columns: int, std: float, style: Style) -> None:
        self.activation, self.is_gated = style.activation, style.is_gated
        super().__init__(in_features, 2 * columns if style.is_gated else columns, std, style.has_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        function = linear_gated_activation if self.is_gated else linear_activation
        return function(x, self.weight, self.bias, self.activation)


class MLP(nn.Module):
    """Two linear layers with the style's activation between; gated, the first one makes gates and values at once."""

    def __init__(self, shape: Shape, std: float, output_std: float) -> None:
        super().__init__()
        self.is_gated = shape.style.is_gated
        first = ActivatedLinear(shape.hidden_size, shape.mlp_size, std, shape.style)
        if self.is_gated:
            self.gate_up = first  # named for what it is: two matrices, which muon.py takes apart
        else:
            self.up = first
        self.down = Linear(shape.mlp_size, shape.hidden_size, output_std, shape.style.has_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.gate_up(x) if self.is_gated else self.up(x))


class Block(nn.Module):
    """Attention and MLP, each added to what it looks at: x + f(norm(x)), or norm(x + f(x)), as the style says.

    The matrices start from N(0, std), the last one of each of the two from N(0, output_std).
    """

    def __init__(
        self,
        shape: Shape,
        layer: int,
        dropout: float,
        attention_dropout: float,
        std: float,
        output_std: float,
        query_scale: float = 1.0,
    ) -> None:
        super().__init__()
        style = shape.style
        self.norm_first = style.norm_first
        is_normed = style.norm_first and style.norms_embeddings and layer == 0
        self.attention_norm = nn.Identity() if is_normed else make_norm(shape.hidden_size, style)
        self.attention = Attention(shape, layer, attention_dropout, std, output_std, query_scale)
        self.mlp_norm = make_norm(shape.hidden_size, style)
        self.mlp = MLP(shape, std, output_std)
        self.dropout = dropout

    def forward(self, x: torch.Tensor, mask: Visible, rotation: Rotation | None = None) -> torch.Tensor:
        """x (batch, seq, hidden) -> the same shape; `rotation` of `rotations`."""
        dropout = self.dropout if self.training else 0.0
        if self.norm_first:
            normed, x = self.mlp_norm(self.attention(self.attention_norm(x), mask, rotation), x, dropout)
            return x + F.dropout(self.mlp(normed), dropout)
        x, _ = self.attention_norm(self.attention(x, mask, rotation), x, dropout)
        return self.mlp_norm(self.mlp(x), x, dropout)[0]
