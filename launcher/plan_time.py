"""Seconds of a step: floating-point operations, bytes of memory traffic, communication. Pure: numbers in, numbers out.

Compute is the larger of what the matrix products, memory traffic and the host's launches take. A collective costs
latency x messages + bytes / bandwidth (Thakur et al. 2005), by the cheaper of a ring and a tree, where the bytes go
through a node's links and its network at the same time. What can go on beside compute does, as far as there is any.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from configs.hardware import LINK_LATENCY
from launcher.plan_job import Cluster, Job, attended_tokens, count_block_parameters, count_parameters
from launcher.plan_memory import LIVE_ELEMENTS

MEMORY_SHARE = 0.8  # of the data sheet's memory bandwidth that elementwise operators reach
LINK_SHARE = 0.75  # of a link's or network's bandwidth that a collective reaches (NCCL's busbw on 8 GPUs: 0.75 to 0.85)
# A layer's launches from Python, forward and backward, in seconds: some 40 kernels, and ZeRO's hooks (stage 3).
LAUNCH_SECONDS = {0: 0.5e-3, 1: 0.5e-3, 2: 0.6e-3, 3: 1.2e-3}
OVERLAP = 0.8  # of backward that communication can go on beside


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by part; `communication` is all of it, `exposed` what nothing hides."""

    compute: float
    communication: float
    exposed: float
    update: float

    @property
    def total(self) -> float:
        return self.compute + self.exposed + self.update


def model_flops_per_token(job: Job) -> float:
    """6 N + 12 L H Q T of PaLM (Chowdhery et al. 2022, appendix B): what the model needs, without recomputation.

    N are the parameters that a token is multiplied with: the word embedding counts as output layer, for BERT for its
    share of targets; positions, and a word embedding beside an output layer, are looked up and do not count. T of a
    local layer is its window.
    """
    s = job.shape
    positions = s.max_seq_len if s.style.rope_theta is None else 0
    words = 1 - job.target_share if s.style.has_tied_output else 1
    looked_up = (positions + words * s.vocab_size) * s.hidden_size
    return 6 * (count_parameters(job) - looked_up) + _score_flops_per_token(job)


def _score_flops_per_token(job: Job) -> float:
    """12 L H Q T: of queries with keys, and of their weights with values."""
    return 12 * job.shape.hidden_size * sum(attended_tokens(job, layer) for layer in range(job.shape.num_layers))


def hardware_flops_per_token(job: Job) -> float:
    """Of model_flops_per_token and of the forward pass that checkpointing does again, a third of the layers' work."""
    layers = job.shape.num_layers * 6 * count_block_parameters(job) + _score_flops_per_token(job)
    return model_flops_per_token(job) + (layers / 3 if job.checkpointing else 0.0)


def step_time(job: Job, cluster: Cluster) -> StepTime:
    """One step of `job` on `cluster`, out of the hardware's table."""
    forward_share = 0.5 if job.checkpointing else 1 / 3
    micro = micro_batch_seconds(job, cluster)
    within, at_end = communication(job, cluster)
    hidden = OVERLAP * micro * (1.0 if job.stage == 3 else 1 - forward_share) if job.stage >= 2 else 0.0
    # However fast, the first gather and the last reduction have nothing beside them.
    exposed = max(within - hidden, within / max(2, job.shape.num_layers))
    n = job.accumulation
    return StepTime(n * micro, n * within + at_end, n * exposed + at_end, update_seconds(job, cluster))


