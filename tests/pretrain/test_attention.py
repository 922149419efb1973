"""Attention on every path against softmax(q k^T / sqrt(d)) v written out in float64."""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.kernels import attention as kernel
from pretrain.kernels.attention import attention, sequence_blocks, varlen_attention


def reference(q, k, v, mask, causal):
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril() if causal and mask is None else mask
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return torch.softmax(scores, -1) @ v


def documents(seq: int, causal: bool) -> torch.Tensor:
    """A mask for rows of two documents, cut at different places; (2, 1, seq, seq)."""
    segments = (torch.arange(seq) >= torch.tensor([[seq // 3], [seq // 2]])).int()
    mask = segments[:, None, :, None] == segments[:, None, None, :]
    return mask.tril() if causal else mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seq", [1, 7, 32, 65])
def test_output_and_gradients_are_those_of_the_formula(dtype, causal, masked, seq, monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK_QUERIES", 16)  # several blocks, the last one partly filled
    torch.manual_seed(seq)
    qkv = torch.randn(2, seq, 3, 3, 8).to(dtype).permute(2, 0, 3, 1, 4)  # strided, as in the model
    mask = documents(seq, causal) if masked else None
    ours = [t.detach().requires_grad_() for t in qkv]
    exact = [t.detach().double().requires_grad_() for t in qkv]
    weights = torch.randn(2, 3, seq, 8)
    expected = reference(*exact, mask, causal)
    (expected * weights).sum().backward()
    output = attention(*ours, mask, causal)
    (output * weights).sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)
    for tensor, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(tensor.grad.double(), other.grad, atol=2 * tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("seq", "window", "kv_heads"), [(1, 2, 2), (7, 6, 1), (40, 9, 2), (65, 16, 4), (65, 200, 1)])
def test_windows_and_shared_keys_are_those_of_the_formula(dtype, causal, masked, seq, window, kv_heads, monkeypatch):
    monkeypatch.setattr(kernel, "LOCAL_QUERIES", 16)
    torch.manual_seed(seq)
    heads = torch.randn(2, seq, 4 + 2 * kv_heads, 8).to(dtype).transpose(1, 2)
    ours = [t.detach().requires_grad_() for t in heads.split([4, kv_heads, kv_heads], 1)]
    exact = [t.detach().double().requires_grad_() for t in ours]
    mask = documents(seq, causal) if masked else None
    distance = torch.arange(seq) - torch.arange(seq)[:, None]  # of a key from its query
    near = (distance > -window) & (distance <= 0) if causal else distance.abs() <= window // 2
    q, k, v = exact[0], *(t.repeat_interleave(4 // kv_heads, 1) for t in exact[1:])
    weights = torch.randn(2, 4, seq, 8)
    expected = reference(q, k, v, near if mask is None else near & mask, causal)
    (expected * weights).sum().backward()
    output = attention(*ours, mask, causal, window=window)
    (output * weights).sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)
    for tensor, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(tensor.grad.double(), other.grad, atol=3 * tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_windows_of_a_long_row_stay_inside_of_each_sequence_and_padding_is_no_nan(dtype, causal):
    torch.manual_seed(0)
    lengths, window = [40, 33, 3, 1, 20], 6  # one block; places of padding are far from any key
    ours = torch.randn(sum(lengths), 3, 2, 8).to(dtype).requires_grad_()
    exact = ours.detach().double().requires_grad_()
    weights = torch.randn(sum(lengths), 2, 8)
    parts = []
    for part in exact.split(lengths):
        distance = torch.arange(len(part)) - torch.arange(len(part))[:, None]
        near = (distance > -window) & (distance <= 0) if causal else distance.abs() <= window // 2
        parts.append(reference(*part.permute(1, 2, 0, 3), near, causal).transpose(0, 1))
    (torch.cat(parts) * weights).sum().backward()
    output = varlen_attention(ours, sequence_blocks(boundaries(lengths), 2), causal, window=window)
    (output * weights).sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(output.double(), torch.cat(parts), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(ours.grad.double(), exact.grad, atol=2 * tolerance, rtol=tolerance)


def test_large_scores_do_not_overflow():
    q = torch.full((1, 1, 4, 8), 100.0, dtype=torch.bfloat16)
    assert torch.isfinite(attention(q, q, q, causal=True)).all()


def test_dropout_zeroes_that_share_and_keeps_the_mean():
    torch.manual_seed(0)
    q = torch.zeros(8, 4, 64, 8, dtype=torch.bfloat16)
    v = torch.ones_like(q)
    dropped = attention(q, q, v, dropout=0.25).float()
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.02)
    assert dropped.std().item() > 0.01
    assert torch.equal(attention(q, q, v).float(), torch.ones_like(dropped))


def boundaries(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [[9], [12, 12, 12, 7, 5, 5, 1], [1, 30, 2, 2, 17], [3, 3]], ids=str)
def test_each_sequence_of_a_long_row_gets_its_own_attention(dtype, causal, lengths, monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK_SCORES", 3 * 2 * 12**2)  # blocks of one, of equal and of unequal lengths
    torch.manual_seed(0)
    total = sum(lengths)
    ours = torch.randn(total, 3, 3, 8).to(dtype).requires_grad_()
    exact = ours.detach().double().requires_grad_()
    weights = torch.randn(total, 3, 8)
    parts = [part.permute(1, 2, 0, 3) for part in exact.split(lengths)]  # each (3, heads, length, head_dim)
    expected = torch.cat([reference(*part, None, causal).transpose(0, 1) for part in parts])
    (expected * weights).sum().backward()
    blocks = sequence_blocks(boundaries(lengths), num_heads=3)
    output = varlen_attention(ours, blocks, causal)
    (output * weights).sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(ours.grad.double(), exact.grad, atol=2 * tolerance, rtol=tolerance)


def test_block_of_sequences_holds_no_more_scores_than_allowed_but_for_one_long_sequence(monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK_SCORES", 2 * 4 * 10**2)
    blocks = sequence_blocks(boundaries([50, 10, 10, 10, 9, 8, 2, 2]), num_heads=2)
    shapes = [(block.num_sequences, block.longest) for block in blocks]
    assert shapes == [(1, 50), (4, 10), (3, 8)]
    assert [block.mask is None for block in blocks] == [True, False, False]


def test_dropout_of_a_long_row_zeroes_that_share_and_keeps_the_mean():
    torch.manual_seed(0)
    lengths = [64] * 4 + [48, 40]
    qkv = torch.zeros(sum(lengths), 3, 4, 8)
    qkv[:, 2] = 1.0
    blocks = sequence_blocks(boundaries(lengths), num_heads=4)
    dropped = varlen_attention(qkv, blocks, dropout=0.25)
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.02)
    assert dropped.std().item() > 0.01
