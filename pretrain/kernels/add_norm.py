"""Residual connection, dropout and normalisation in one operation: y = norm(s), s = residual + dropout(x).

    LayerNorm (Ba et al. 2016)              y = (s - mean) / sqrt(var + eps) * weight + bias
    RMSNorm (Zhang and Sennrich 2019)       y = s / sqrt(mean(s^2) + eps) * weight

All of it is limited by memory. One operation each reads x and residual, writes their sum, reads it, writes y: seven
passes over the rows with a dropout mask. Here forward reads x and residual once and writes s and y once, and backward
reads dy, ds and s and writes one gradient, two with dropout: the mask is made again from a seed (Philox) and never
stored. Mean and 1 / standard deviation are kept in fp32. The weights' gradients are summed up in two stages, without
atomics: the same bits every time on the same kind of GPU.

CUDA C++ (csrc/add_norm.cu, norm_rows.cuh), not Triton: rows of any width with 16-byte accesses and a warp of their own,
the sum over rows kept in registers, and no compiler at run time. It was never run on a GPU so far (docs/kernels.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pretrain.kernels import native

WIDEST = 8192  # columns; MAX_COLUMNS in csrc/norm_rows.cuh. Wider rows take the plain path.
Tensors = tuple[torch.Tensor, ...]


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """LayerNorm of x (..., columns); weight and bias (columns,)."""
    if not _suits(x, None, weight, bias):
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    return _add_norm(x, None, weight, bias, None, eps, 0.0, False)[0]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of x (..., columns); weight (columns,)."""
    if not _suits(x, None, weight, None):
        return F.rms_norm(x, weight.shape, weight, eps)
    return _add_norm(x, None, weight, None, None, eps, 0.0, True)[0]


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(LayerNorm(s), s) of s = residual + dropout(x), each (..., columns) as x and residual; `dropout` in [0, 1]."""
    if not _suits(x, residual, weight, bias):
        added = residual + F.dropout(x, dropout)
        return F.layer_norm(added, weight.shape, weight, bias, eps), added
    return _added(x, residual, weight, bias, eps, dropout, False)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, dropout: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(RMSNorm(s), s) of s = residual + dropout(x), each (..., columns) as x and residual; `dropout` in [0, 1]."""
    if not _suits(x, residual, weight, None):
        added = residual + F.dropout(x, dropout)
        return F.rms_norm(added, weight.shape, weight, eps), added
    return _added(x, residual, weight, None, eps, dropout, True)


def _suits(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    return native.runs_on(x, residual, weight, bias) and weight.shape[0] <= WIDEST


def _added(x, residual, weight, bias, eps: float, dropout: float, rms: bool) -> tuple[torch.Tensor, torch.Tensor]:
    seed = native.dropout_seed(x.device) if native.dropout_threshold(dropout) else None
    y, added, *_ = _add_norm(x, residual, weight, bias, seed, eps, dropout, rms)
    return y, added


@torch.library.custom_op("millstream::add_norm", mutates_args=())
def _add_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    eps: float,
    dropout: float,
    rms: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, s (empty where it is x itself), mean (empty for RMSNorm) and 1 / standard deviation of each row, fp32."""
    assert weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype)
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    y, added, mean, rstd = _outputs(x, residual, rms)
    columns = weight.shape[0]
    stored, means = None if residual is None else added, None if rms else mean
    threshold = native.dropout_threshold(dropout)
    native.launch(
        "add_norm_forward", x, x, residual, weight, bias, y, stored, means, rstd, rstd.numel(), columns, float(eps),
        seed, threshold,
    )  # fmt: skip
    return y, added, mean, rstd


@_add_norm.register_fake
def _outputs_of_add_norm(x, residual, weight, bias, seed, eps, dropout, rms):
    return _outputs(x, residual, rms)


def _outputs(x: torch.Tensor, residual: torch.Tensor | None, rms: bool) -> Tensors:
    rows = x.shape[:-1]
    like = torch.contiguous_format
    return (
        torch.empty_like(x, memory_format=like),
        x.new_empty(0) if residual is None else torch.empty_like(x, memory_format=like),
        x.new_empty(0 if rms else rows, dtype=torch.float32),
        x.new_empty(rows, dtype=torch.float32),
    )


@torch.library.custom_op("millstream::add_norm_backward", mutates_args=())
def _add_norm_backward(
    grad_y: torch.Tensor,
    grad_added: torch.Tensor | None,
    added: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    seed: torch.Tensor | None,
    dropout: float,
    rms: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of residual, x (empty where it is residual's), weight and bias (empty without one)."""
    grad_y, added = grad_y.contiguous(), added.contiguous()
    grad_added = None if grad_added is None else grad_added.contiguous()
    gradients = _gradients(added, weight, bias, seed)
    grad_residual, grad_x, grad_weight, grad_bias = gradients
    columns, rows = weight.shape[0], rstd.numel()
    blocks = max(1, min(native.num_processors(added.device), rows))
    partial = weight.new_empty((1 if bias is None else 2, blocks, columns), dtype=torch.float32)
    native.launch(
        "add_norm_backward", added, grad_y, grad_added, added, weight, None if rms else mean, rstd, grad_residual,
        None if seed is None else grad_x, grad_weight, None if bias is None else grad_bias, partial, blocks, rows,
        columns, seed, native.dropout_threshold(dropout),
    )  # fmt: skip
    return gradients


@_add_norm_backward.register_fake
def _outputs_of_add_norm_backward(grad_y, grad_added, added, weight, bias, mean, rstd, seed, dropout, rms):
    return _gradients(added, weight, bias, seed)


def _gradients(
    added: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, seed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = torch.empty_like(added, memory_format=torch.contiguous_format)
    return (
        rows,
        added.new_empty(0) if seed is None else torch.empty_like(rows),
        torch.empty_like(weight),
        weight.new_empty(0) if bias is None else torch.empty_like(bias),
    )


def _keep(ctx, inputs, output) -> None:
    x, residual, weight, bias, seed, _, ctx.dropout, ctx.rms = inputs
    _, added, mean, rstd = output
    ctx.has_residual = residual is not None
    ctx.save_for_backward(added if ctx.has_residual else x, weight, bias, mean, rstd, seed)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_y, grad_added, *_):
    added, weight, bias, mean, rstd, seed = ctx.saved_tensors
    if grad_y is None:  # only the sum was used
        grad_y = torch.zeros_like(added)
    if not ctx.has_residual:
        grad_added = None
    grad_residual, grad_x, grad_weight, grad_bias = torch.ops.millstream.add_norm_backward(
        grad_y, grad_added, added, weight, bias, mean, rstd, seed, ctx.dropout, ctx.rms
    )
    grad_x = grad_residual if seed is None else grad_x
    return (
        grad_x,
        grad_residual if ctx.has_residual else None,
        grad_weight,
        None if bias is None else grad_bias,
        None, None, None, None,
    )  # fmt: skip


_add_norm.register_autograd(_backward, setup_context=_keep)
