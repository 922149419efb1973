"""What is minimised: the mean over the global batch's targets, whatever the number of micro batches and ranks.

A mean of means is not that (micro batches have different numbers of targets; transformers PR#34191). So models return
sums, the loop adds up the counts of all ranks before the first forward, and each sum is divided by the global count.

A model's sums are named after its objectives, "clm", or "mlm" and "nsp": always the plain cross entropies, so that they
mean the same whatever a run minimises. Where label smoothing or z-loss is on, there are beside "clm" or "mlm":

    clm_minimised   what has the gradient: cross entropy against the smoothed target + z_loss x log^2 Z
    clm_smoothed    the first part of it, with label smoothing
    clm_z           log^2 Z, without its coefficient, with z-loss
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from pretrain.kernels.linear_cross_entropy import IGNORE_INDEX, linear_token_losses

REPORTED = {"smoothed": "loss_smoothed", "z": "z_loss"}  # a sum's ending -> its name in metrics.jsonl, as a mean


def token_losses(
    name: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    label_smoothing: float,
    z_loss: float,
) -> dict[str, torch.Tensor]:
    """The sums of the objective `name` ("clm", "mlm") over the tokens; see `linear_token_losses` for the arguments."""
    losses = linear_token_losses(hidden, weight, bias, labels, label_smoothing, z_loss)
    if not label_smoothing and not z_loss:
        return {name: losses.minimised}
    sums = {name: losses.cross_entropy, f"{name}_minimised": losses.minimised}
    if label_smoothing:
        sums[f"{name}_smoothed"] = losses.smoothed
    if z_loss:
        sums[f"{name}_z"] = losses.squared_log_z
    return sums


def count_targets(batches: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, int]:
    """Targets of each objective in this rank's micro batches, under the names the models give their sums."""
    name = "mlm" if any("token_type_ids" in batch for batch in batches) else "clm"
    counts = {name: sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)}
    if any("next_sentence_label" in batch for batch in batches):
        counts["nsp"] = sum(int((batch["next_sentence_label"] != IGNORE_INDEX).sum()) for batch in batches)
    return counts


def global_mean(sums: Mapping[str, torch.Tensor], counts: Mapping[str, float]) -> torch.Tensor:
    """The sum over objectives of what is minimised / its count: this micro batch's share of the global loss.

    An objective without targets gives 0.
    """
    shares = [sums.get(f"{name}_minimised", sums[name]) / max(count, 1) for name, count in counts.items()]
    return torch.stack(shares).sum()


def mean_losses(totals: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, float]:
    """Means over the targets of all ranks, named as in metrics.jsonl.

    `loss` is the sum of the objectives' plain cross entropies, with several objectives each one is `loss_NAME`;
    `loss_smoothed` and `z_loss` (the mean of log^2 Z) are of the tokens, where they are minimised.
    """
    means = {name: totals[name] / max(count, 1) for name, count in counts.items()}
    parts = {f"loss_{name}": mean for name, mean in means.items()} if len(means) > 1 else {}
    terms = {
        reported: totals[f"{name}_{ending}"] / max(count, 1)
        for name, count in counts.items()
        for ending, reported in REPORTED.items()
        if f"{name}_{ending}" in totals
    }
    return {"loss": sum(means.values()), **parts, **terms}
