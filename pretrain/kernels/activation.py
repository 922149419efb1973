"""The activation between the two layers of an MLP, with the first one's bias: GELU, SwiGLU and GeGLU.

    GELU (Hendrycks and Gimpel 2016)   gelu(x + b), by erf or by tanh
    SwiGLU, GeGLU (Shazeer 2020)       silu(g + b_g) * (u + b_u), gelu(g + b_g) * (u + b_u)

Forward reads and writes everything once, as a matrix product that adds the bias and torch's GELU do. What is gained
lies in backward: the bias's gradient is summed up on the way, where torch reads the whole gradient once more, and a
gated activation needs no intermediate of its own. Gate and up lie side by side, as one matrix product makes them, and
so do their gradients. The sum goes in two stages, without atomics: the same bits every time.

CUDA C++ (csrc/activation.cu), not Triton: the sum over rows is kept in the registers of threads that stay with their
columns. It was never run on a GPU so far (docs/kernels.md).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from pretrain.kernels import native

Kind = Literal["gelu_tanh", "gelu", "silu"]
KINDS: tuple[Kind, ...] = ("gelu_tanh", "gelu", "silu")  # in the order of csrc/activation.cu
FORWARD_TILES, BACKWARD_TILES = (
    16,
    8,
)  # of 128 threads, for each of the GPU's multiprocessors; backward has partial sums
MOST_ROW_BLOCKS = 65535  # of a CUDA grid's second axis


def linear_activation(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, kind: Kind) -> torch.Tensor:
    """act(x weight^T + bias): x (..., in_features), weight (columns, in_features) -> (..., columns)."""
    if not native.runs_on(x, weight, bias):
        return activated(F.linear(x, weight, bias), kind)
    return _bias_activation(F.linear(x, weight), bias, KINDS.index(kind), False)


def linear_gated_activation(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, kind: Kind
) -> torch.Tensor:
    """act(gate) * up with [gate, up] = x weight^T + bias: weight (2 columns, in_features) -> (..., columns)."""
    if not native.runs_on(x, weight, bias):
        gate, up = F.linear(x, weight, bias).chunk(2, -1)
        return activated(gate, kind) * up
    return _bias_activation(F.linear(x, weight), bias, KINDS.index(kind), True)


def activated(x: torch.Tensor, kind: Kind) -> torch.Tensor:
    """The activation by torch's operators."""
    if kind == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


@torch.library.custom_op("millstream::bias_activation", mutates_args=())
def _bias_activation(x: torch.Tensor, bias: torch.Tensor | None, kind: int, is_gated: bool) -> torch.Tensor:
    assert bias is None or bias.dtype == x.dtype
    x, out = x.contiguous(), _output(x, is_gated)
    native.launch(
        "bias_activation_forward", x, x, bias, out, *_sizes(out), _row_blocks(out, FORWARD_TILES), kind, int(is_gated)
    )  # fmt: skip
    return out


@_bias_activation.register_fake
def _fake_bias_activation(x, bias, kind, is_gated):
    return _output(x, is_gated)


def _output(x: torch.Tensor, is_gated: bool) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // (2 if is_gated else 1)))


def _sizes(out: torch.Tensor) -> tuple[int, int]:
    """Rows and columns."""
    columns = out.shape[-1]
    return out.numel() // max(1, columns), columns


def _row_blocks(out: torch.Tensor, tiles: int) -> int:
    """How many blocks share the rows: so many that the GPU is full, so few that their partial sums are small."""
    rows, columns = _sizes(out)
    tile = 128 * 16 // out.element_size()
    most = native.num_processors(out.device) * tiles
    return max(1, min(rows, most // max(1, -(-columns // tile)), MOST_ROW_BLOCKS))


@torch.library.custom_op("millstream::bias_activation_backward", mutates_args=())
def _bias_activation_backward(
    grad_out: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, kind: int, is_gated: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x, and of the bias (empty without one)."""
    grad_out, x = grad_out.contiguous(), x.contiguous()
    grad_x, grad_bias = _gradients(x, bias)
    rows, columns = _sizes(grad_out)
    row_blocks = _row_blocks(grad_out, BACKWARD_TILES)
    partial = None if bias is None else bias.new_empty((row_blocks, bias.shape[0]), dtype=torch.float32)
    native.launch(
        "bias_activation_backward", x, grad_out, x, bias, grad_x, None if bias is None else grad_bias, partial, rows,
        columns, row_blocks, kind, int(is_gated),
    )  # fmt: skip
    return grad_x, grad_bias


@_bias_activation_backward.register_fake
def _fake_bias_activation_backward(grad_out, x, bias, kind, is_gated):
    return _gradients(x, bias)


def _gradients(x: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.empty_like(x, memory_format=torch.contiguous_format)
    return rows, x.new_empty(0) if bias is None else torch.empty_like(bias)


def _keep(ctx, inputs, output) -> None:
    x, bias, ctx.kind, ctx.is_gated = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx, grad_out):
    x, bias = ctx.saved_tensors
    grad_x, grad_bias = torch.ops.millstream.bias_activation_backward(grad_out, x, bias, ctx.kind, ctx.is_gated)
    return grad_x, None if bias is None else grad_bias, None, None


_bias_activation.register_autograd(_backward, setup_context=_keep)
