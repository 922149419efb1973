"""What a short run on this machine says of a longer one (`--probe`). Pure: `pretrain/probe.py` does the measuring.

The probe trains the configuration at its width, sequence length, micro batch and ZeRO stage, but with few layers: at
two depths, each with one and with two micro batches a step. A step is

    seconds(layers, micro batches) = micro batches x (m0 + m1 x layers) + u0 + u1 x layers

whose four numbers follow from the four measurements: m of forward, backward and what is communicated in them, u of what
happens once a step. More layers repeat what was measured; so the plan of the whole model extrapolates in depth only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from launcher.plan_job import Cluster, Job
from launcher.plan_memory import memory, transient_bytes
from launcher.plan_time import StepTime, communication


@dataclass(frozen=True)
class Depth:
    """Measured with `num_layers` layers."""

    num_layers: int
    one_micro_batch: float  # seconds of a step
    two_micro_batches: float
    peak_bytes: float  # of the largest rank


@dataclass(frozen=True)
class Probe:
    num_ranks: int
    on_cpu: bool
    context_bytes: float  # of a rank that has trained a model of nearly no size
    shallow: Depth
    deep: Depth


def probed_fragmentation(job: Job, probe: Probe) -> float:
    """What the allocator kept at the probe's greater depth, at least 0, as a share of what comes and goes in `job`.

    In bytes it stays as it was: the holes that one layer leaves serve the next one too, and in none of eight probes was
    there more of it at four layers than at one (docs/benchmarks.md).
    """
    small = probe_job(job, probe, probe.deep.num_layers)
    without = memory(small, probe.on_cpu, probe.context_bytes, 0.0, saves_before_end=False)
    kept = probe.deep.peak_bytes - without.total
    return max(0.0, kept) / transient_bytes(job, probe.on_cpu)


def probe_job(job: Job, probe: Probe, num_layers: int) -> Job:
    """What the probe has run: the job with few layers on its own ranks, one micro batch a step."""
    return replace(
        job,
        shape=replace(job.shape, num_layers=num_layers),
        num_gpus=probe.num_ranks,
        global_batch_size=job.micro_batch_size * probe.num_ranks,
    )


def probed_step_time(job: Job, cluster: Cluster, probe: Probe) -> StepTime:
    """A step by the probe's rates. On other numbers of ranks communication is the model's, and the update is shared."""
    layers, low, high = job.shape.num_layers, probe.shallow, probe.deep
    micro = [depth.two_micro_batches - depth.one_micro_batch for depth in (low, high)]
    update = [depth.one_micro_batch - of_micro for depth, of_micro in zip((low, high), micro, strict=True)]
    distance = (layers - low.num_layers) / (high.num_layers - low.num_layers)
    of_micro = max(0.0, micro[0] + distance * (micro[1] - micro[0]))
    of_update = max(0.0, update[0] + distance * (update[1] - update[0]))
    if job.num_gpus == probe.num_ranks:
        return StepTime(job.accumulation * of_micro, 0.0, 0.0, of_update)
    within, at_end = communication(job, cluster)
    if job.stage:
        of_update *= probe.num_ranks / job.num_gpus
    comm = job.accumulation * within + at_end
    exposed = job.accumulation * max(0.0, within - 0.5 * of_micro) + at_end
    return StepTime(job.accumulation * of_micro, comm, exposed, of_update)
