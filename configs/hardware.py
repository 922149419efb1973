"""What accelerators and networks can do: literal tables, for `millstream plan`. Numbers only.

Peaks are the makers' data sheets (dense, without sparsity): NVIDIA A100 (2021), H100 (2023), H200 (2024), Blackwell
architecture (B200, HGX), L40S and GeForce RTX 4090 (Ada architecture, bf16 with fp32 sums), AMD Instinct MI300X
(2023). Memory is what a process can allocate, as torch reports it, a little below the name. Prices are rough on-demand
ones of 2025 and differ by a factor of two between sellers: give your own with price=.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from configs.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    memory: float  # bytes a process can allocate
    matmul_flops: float  # peak of bf16 matrix products with fp32 sums, floating-point operations a second
    memory_bandwidth: float  # bytes a second
    link_bandwidth: float  # to the other GPUs of a node, bytes a second in each direction
    watts: float  # board power limit
    per_node: int  # GPUs of a usual node
    network: str  # between usual nodes, a key of NETWORKS
    price: float  # US dollars an hour
    matmul_share: float = 0.7  # of the peak that large matrix products reach
    fp32_share: float = 0.5  # of the bf16 rate in fp32 (TF32 where the GPU has it)
    is_cpu: bool = False


@dataclass(frozen=True)
class Network:
    bandwidth: float  # of a whole node, bytes a second in each direction
    latency: float  # of one message, seconds


GPUS = {
    "a100-40g": Gpu(39.4 * GIB, 312e12, 1.555e12, 300e9, 400, 8, "ib-8x200", 1.3, 0.8),
    "a100-80g": Gpu(79.1 * GIB, 312e12, 2.039e12, 300e9, 400, 8, "ib-8x200", 1.8, 0.8),
    "h100-80g": Gpu(79.1 * GIB, 989e12, 3.35e12, 450e9, 700, 8, "ib-8x400", 2.9),
    "h200": Gpu(139.8 * GIB, 989e12, 4.8e12, 450e9, 700, 8, "ib-8x400", 3.5),
    "b200": Gpu(178.3 * GIB, 2250e12, 7.7e12, 900e9, 1000, 8, "ib-8x400", 5.5),
    "mi300x": Gpu(191.7 * GIB, 1307e12, 5.3e12, 448e9, 750, 8, "ib-8x400", 3.0, 0.55),
    "l40s": Gpu(44.4 * GIB, 362e12, 0.864e12, 28e9, 350, 8, "eth-100", 1.0, 0.65),
    "rtx4090": Gpu(23.5 * GIB, 165e12, 1.008e12, 25e9, 450, 4, "eth-25", 0.5, 0.85),
    # One rank on one core of a 2025 server: what docs/benchmarks.md measured, 0.40 TFLOP/s on two cores. Others differ
    # by several times, so a plan for CPUs wants --probe.
    "cpu": Gpu(8 * GIB, 0.2e12, 10e9, 2e9, 10, 2, "eth-10", 0.05, 0.8, 0.5, True),
}
CPU = "cpu"

# Names: the number of ports of a node x Gbit/s of each. A microsecond or two through InfiniBand, tens through TCP.
NETWORKS = {
    "ib-8x400": Network(8 * 50e9, 5e-6),
    "ib-8x200": Network(8 * 25e9, 5e-6),
    "ib-4x200": Network(4 * 25e9, 5e-6),
    "ib-400": Network(50e9, 5e-6),
    "ib-200": Network(25e9, 5e-6),
    "eth-100": Network(12.5e9, 30e-6),
    "eth-25": Network(3.1e9, 40e-6),
    "eth-10": Network(1.25e9, 50e-6),
}
LINK_LATENCY = 3e-6  # of one step of a collective within a node, seconds (NCCL over NVLink)


def gpu(name: str) -> Gpu:
    """The accelerator `name`; ConfigError with the nearest names for an unknown one."""
    _check_name(name, list(GPUS), "--gpu")
    return GPUS[name]


def network(name: str) -> Network:
    """The network `name`; ConfigError with the nearest names for an unknown one."""
    _check_name(name, list(NETWORKS), "--network")
    return NETWORKS[name]


def _check_name(name: str, known: list[str], flag: str) -> None:
    if name in known:
        return
    near = [key for key in known if name.lower() in key]
    near = near or difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    cure = f"did you mean {' or '.join(near)}? " if near else ""
    raise ConfigError(f"{flag} {name}: is not in the table; {cure}Known: {', '.join(known)}")
