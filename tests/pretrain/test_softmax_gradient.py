"""The softmax's gradient in place of logits: the kernel, run on the CPU, against float64."""

from __future__ import annotations

import pytest
import torch

from pretrain.kernels.linear_cross_entropy import IGNORE_INDEX, linear_token_losses
from pretrain.kernels.softmax_gradient import softmax_gradient_
from tests.pretrain.kernels_on_cpu import DTYPES, PRECISION
from tests.pretrain.test_linear_cross_entropy import reference, tensors


def exact(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float, z_loss: float):
    """(sums, gradient) in float64."""
    logits = logits.double().requires_grad_()
    log_p = torch.log_softmax(logits, 1)
    log_z = logits.logsumexp(1)
    plain, uniform = -log_p.gather(1, targets[:, None]).sum(), -log_p.mean(1).sum()
    loss = (1 - label_smoothing) * plain + label_smoothing * uniform + z_loss * log_z.square().sum()
    loss.backward()
    sums = [plain, uniform if label_smoothing else 0 * plain, log_z.square().sum() if z_loss else 0 * plain]
    return torch.stack(sums).detach(), logits.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 1), (4, 7), (5, 1023), (3, 4097), (2, 50257), (2, 512)])
@pytest.mark.parametrize(("label_smoothing", "z_loss"), [(0.0, 0.0), (0.1, 1e-2)])
def test_sums_and_gradient_are_those_of_float64(shape, dtype, label_smoothing, z_loss, kernels):
    generator = torch.Generator().manual_seed(sum(shape))
    logits = (3 * torch.randn(shape, generator=generator)).to(dtype)
    targets = torch.randint(shape[1], shape[:1], generator=generator)
    sums, gradient = exact(logits, targets, label_smoothing, z_loss)
    framed = torch.full((logits.numel() + 64,), 7.0, dtype=dtype)  # what lies around the logits must stay
    place = framed[32:-32].view(shape).copy_(logits)
    found = softmax_gradient_(place, targets, label_smoothing, z_loss)
    torch.testing.assert_close(found.double(), sums, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(place.double(), gradient, rtol=2 * PRECISION[dtype], atol=2e-7)
    assert (framed[:32] == 7).all() and (framed[-32:] == 7).all()


def test_large_logits_do_not_overflow(kernels):
    logits = torch.tensor([[1e4, 1e4, -1e4], [-6e4, -6e4, -6e4]])
    found = softmax_gradient_(logits, torch.tensor([2, 0]), 0.0, 0.0)
    assert found[0].item() == pytest.approx(2e4 + 0.6931 + 1.0986, abs=1e-2)
    torch.testing.assert_close(logits, torch.tensor([[0.5, 0.5, -1.0], [-2 / 3, 1 / 3, 1 / 3]]))


def test_no_rows_give_zero_sums(kernels):
    found = softmax_gradient_(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), 0.1, 0.1)
    assert found.shape == (3,) and not found.any()


def test_the_same_bits_in_whatever_order_threads_run(kernels):
    results = []
    for order in (0, 1):
        kernels.emulation_order(order)
        logits = torch.randn((3, 5003), generator=torch.Generator().manual_seed(1)).bfloat16()
        results.append((softmax_gradient_(logits, torch.tensor([0, 5002, 17]), 0.1, 0.1), logits))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_output_layer_and_its_loss_use_it(dtype, kernels):
    inputs, labels = tensors(21, 16, 1023, dtype, True)
    assert (labels == IGNORE_INDEX).any()
    expected, gradients = reference(inputs, labels, 0.1, 1e-3)
    found = linear_token_losses(inputs[0], inputs[1], inputs[2], labels, 0.1, 1e-3)
    found.minimised.backward()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for sum_, exact_sum in zip(found, expected, strict=True):
        torch.testing.assert_close(sum_.double(), exact_sum, rtol=tolerance, atol=tolerance)
    for tensor, gradient in zip(inputs, gradients, strict=True):
        scale = gradient.abs().max()
        torch.testing.assert_close(tensor.grad.double() / scale, gradient / scale, rtol=0, atol=tolerance)


def test_opcheck_accepts_the_operation(kernels):
    torch.library.opcheck(
        torch.ops.millstream.softmax_gradient_, (torch.randn(3, 11), torch.tensor([1, 0, 10]), 0.1, 0.1)
    )
