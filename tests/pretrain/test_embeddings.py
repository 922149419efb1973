"""BERT's embeddings: the kernels, run on the CPU, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pretrain.kernels import native
from pretrain.kernels.embeddings import bert_embeddings
from tests.pretrain.kernels_on_cpu import DTYPES, close, dropout_factors

PADDING_ID, SEED = 3, 0xABCDEF12345


def inputs(batch: int, seq: int, vocab: int, hidden: int, dtype: torch.dtype) -> tuple[list, list, torch.Tensor]:
    """Ids of three kinds, tables and weights, and the gradient of the result."""
    generator = torch.Generator().manual_seed(batch * seq + hidden)
    ids = torch.randint(vocab, (batch, seq), generator=generator)
    ids[:, seq // 2 :: 3] = PADDING_ID
    types = (torch.arange(seq) >= seq // 2).long().expand(batch, seq)
    shapes = ((vocab, hidden), (seq + 2, hidden), (2, hidden), (hidden,), (hidden,), (batch, seq, hidden))
    *weights, grad = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return [ids, torch.arange(seq), types], weights, grad


def exact(ids: list, weights: list, dropout: float) -> torch.Tensor:
    word, position, token_type, weight, bias = weights
    found = F.embedding(ids[0], word, PADDING_ID) + F.embedding(ids[1], position) + F.embedding(ids[2], token_type)
    normed = F.layer_norm(found, weight.shape, weight, bias, 1e-12)
    return normed * dropout_factors(SEED, normed.shape, dropout)


def run(ids: list, weights: list, grad: torch.Tensor, dropout: float, monkeypatch) -> list[torch.Tensor]:
    """The result and the five gradients."""
    monkeypatch.setattr(native, "dropout_seed", lambda device: torch.tensor([SEED]))
    given = [t.clone().requires_grad_() for t in weights]
    y = bert_embeddings(*ids, *given, 1e-12, PADDING_ID, dropout)
    y.backward(grad)
    return [y.detach(), *(t.grad for t in given)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    ("batch", "seq", "vocab", "hidden"), [(1, 1, 5, 8), (3, 7, 11, 72), (4, 130, 6, 8), (2, 33, 500, 1032)]
)
def test_result_and_gradients_are_those_of_float64(batch, seq, vocab, hidden, dropout, dtype, kernels, monkeypatch):
    ids, weights, grad = inputs(batch, seq, vocab, hidden, dtype)
    found = run(ids, weights, grad, dropout, monkeypatch)
    doubles = [t.double().requires_grad_() for t in weights]
    y = exact(ids, doubles, dropout)
    y.backward(grad.double())
    for tensor, reference in zip(found, [y.detach(), *(t.grad for t in doubles)], strict=True):
        close(tensor.flatten()[None], reference.flatten()[None], 8)


def test_the_row_of_padding_and_rows_without_a_token_have_no_gradient(kernels, monkeypatch):
    ids, weights, grad = inputs(2, 70, 9, 16, torch.float32)
    ids[0][ids[0] == 5] = 6
    _, of_word, *_ = run(ids, weights, grad, 0.0, monkeypatch)
    assert not of_word[PADDING_ID].any() and not of_word[5].any() and of_word[6].all()


def test_the_same_bits_in_whatever_order_threads_run(kernels, monkeypatch):
    results = []
    for order in (0, 1):
        kernels.emulation_order(order)
        results.append(run(*inputs(3, 130, 4, 40, torch.bfloat16), 0.1, monkeypatch))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("bad", [-1, 9])
def test_an_id_outside_of_its_table_gives_a_row_of_nan(bad, kernels):
    ids, weights, _ = inputs(1, 6, 9, 16, torch.float32)
    ids[0][0, 2] = bad
    y = bert_embeddings(*ids, *weights, 1e-12, PADDING_ID)
    assert y[0, 2].isnan().all() and y[0, [0, 1, 3, 4, 5]].isfinite().all()


def test_no_tokens_give_no_rows_and_zero_gradients(kernels, monkeypatch):
    y, *gradients = run(*inputs(0, 6, 9, 16, torch.bfloat16), 0.0, monkeypatch)
    assert y.shape == (0, 6, 16) and not any(gradient.any() for gradient in gradients)


def test_without_kernels_they_are_bit_for_bit_the_operators_of_torch():
    ids, weights, _ = inputs(2, 7, 11, 24, torch.float32)
    assert torch.equal(bert_embeddings(*ids, *weights, 1e-12, PADDING_ID), exact_in_float32(ids, weights))


def exact_in_float32(ids: list, weights: list) -> torch.Tensor:
    word, position, token_type, weight, bias = weights
    summed = F.embedding(ids[0], word) + F.embedding(ids[1], position) + F.embedding(ids[2], token_type)
    return F.layer_norm(summed, weight.shape, weight, bias, 1e-12)


def test_opcheck_accepts_the_operation(kernels):
    ids, weights, _ = inputs(2, 5, 11, 24, torch.float32)
    given = [t.requires_grad_() for t in weights]
    expanded = [t.expand(2, 5).contiguous() for t in ids]
    torch.library.opcheck(
        torch.ops.millstream.embeddings, (*expanded, *given, torch.tensor([SEED]), 1e-12, PADDING_ID, 0.1)
    )
