"""What GPT and BERT share: initialised layers, attention inside documents, the MLP.

Initialisation happens in `reset_parameters`, which torch calls while the layer is being made: under ZeRO-3 a parameter
is whole only there, and cut into the ranks' pieces as soon as its layer exists.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from pretrain.kernels.attention import SequenceBlock, attention, varlen_attention

# Who may look at whom: an `attention_mask`, None for everybody (or all earlier ones), or the sequences of one long row.
Visible = torch.Tensor | list[SequenceBlock] | None


class Linear(nn.Linear):
    """nn.Linear with weights from N(0, std) and zero bias, as GPT-2 and BERT draw them."""

    def __init__(self, in_features: int, out_features: int, std: float) -> None:
        self.std = std
        super().__init__(in_features, out_features)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
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


def attention_mask(segment_ids: torch.Tensor | None, causal: bool) -> torch.Tensor | None:
    """Who may look at whom: (batch, 1, seq, seq) bool, or None where nothing but causality restricts it.

    A token sees the tokens with its own segment id (its document), and with `causal` only the earlier ones of those.
    Where no row holds more than one segment the mask is None, which lets attention take its fastest path.
    """
    if segment_ids is None or bool((segment_ids == segment_ids[:, :1]).all()):
        return None
    mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return mask.tril() if causal else mask


class Attention(nn.Module):
    """Multi-head self-attention; query, key and value come from one matrix product. query_scale: of the queries."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        dropout: float,
        std: float,
        output_std: float,
        causal: bool,
        query_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.dropout, self.causal, self.query_scale = num_heads, dropout, causal, query_scale
        self.qkv = Linear(hidden_size, 3 * hidden_size, std)
        self.output = Linear(hidden_size, hidden_size, output_std)

    def forward(self, x: torch.Tensor, mask: Visible) -> torch.Tensor:
        batch, seq, hidden_size = x.shape
        qkv = self.qkv(x).view(batch, seq, 3, self.num_heads, hidden_size // self.num_heads)
        dropout = self.dropout if self.training else 0.0
        if isinstance(mask, list):  # one long row of sequences
            mixed = varlen_attention(qkv.flatten(0, 1), mask, self.causal, dropout)  # (seq, heads, head_dim)
        else:
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, seq, head_dim)
            if self.query_scale != 1:
                q = q * self.query_scale
            mixed = attention(q, k, v, mask, self.causal, dropout).transpose(1, 2)
        return self.output(mixed.reshape(batch, seq, hidden_size))


class MLP(nn.Module):
    """Two linear layers with GELU between; `approximate` is "tanh" for GPT-2 and "none" for BERT."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, approximate: str, std: float, output_std: float
    ) -> None:
        super().__init__()
        self.approximate = approximate
        self.up = Linear(hidden_size, intermediate_size, std)
        self.down = Linear(intermediate_size, hidden_size, output_std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x), approximate=self.approximate))
