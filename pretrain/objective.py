"""What is minimised: the mean over the global batch's targets, whatever the number of micro batches and ranks.

A mean of means is not that (micro batches have different numbers of targets; transformers PR#34191). So models return
sums, the loop adds up the counts of all ranks before the first forward, and each sum is divided by the global count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

IGNORE_INDEX = -100


def count_targets(batches: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, int]:
    """Targets of each objective in this rank's micro batches, under the names the models give their sums."""
    name = "mlm" if any("token_type_ids" in batch for batch in batches) else "clm"
    arrays = {name: "labels"}
    if any("next_sentence_label" in batch for batch in batches):
        arrays["nsp"] = "next_sentence_label"
    return {  # summed where the batches are, and waited for once
        name: int(sum((batch[array] != IGNORE_INDEX).sum() for batch in batches)) for name, array in arrays.items()
    }


def global_mean(sums: Mapping[str, torch.Tensor], counts: Mapping[str, float]) -> torch.Tensor:
    """sum_k sums[k] / counts[k]: this micro batch's share of the global loss; an objective without targets gives 0."""
    shares = [sums[name] / max(counts[name], 1) for name in sums]
    return torch.stack(shares).sum()
