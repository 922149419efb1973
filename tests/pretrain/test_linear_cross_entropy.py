"""The fused output layer and its losses against torch's, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pretrain.kernels import linear_cross_entropy as kernel
from pretrain.kernels.linear_cross_entropy import IGNORE_INDEX, linear_cross_entropy, linear_token_losses


def tensors(num: int, hidden: int, vocab: int, dtype: torch.dtype, bias: bool):
    g = torch.Generator().manual_seed(num + vocab)
    inputs = [torch.randn(num, hidden, generator=g), torch.randn(vocab, hidden, generator=g) * 0.3]
    if bias:
        inputs.append(torch.randn(vocab, generator=g))
    labels = torch.randint(vocab, (num,), generator=g)
    labels[::3] = IGNORE_INDEX
    return [t.to(dtype).requires_grad_() for t in inputs], labels


def reference(inputs: list[torch.Tensor], labels: torch.Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0):
    """The four sums of `TokenLosses` and the first one's gradients."""
    exact = [t.detach().double().requires_grad_() for t in inputs]
    logits = F.linear(*exact)
    plain = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    smoothed = F.cross_entropy(
        logits, labels, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=label_smoothing
    )
    squared_log_z = (logits[labels != IGNORE_INDEX].logsumexp(1) ** 2).sum()
    minimised = smoothed + z_loss * squared_log_z
    minimised.backward()
    return (minimised, plain, smoothed, squared_log_z), [t.grad for t in exact]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("num", "hidden", "vocab"), [(1, 8, 2), (7, 5, 101), (300, 16, 1023), (65, 24, 4097)])
def test_loss_and_gradients_are_those_of_torch(dtype, bias, num, hidden, vocab, monkeypatch):
    monkeypatch.setattr(kernel, "CHUNK_ELEMENTS", 1 << 16)  # several chunks of several blocks
    monkeypatch.setattr(kernel, "CACHED_ELEMENTS", 1 << 14)
    inputs, labels = tensors(num, hidden, vocab, dtype, bias)
    (expected, *_), gradients = reference(inputs, labels)
    loss = linear_cross_entropy(inputs[0], inputs[1], inputs[2] if bias else None, labels)
    (loss * 3).backward()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    for tensor, gradient in zip(inputs, gradients, strict=True):
        scale = gradient.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(tensor.grad.double() / scale, 3 * gradient / scale, rtol=0, atol=3 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("label_smoothing", "z_loss"), [(0.1, 0.0), (0.0, 0.05), (0.9, 0.0), (0.2, 0.01)])
@pytest.mark.parametrize(("num", "hidden", "vocab"), [(7, 5, 101), (65, 24, 4097)])
def test_label_smoothing_and_z_loss_are_those_of_torch(
    dtype, bias, label_smoothing, z_loss, num, hidden, vocab, monkeypatch
):
    monkeypatch.setattr(kernel, "CHUNK_ELEMENTS", 1 << 16)
    monkeypatch.setattr(kernel, "CACHED_ELEMENTS", 1 << 14)
    inputs, labels = tensors(num, hidden, vocab, dtype, bias)
    expected, gradients = reference(inputs, labels, label_smoothing, z_loss)
    found = linear_token_losses(
        inputs[0], inputs[1], inputs[2] if bias else None, labels, label_smoothing, z_loss=z_loss
    )
    (found.minimised * 3).backward()
    assert [sum_.requires_grad for sum_ in found] == [True, False, False, False]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for name, sum_, exact in zip(found._fields, found, expected, strict=True):
        if name != "squared_log_z" or z_loss:
            torch.testing.assert_close(
                sum_.double(), exact, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m
            )
    for tensor, gradient in zip(inputs, gradients, strict=True):
        scale = gradient.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(tensor.grad.double() / scale, 3 * gradient / scale, rtol=0, atol=3 * tolerance)


def test_with_both_terms_off_all_sums_are_bit_for_bit_the_cross_entropy():
    inputs, labels = tensors(50, 8, 101, torch.float32, False)
    found = linear_token_losses(inputs[0], inputs[1], None, labels)
    assert found.minimised == found.cross_entropy == found.smoothed and found.squared_log_z == 0


def test_z_loss_of_large_logits_is_finite_and_right():
    hidden = torch.tensor([[300.0, -1e4, 0.0], [-1e4, 20.0, 0.0]], requires_grad=True)
    found = linear_token_losses(hidden, torch.eye(3), None, torch.tensor([1, 0]), z_loss=1e-4)  # the unlikely targets
    found.minimised.backward()
    assert found.squared_log_z.item() == pytest.approx(300**2 + 20**2, rel=1e-4)
    assert torch.isfinite(hidden.grad).all()


def test_large_logits_do_not_overflow():
    hidden, weight = torch.full((2, 4), 1e4, requires_grad=True), torch.eye(4)[:3].clone().requires_grad_()
    loss = linear_cross_entropy(hidden, weight, None, torch.tensor([0, 2]))
    loss.backward()
    assert loss.item() == pytest.approx(2 * torch.log(torch.tensor(3.0)).item())
    assert torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()


def test_no_targets_give_zero_loss_and_zero_gradients():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, None, torch.full((3,), IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any() and not weight.grad.any()


def test_without_gradients_the_loss_is_the_same():
    inputs, labels = tensors(50, 8, 101, torch.float32, False)
    with torch.no_grad():
        alone = linear_cross_entropy(*inputs, None, labels)
    assert torch.equal(alone, linear_cross_entropy(*inputs, None, labels).detach())


@pytest.mark.parametrize("label", [5, -1])
def test_label_outside_of_the_vocabulary_is_refused(label):
    with pytest.raises(ValueError, match="the vocabulary has 5 entries"):
        linear_cross_entropy(torch.randn(1, 4), torch.randn(5, 4), None, torch.tensor([label]))


def test_under_autocast_loss_and_gradients_are_those_of_torch_within_its_rounding():
    inputs, labels = tensors(50, 8, 101, torch.float32, False)
    (expected, *_), gradients = reference(inputs, labels)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(inputs[0], inputs[1], None, labels)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    for tensor, gradient in zip(inputs, gradients, strict=True):
        torch.testing.assert_close(tensor.grad.double(), gradient, rtol=0, atol=2e-2 * gradient.abs().max().item())
