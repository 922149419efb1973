"""Scaled dot-product attention: torch's fused operator, but on CPUs in bf16 a blockwise one of plain matrix products.

    softmax(q k^T / sqrt(head_dim) + mask) v

On a CPU torch's fused operator spends most of its time in a backward pass that does not keep the cores' bf16 units
busy. Matrix products over blocks of queries do, and a causal block skips the keys after it: forward and backward
together are 2.5 times faster at 128 tokens, 1.5 to 1.9 times at 512 and no longer at 1,024 (docs/benchmarks.md), where
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
LOCAL_QUERIES = 128  # of a block with a window: smaller ones look at fewer keys in vain, larger ones are fewer
LONGEST_UNMASKED = 512  # in tokens; beyond, torch's operator is as fast without a mask
BLOCK_SCORES = 1 << 20  # of a block of sequences; 2^19 to 2^21 were equally fast, 2^17 and no limit slower


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    window: int | None = None,
) -> torch.Tensor:
    """Attention of q, k, v (batch, heads, seq, head_dim), one dtype; returns the shape of q.

    k and v may have fewer heads, each for heads / kv_heads consecutive heads of q (Ainslie et al. 2023).
    mask (batch or 1, heads or 1, seq, seq) bool, True where a query may look; with `causal` and a mask, the mask must
    hide later keys itself. Every query must see some key. `dropout` is the share of attention weights set to zero.
    window: so many tokens are looked at, with `causal` itself and those before, else also half before and half after.
    """
    if k.shape[1] != q.shape[1]:
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
    if window is not None:
        back, ahead = reach(window, causal)
        if q.shape[-2] > 1 + max(back, ahead):
            return _local(q, k, v, mask, back, ahead, dropout)
    suits_blocks = mask is not None or q.shape[-2] <= LONGEST_UNMASKED
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and suits_blocks:
        return _blockwise(q, k, v, mask, causal, dropout)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None, dropout_p=dropout)


def reach(window: int, causal: bool) -> tuple[int, int]:
    """How many tokens before and after itself a token sees."""
    return (window - 1, 0) if causal else (window // 2, window // 2)


def _local(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, back: int, ahead: int, dropout: float
) -> torch.Tensor:
    """Attention to the `back` tokens before, itself, and the `ahead` tokens after, block by block of queries.

    A block computes scores with the keys that one of it can see, so work and memory grow with seq x window. A token
    always sees itself, also padding, whose other keys the mask may all hide: a row of nothing would be NaN.
    """
    seq = q.shape[-2]
    blocks = []
    for start in range(0, seq, LOCAL_QUERIES):
        stop = min(seq, start + LOCAL_QUERIES)
        first, end = max(0, start - back), min(seq, stop + ahead)
        places = torch.arange(first, end, device=q.device)
        distance = places - torch.arange(start, stop, device=q.device)[:, None]  # (block, keys)
        near = (distance >= -back) & (distance <= ahead)
        if mask is not None:
            near = near & mask[..., start:stop, first:end] | (distance == 0)
        block = (q[..., start:stop, :], k[..., first:end, :], v[..., first:end, :])
        blocks.append(attention(*block, near, False, dropout))
    return torch.cat(blocks, -2) if len(blocks) > 1 else blocks[0]


def _blockwise(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool, dropout: float
) -> torch.Tensor:
    seq = q.shape[-2]
    q = q * q.shape[-1] ** -0.5
    hidden = None if mask is None else _hidden(~mask, q.dtype)
    blocks = []
    for start in range(0, seq, BLOCK_QUERIES):
        stop = min(seq, start + BLOCK_QUERIES)
        end = stop if causal else k.shape[-2]  # no query of this block sees a key from `end` on
        scores = q[..., start:stop, :] @ k[..., :end, :].transpose(-1, -2)  # (batch, heads, block, end)
        if hidden is not None:
            scores += hidden[..., start:stop, :end]
        elif causal:
            later = torch.ones(stop - start, stop - start, dtype=torch.bool).triu(1)
            scores[..., start:stop] += _hidden(later, q.dtype)
        weights = F.dropout(torch.softmax(scores, -1), dropout)
        blocks.append(weights @ v[..., :end, :])
    return torch.cat(blocks, -2) if len(blocks) > 1 else blocks[0]


def _hidden(places: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """-inf at `places`, else 0: adding it is four times faster on a CPU than masked_fill_, and backward has no work."""
    return torch.zeros_like(places, dtype=dtype).masked_fill_(places, float("-inf"))


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
    qkv: torch.Tensor,
    blocks: list[SequenceBlock],
    causal: bool = False,
    dropout: float = 0.0,
    window: int | None = None,
) -> torch.Tensor:
    """Attention of each sequence of a long row to itself: qkv (total, 3, heads, head_dim) -> (total, heads, head_dim).

    blocks: of `sequence_blocks`, whose tokens are `total`. `dropout`, `window`: as for `attention`.
    """
    mixed = []
    for block, part in zip(blocks, qkv.split([block.num_tokens for block in blocks]), strict=True):
        rows = part if block.source is None else part.index_select(0, block.source)
        q, k, v = rows.unflatten(0, (block.num_sequences, block.longest)).permute(2, 0, 3, 1, 4)
        mask = None if causal else block.mask  # padding comes last: with `causal` nothing real looks at it
        out = attention(q, k, v, mask, causal, dropout, window).transpose(1, 2).flatten(0, 1)
        mixed.append(out if block.places is None else out.index_select(0, block.places))
    return torch.cat(mixed) if len(mixed) > 1 else mixed[0]
