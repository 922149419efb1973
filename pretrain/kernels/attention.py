"""Scaled dot-product attention: torch's fused operator, but on CPUs in bf16 a blockwise one of plain matrix products.

    softmax(q k^T / sqrt(head_dim) + mask) v

On a CPU torch's fused operator spends most of its time in a backward pass that does not keep the cores' bf16 units
busy. Matrix products over blocks of queries do, and a causal block skips the keys after it: forward and backward
together are 2.5 times faster at 128 tokens, 1.3 to 1.6 times at 512 and no longer at 1,024 (docs/benchmarks.md), where
the scores leave the cache; with a mask torch's operator is slower, and blocks win there too. The scores are rounded to
bf16 once, as in any attention written out in bf16; the softmax sums in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

BLOCK_QUERIES = 256  # 128 to 256 were equally fast, 64 and 512 slower
LONGEST_UNMASKED = 512  # in tokens; beyond, torch's operator is as fast without a mask


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention of q, k, v (batch, heads, seq, head_dim), one dtype; returns the same shape.

    mask (batch or 1, heads or 1, seq, seq) bool, True where a query may look; with `causal` and a mask, the mask must
    hide later keys itself. Every query must see some key. `dropout` is the share of attention weights set to zero.
    """
    suits_blocks = mask is not None or q.shape[-2] <= LONGEST_UNMASKED
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and suits_blocks:
        return _blockwise(q, k, v, mask, causal, dropout)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None, dropout_p=dropout)


def _blockwise(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool, dropout: float
) -> torch.Tensor:
    seq = q.shape[-2]
    q = q * q.shape[-1] ** -0.5
    blocks = []
    for start in range(0, seq, BLOCK_QUERIES):
        stop = min(seq, start + BLOCK_QUERIES)
        end = stop if causal else seq  # no query of this block sees a key from `end` on
        scores = q[..., start:stop, :] @ k[..., :end, :].transpose(-1, -2)  # (batch, heads, block, end)
        if mask is not None:
            scores.masked_fill_(~mask[..., start:stop, :end], float("-inf"))
        elif causal:
            later = torch.ones(stop - start, stop - start, dtype=torch.bool).triu(1)
            scores[..., start:stop].masked_fill_(later, float("-inf"))
        weights = F.dropout(torch.softmax(scores, -1), dropout)
        blocks.append(weights @ v[..., :end, :])
    return torch.cat(blocks, -2) if len(blocks) > 1 else blocks[0]