def micro_batch_seconds(job: Job, cluster: Cluster) -> float:
    """Forward and backward of one micro batch on one GPU, without communication."""
    gpu, tokens, h = cluster.gpu, job.micro_batch_size * job.seq_len, job.shape.hidden_size
    rate = gpu.matmul_flops * gpu.matmul_share * (1.0 if job.element_bytes == 2 else gpu.fp32_share)
    # Elementwise traffic of a layer, forward and backward: normalisations, GELU, residual sums, layout changes.
    traffic = 3 * tokens * (12 * h + 2 * job.intermediate_size) * job.element_bytes
    seconds = tokens * hardware_flops_per_token(job) / rate
    seconds += job.shape.num_layers * traffic / (gpu.memory_bandwidth * MEMORY_SHARE)
    vocabulary = 20 * tokens * job.target_share * job.shape.vocab_size  # the softmax, in fp32 once and bf16 twice
    seconds += vocabulary / (gpu.memory_bandwidth * MEMORY_SHARE)
    launches = 0.0 if gpu.is_cpu else job.shape.num_layers * LAUNCH_SECONDS[job.stage]
    return max(seconds, launches)


def update_seconds(job: Job, cluster: Cluster) -> float:
    """Norm, clipping, optimizer, and weights rounded again: each a pass over memory."""
    share = count_parameters(job) / (job.num_gpus if job.stage else 1)
    touched = 2 * job.state_bytes + 8 + 20 + job.element_bytes  # state and weights both ways, gradient 5 times
    return share * touched / (cluster.gpu.memory_bandwidth * MEMORY_SHARE)


def communication(job: Job, cluster: Cluster) -> tuple[float, float]:
    """Seconds of communication of one micro batch, and at the end of a step. Gradients are summed in fp32."""
    p, e = count_parameters(job), job.element_bytes
    n, nodes = cluster.gpus_per_node, cluster.num_nodes
    if n * nodes == 1:
        return 0.0, 0.0
    buckets = math.ceil(p / job.bucket_elements)
    if job.stage <= 1:
        weights = gather_seconds(e * p, n, nodes, cluster) if job.stage == 1 else 0.0
        return 0.0, 2 * gather_seconds(4 * p, n, nodes, cluster) + weights
    if job.stage == 2:
        return gather_seconds(4 * p, n, nodes, cluster, buckets), gather_seconds(e * p, n, nodes, cluster)
    gathers = 1 if p <= LIVE_ELEMENTS else 2  # again for backward, where they could not stay
    count = max(buckets, job.shape.num_layers)
    within = gathers * gather_seconds(e * p, n, nodes, cluster, count)
    return within + gather_seconds(4 * p, n, nodes, cluster, buckets), 0.0


def gather_seconds(
    num_bytes: float, gpus_per_node: int, num_nodes: int, cluster: Cluster, num_collectives: int = 1
) -> float:
    """Seconds of an all-gather, or reduce-scatter, of `num_bytes` in all over the GPUs of a group; all-reduce is two.

    Each GPU receives (n - 1) / n of the bytes through its link, each node (m - 1) / m of them through its network.
    """
    n = gpus_per_node * num_nodes
    if n <= 1:
        return 0.0
    link = (n - 1) / n * num_bytes / (cluster.gpu.link_bandwidth * LINK_SHARE) if gpus_per_node > 1 else 0.0
    between = (num_nodes - 1) / num_nodes * num_bytes / (cluster.network.bandwidth * LINK_SHARE)
    return max(link, between) + num_collectives * exchange_latency(gpus_per_node, num_nodes, cluster)


def exchange_latency(gpus_per_node: int, num_nodes: int, cluster: Cluster) -> float:
    """Seconds that the messages of one collective take if they are empty."""
    return _messages(gpus_per_node) * LINK_LATENCY + _messages(num_nodes) * cluster.network.latency


def _messages(size: int) -> float:
    """One after the other, in a ring or up and down a tree."""
    return min(size - 1, 2 * math.log2(size)) if size > 1 else 0.0


def mfu(job: Job, cluster: Cluster, seconds: float) -> float:
    """Model FLOPs utilization (PaLM): tokens/s over those that the GPUs' peak would allow."""
    return job.tokens_per_step * model_flops_per_token(job) / (seconds * cluster.num_gpus * cluster.gpu.matmul_flops)
