"""Model FLOPs utilisation of a run that is watched: its tokens a second against what its GPUs could do at their peak.

The definition is PaLM's (Chowdhery et al. 2022, appendix B), as in `millstream plan`. GPUs that are not in
configs/hardware.py, and CPUs, whose peak nobody states, have none.
"""

from __future__ import annotations

from pathlib import Path

from configs.errors import ConfigError
from configs.hardware import GPUS, Gpu

# What torch calls them. Of the H100 only the SXM board: PCIe and NVL have other peaks.
NAMES = {
    "A100": "a100-80g",
    "H100 80GB HBM3": "h100-80g",
    "H200": "h200",
    "B200": "b200",
    "MI300X": "mi300x",
    "L40S": "l40s",
    "RTX 4090": "rtx4090",
}


def gpu_of(device: str) -> Gpu | None:
    """The entry of the hardware table for the name that torch gives, for example "NVIDIA H100 80GB HBM3"."""
    return next((GPUS[key] for name, key in NAMES.items() if name in device and "NVL" not in device), None)


def share_per_token(run_dir: Path, device: str, num_ranks: int) -> float | None:
    """What one token a second is as a share of the peak of `num_ranks` GPUs; none if it cannot be known."""
    from configs.load import load_pretrain
    from launcher.plan_command import vocabulary
    from launcher.plan_job import make_job
    from launcher.plan_time import model_flops_per_token

    gpu = gpu_of(device)
    if gpu is None or num_ranks < 1:
        return None
    try:
        config = load_pretrain(run_dir / "config.yaml")
        job = make_job(config, vocabulary(config)[0], num_ranks)
    except (ConfigError, OSError, ValueError, KeyError):  # fine-tuning, or a configuration of another version
        return None
    return model_flops_per_token(job) / (num_ranks * gpu.matmul_flops)
