"""What of train.optimizer may change between a checkpoint and the run that goes on from it.

Rate, decay, betas, momentum and clipping are settings of the next update: they may. The type may not: AdamW and LAMB,
for example, both keep `exp_avg` and `exp_avg_sq`, and a run would go on without a word with moments that were another
optimizer's. The average of the weights may be switched on or off: it has no influence on the run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from configs.schema import OptimizerConfig
from pretrain import checkpoint
from pretrain.checkpoint import Checkpoint
from pretrain.optimizers.average import KEY


def optimizer_facts(config: OptimizerConfig) -> dict[str, Any]:
    """All that the meaning of the optimizer's saved state depends on; values as in JSON."""
    return {"optimizer.type": config.type}


def state_reader(
    found: Checkpoint, config: OptimizerConfig, say: Callable[[str], None]
) -> Callable[[str, str, int, int], torch.Tensor]:
    """As `checkpoint.reader`, also where the average was switched on or off since; it then tells so through `say`.

    An average that the checkpoint does not have begins as its weights. One that is not kept any more is left behind.
    """
    read = checkpoint.reader(found)
    has_average = KEY in checkpoint.state_keys(found)
    if config.ema_decay is None and has_average:
        say(f"train.optimizer.ema_decay is not set: the average of the weights in {found.path} is not kept any longer")
    if config.ema_decay is None or has_average:
        return read
    say(f"{found.path} has no average of the weights (train.optimizer.ema_decay): it begins as the weights of now")

    def read_or_begin(parameter: str, key: str, start: int, length: int) -> torch.Tensor:
        return read(parameter, "master" if key == KEY else key, start, length)

    return read_or_begin
