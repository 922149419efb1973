"""Logits to the losses of their rows and, in place, to the gradient: the middle of `linear_cross_entropy` on a GPU.

    p - (1 - s) onehot(y) - s / V + 2 c log Z p        s: label smoothing, c: z-loss, as in linear_cross_entropy.py

The logits are read once and the gradient is written once; torch's operators for it go over them ten times, in fp32. The
matrix products before and after stay torch's.

CUDA C++ (csrc/softmax_gradient.cu), not Triton: a vocabulary of 50,257 is a multiple of nothing, so that rows begin off
the 16-byte grid; the kernel walks to it by itself, where a compiler has to give up wide accesses. It was never run on a
GPU so far (docs/kernels.md).
"""

from __future__ import annotations

import torch

from pretrain.kernels import native


def softmax_gradient_(
    logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float, z_loss: float
) -> torch.Tensor:
    """The sums over `logits` (rows, vocab) that `linear_cross_entropy` needs, (3,) fp32; logits become the gradient.

    targets (rows,) int64, in [0, vocab), which is not checked. On what `native.runs_on` says.
    """
    return _softmax_gradient_(logits, targets, label_smoothing, z_loss).sum(0)


@torch.library.custom_op("millstream::softmax_gradient_", mutates_args={"logits"})
def _softmax_gradient_(
    logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float, z_loss: float
) -> torch.Tensor:
    """(rows, 3) fp32: cross entropy, mean of -log p, log^2 Z; the second and the third are 0 where they are off."""
    assert logits.is_contiguous() and targets.dtype == torch.int64
    losses = logits.new_empty((logits.shape[0], 3), dtype=torch.float32)
    native.launch(
        "softmax_gradient_in_place", logits, logits, targets.contiguous(), losses, *logits.shape,
        float(label_smoothing), float(z_loss), 1,
    )  # fmt: skip
    return losses


@_softmax_gradient_.register_fake
def _losses(logits, targets, label_smoothing, z_loss):
    return logits.new_empty((logits.shape[0], 3), dtype=torch.float32)
