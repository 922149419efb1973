"""Scaled dot-product attention: torch's fused operator, but on CPUs in bf16 a blockwise one of plain matrix products.

    softmax(q k^T / sqrt(head_dim) + mask) v

On a CPU torch's fused operator spends most of its time in a backward pass that does not keep the cores' bf16 units
busy. Matrix products over blocks of queries do, and a causal block skips the keys after it: forward and backward
together are 2.5 times faster at 128 tokens, 1.3 to 1.6 times at 512 and no longer at 1,024 (docs/benchmarks.md), where
the scores leave the cache; with a mask torch's operator is slower, and blocks win there too. The scores are rounded to
bf16 once, as in any attention written out in bf16; the softmax sums in fp32.

Batches without padding (`varlen_attention`) are one long row of sequences. It is cut into blocks of consecutive
sequences, each padded to the longest in it: as many as keep the scores in the cache, so a long sequence is a block of
its own and short ones share the operators' overhead. On a GPU all sequences are one block, so only attention is padded.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

BLOCK_QUERIES = 256  # 128 to 256 were equally fast, 64 and 512 slower
LONGEST_UNMASKED = 512  # in tokens; beyond, torch's operator is as fast without a mask
BLOCK_SCORES = 1 << 20  # of a block of sequences; 2^19 to 2^21 were equally fast, 2^17 and no limit slower


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


@dataclass(frozen=True)
class SequenceBlock:
    """Consecutive sequences of a long row that are attended to in one operation; see `sequence_blocks`.

    Sequences of unequal lengths are padded: token `source[i]` of the block (int64; 0 for padding) goes to place i of
    (num_sequences, longest), flattened, `places` are those that hold a token, and `mask` (num_sequences, 1, longest,
    longest) hides the padding. For equal lengths all three are None.
    """

    num_tokens: int
    num_sequences: int
    longest: int
    source: torch.Tensor | None = None
    places: torch.Tensor | None = None
    mask: torch.Tensor | None = None


def sequence_blocks(cu_seqlens: torch.Tensor, num_heads: int) -> list[SequenceBlock]:
    """How to attend to the sequences [cu_seqlens[i], cu_seqlens[i + 1]) of a row, for all layers of a model.

    cu_seqlens (num_sequences + 1,) int32, ascending from 0. Sequences of like length should lie side by side.
    """
    limit = BLOCK_SCORES if cu_seqlens.device.type == "cpu" else float("inf")
    groups: list[list[int]] = []
    for start, stop in itertools.pairwise(cu_seqlens.tolist()):
        longest = max([stop - start, *(groups[-1] if groups else [])])
        if not groups or (len(groups[-1]) + 1) * num_heads * longest**2 > limit:
            groups.append([])
        groups[-1].append(stop - start)
    return [_block(lengths, cu_seqlens.device) for lengths in groups]


def _block(lengths: list[int], device: torch.device) -> SequenceBlock:
    shape = (len(lengths), max(lengths))
    if min(lengths) == max(lengths):
        return SequenceBlock(sum(lengths), *shape)
    columns, sizes = torch.arange(shape[1], device=device), torch.tensor(lengths, device=device)[:, None]
    real = columns < sizes  # (num_sequences, longest)
    source = torch.where(real, sizes.cumsum(0) - sizes + columns, 0).flatten()
    mask = real[:, None, None, :].expand(-1, 1, shape[1], -1)
    return SequenceBlock(sum(lengths), *shape, source, real.flatten().nonzero()[:, 0], mask)


def varlen_attention(
    qkv: torch.Tensor, blocks: list[SequenceBlock], causal: bool = False, dropout: float = 0.0
) -> torch.Tensor:
    """Attention of each sequence of a long row to itself: qkv (total, 3, heads, head_dim) -> (total, heads, head_dim).

    blocks: of `sequence_blocks`, whose tokens are `total`. `dropout` is the share of attention weights set to zero.
    """
    mixed = []
    for block, part in zip(blocks, qkv.split([block.num_tokens for block in blocks]), strict=True):
        rows = part if block.source is None else part.index_select(0, block.source)
        q, k, v = rows.unflatten(0, (block.num_sequences, block.longest)).permute(2, 0, 3, 1, 4)
        mask = None if causal else block.mask  # padding comes last: with `causal` nothing real looks at it
        out = attention(q, k, v, mask, causal, dropout).transpose(1, 2).flatten(0, 1)
        mixed.append(out if block.places is None else out.index_select(0, block.places))
    return torch.cat(mixed) if len(mixed) > 1 else mixed[0]
