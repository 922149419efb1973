"""How a step's time grows with the cluster, for ways to split a model that differ in what they send where. Pure.

    zero1   ZeRO stage 1: gradients summed once a step, nothing per micro batch (Rajbhandari et al. 2020)
    zero3   weights gathered twice, gradients scattered, over all GPUs, for each micro batch
    hpz     ZeRO++ (Wang et al. 2023): a second copy of the weights in each node serves the gather of backward
    qwz     ZeRO++: weights travel as 8-bit integers
    qgz     ZeRO++: gradients travel as 4-bit integers, summed in a node, then between nodes
    zero++  the three together
    mics    MiCS (Zhang et al. 2022): the model is split over as few nodes as hold it; the groups' gradients are
            summed once a step

With `ulysses` > 1 (DeepSpeed-Ulysses, Jacobs et al. 2023) so many GPUs share each sample: each has a stretch of it, but
for attention, for which all-to-alls hand out heads instead. DeepSpeed has all of these; of them the schema has the ZeRO
stages, and ZeRO++ can be set in the raw `deepspeed:` section. They are estimates of the model, not runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from launcher.plan_job import Cluster, Job, count_parameters
from launcher.plan_memory import memory
from launcher.plan_time import (
    LINK_SHARE,
    OVERLAP,
    exchange_latency,
    gather_seconds,
    micro_batch_seconds,
    update_seconds,
)

STRATEGIES = ("zero1", "zero3", "hpz", "qwz", "qgz", "zero++", "mics")
QUANTISED_WEIGHTS = ("qwz", "zero++")
QUANTISED_GRADIENTS = ("qgz", "zero++")
SECOND_COPY = ("hpz", "zero++")
INT8, INT4 = 1.0, 0.5  # bytes of an element, without the scales of its block
MEMORY_SHARE = 0.95


@dataclass(frozen=True)
class Scaled:
    """One way on one cluster."""

    seconds: float  # of a step
    tokens_per_second: float  # of a GPU
    fits: bool


def scaled(job: Job, cluster: Cluster, strategy: str, ulysses: int = 1) -> Scaled:
    """`job`, whose micro batch is that of `ulysses` GPUs together, by `strategy`; its stage does not matter."""
    job = replace(job, stage=1 if strategy == "zero1" else 3)
    part = replace(job, seq_len=job.seq_len // ulysses)  # what one GPU has of a sample, but for attention
    group = group_size(part, cluster) if strategy == "mics" else cluster.num_gpus
    # Floating-point operations of a token: of attention to what the others have.
    attention: float = 12 * job.shape.num_layers * job.shape.hidden_size * (job.seq_len - part.seq_len)
    attention *= 4 / 3 if job.checkpointing else 1
    rate = cluster.gpu.matmul_flops * cluster.gpu.matmul_share
    micro = micro_batch_seconds(part, cluster) + part.micro_batch_size * part.seq_len * attention / rate
    micro += all_to_all_seconds(part, cluster, ulysses)
    within, at_end = _communication(part, cluster, strategy, group)
    exposed = max(within - OVERLAP * micro, within / job.shape.num_layers)
    accumulation = max(1, job.global_batch_size * ulysses // (job.micro_batch_size * cluster.num_gpus))
    seconds = accumulation * (micro + exposed) + at_end + update_seconds(replace(part, num_gpus=group), cluster)
    needed = memory(replace(part, num_gpus=group)).total
    if strategy in SECOND_COPY:
        needed += job.element_bytes * count_parameters(job) / cluster.gpus_per_node
    tokens = accumulation * part.micro_batch_size * part.seq_len
    return Scaled(seconds, tokens / seconds, needed <= MEMORY_SHARE * cluster.gpu.memory)


def group_size(job: Job, cluster: Cluster) -> int:
    """MiCS: GPUs of the fewest whole nodes over which the model fits; all, where it fits on none fewer."""
    nodes = 1
    while nodes < cluster.num_nodes:
        size = nodes * cluster.gpus_per_node
        if memory(replace(job, num_gpus=size)).total <= MEMORY_SHARE * cluster.gpu.memory:
            return size
        nodes *= 2
    return cluster.num_gpus


def all_to_all_seconds(job: Job, cluster: Cluster, ulysses: int) -> float:
    """Of one micro batch: of queries, keys, values and the result, forward and backward, in every layer."""
    if ulysses == 1:
        return 0.0
    inside = min(ulysses, cluster.gpus_per_node)
    num_bytes = job.micro_batch_size * job.seq_len * job.shape.hidden_size * job.element_bytes  # of one of the eight
    link = (inside - 1) / ulysses * num_bytes / (cluster.gpu.link_bandwidth * LINK_SHARE)
    network = cluster.network.bandwidth / cluster.gpus_per_node * LINK_SHARE  # of one GPU
    between = (ulysses - inside) / ulysses * num_bytes / network
    return 8 * job.shape.num_layers * (max(link, between) + exchange_latency(inside, ulysses // inside, cluster))


def _communication(job: Job, cluster: Cluster, strategy: str, group: int) -> tuple[float, float]:
    """Seconds of a micro batch, and of the end of a step."""
    p, e, layers = count_parameters(job), job.element_bytes, job.shape.num_layers
    inside, nodes = cluster.gpus_per_node, cluster.num_nodes
    if strategy == "zero1":
        return 0.0, 2 * gather_seconds(4 * p, inside, nodes, cluster) + gather_seconds(e * p, inside, nodes, cluster)
    buckets = math.ceil(p / job.bucket_elements)
    if strategy == "mics":
        groups = group // inside
        within = 2 * gather_seconds(e * p, inside, groups, cluster, layers)
        within += gather_seconds(4 * p, inside, groups, cluster, buckets)
        # Each node's GPUs sum their own parts with those of the other groups, all over the same network.
        parts = 4 * p / groups
        return within, 2 * gather_seconds(parts, 1, nodes // groups, cluster, buckets)
    weight = INT8 if strategy in QUANTISED_WEIGHTS else float(e)
    forward = gather_seconds(weight * p, inside, nodes, cluster, layers)
    backward = gather_seconds(weight * p, inside, 1 if strategy in SECOND_COPY else nodes, cluster, layers)
    if strategy in QUANTISED_GRADIENTS:  # two all-to-alls: within nodes, then of what is left between them
        gradients = gather_seconds(INT4 * p, inside, 1, cluster, buckets)
        gradients += gather_seconds(INT4 * p, 1, nodes, cluster, buckets)
    else:
        gradients = gather_seconds(4 * p, inside, nodes, cluster, buckets)
    return forward + backward + gradients, 0.0
