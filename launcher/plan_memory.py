"""Memory of one rank, by part and by moment of a step. Pure: numbers in, numbers out.

A rank holds weights, fp32 weights, the optimizer's state and gradients all the time, split over the ranks as its ZeRO
stage says (Rajbhandari et al. 2020, section 5). On top comes what a moment needs: the end of forward (all layers'
activations, and the loss), backward (activations, gradients on their way to the other ranks), the update, a save. The
peak is the largest of these sums. What each part counts was read off the tensors that live in a run
(docs/planning.md), not fitted to totals.

Activations are Korthikanti et al. 2022's 34 s b h + 5 a s^2 b bytes a layer, less what this code does not keep: without
dropout no masks (2 s b h), with fused attention no scores.
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.plan_job import Job, attended_tokens, count_block_parameters, count_parameters

# Of logits in memory at once, as in pretrain/kernels/linear_cross_entropy.py
CHUNK_ELEMENTS, MOST_ELEMENTS = 1 << 23, 1 << 26
BLOCK_QUERIES = 256  # of blockwise attention on CPUs, as in pretrain/kernels/attention.py
LOCAL_QUERIES = 128  # of attention with a window, as there
LARGE_BLOCK = 32 * 2**20  # bytes; glibc maps what is larger by itself and gives it back when it is freed
LIVE_ELEMENTS = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters: gathered weights that stay until backward
ALLREDUCE_ELEMENTS = 500_000_000  # of the flat copies in which DeepSpeed's stages 0 and 1 sum gradients
GPU_CONTEXT = 1.2e9  # CUDA's context, NCCL's buffers and cuBLAS's workspace, outside of torch's allocator
GPU_FRAGMENTATION = 0.05  # of what comes and goes, kept by torch's caching allocator beyond what is used
# The same of glibc's heap, which activations of all sizes leave with holes, by ZeRO stage; --probe measures it.
CPU_FRAGMENTATION = {0: 0.1, 1: 0.25, 2: 0.3, 3: 0.7}
CPU_BASELINE = 430e6  # Python, torch and deepspeed, imported; --probe measures it

PARTS = ("context", "weights", "gradients", "optimizer", "ZeRO buffers", "activations", "output layer", "checkpoint")


@dataclass(frozen=True)
class Block:
    """Memory that comes and goes: of a part, in bytes; `largest` is that of its largest single tensor."""

    part: str
    total: float
    largest: float


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the peak of a step, by part; `fragmentation` is what the allocator keeps beyond them."""

    parts: dict[str, float]
    fragmentation: float
    moment: str  # in which the peak is

    @property
    def total(self) -> float:
        return sum(self.parts.values()) + self.fragmentation


def memory(
    job: Job,
    on_cpu: bool = False,
    context: float | None = None,
    fragmentation: float | None = None,
    saves_before_end: bool = True,
) -> Memory:
    """The peak of one rank.

    context: bytes before the model is built; fragmentation: share of what comes and goes; None: the constants above.
    saves_before_end: whether steps follow after a checkpoint; on a CPU its copy is then there all the time.
    """
    if context is None:
        context = CPU_BASELINE if on_cpu else GPU_CONTEXT
    if fragmentation is None:
        fragmentation = CPU_FRAGMENTATION[job.stage] if on_cpu else GPU_FRAGMENTATION
    there = {"context": context, **held(job, on_cpu)}
    moments = _moments(job, on_cpu)
    copy = (4 + job.state_bytes) * count_parameters(job) / job.num_gpus if on_cpu else 0.0
    if saves_before_end:
        there["checkpoint"] = copy
    else:
        moments["save"] = [Block("checkpoint", copy, 0.0)]
    if on_cpu:
        return _on_cpu(there, moments, fragmentation)
    sums = {name: sum(block.total for block in blocks) for name, blocks in moments.items()}
    peak = max(sums, key=lambda name: sums[name])
    return Memory(_added(there, moments[peak]), fragmentation * sums[peak], peak)


def _moments(job: Job, on_cpu: bool) -> dict[str, list[Block]]:
    return {
        "end of forward": [*activations(job, on_cpu), *_loss_blocks(job, on_cpu), *_gathered(job)],
        "backward": [
            *activations(job, on_cpu, in_backward=True),
            *_loss_gradient(job),
            *_gathered(job),
            *_reduction(job, on_cpu),
        ],
        "update": _update(job),
    }


def transient_bytes(job: Job, on_cpu: bool) -> float:
    """Of what `fragmentation` is a share: what comes and goes in a step, on a CPU in blocks that glibc keeps."""
    moments = _moments(job, on_cpu).values()
    return max(sum(b.total for b in blocks if not on_cpu or b.largest < LARGE_BLOCK) for blocks in moments)


def _on_cpu(there: dict[str, float], moments: dict[str, list[Block]], fragmentation: float) -> Memory:
    """glibc gives large blocks back at once; its heap of the small ones keeps the size that it once had.

    So the peak is the heap at its largest, whenever that was, and the large blocks of the moment that has most of them.
    A save copies parameters one by one, into what the heap has kept.
    """
    small = {name: [b for b in blocks if b.largest < LARGE_BLOCK] for name, blocks in moments.items()}
    large = {name: [b for b in blocks if b.largest >= LARGE_BLOCK] for name, blocks in moments.items()}
    saved = sum(block.total for block in small.pop("save", []))
    heap = max(small, key=lambda name: sum(block.total for block in small[name]))
    used = sum(block.total for block in small[heap])
    peak = max(large, key=lambda name: sum(block.total for block in large[name]))
    beyond = (1 + fragmentation) * used + sum(block.total for block in large[peak])
    if saved > beyond:
        return Memory(_added(there, moments["save"]), 0.0, "save")
    return Memory(_added(there, [*small[heap], *large[peak]]), fragmentation * used, peak if large[peak] else heap)


def _added(there: dict[str, float], blocks: list[Block]) -> dict[str, float]:
    parts = {name: there.get(name, 0.0) for name in PARTS}
    for block in blocks:
        parts[block.part] += block.total
    return parts


def held(job: Job, on_cpu: bool) -> dict[str, float]:
    """What is there all the time: weights, gradients that are added up, fp32 weights and optimizer state, buckets."""
    n, e = job.num_gpus, job.element_bytes
    p = count_parameters(job)
    weights = e * p / (n if job.stage == 3 else 1)
    # DeepSpeed keeps fp32 weights of its own beside those of the model, also where these are fp32 themselves.
    optimizer = (job.state_bytes + 4) * p / n if job.stage else job.state_bytes * p
    # Sums of gradients are fp32. At stage 1 with bf16, as at stage 0, every rank has all of them.
    gradients = 4 * p / (n if job.stage >= 2 else 1)
    bucket = min(job.bucket_elements, p) if on_cpu else job.bucket_elements  # a CPU's untouched pages cost nothing
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "ZeRO buffers": 4 * bucket if job.stage == 3 else 0.0,
    }


def activation_bytes(job: Job, on_cpu: bool = False, layer: int = 0) -> float:
    """Bytes that a layer keeps for its backward pass, of one micro batch."""
    tokens, e, h = job.micro_batch_size * job.seq_len, job.element_bytes, job.shape.hidden_size
    style, kv_size = job.shape.style, job.shape.kv_heads * job.shape.head_dim
    # Inputs of: norm, qkv, attention (3), output layer, norm, up, gelu (i), down (i). Gated: gate and up (2 i), the
    # activation, down. Grouped keys and values: beside what they are repeated to.
    kept = tokens * (8 * h + (4 if style.is_gated else 2) * job.intermediate_size) * e
    if kv_size != h:
        kept += tokens * 2 * kv_size * e
    if style.norm == "rms" and on_cpu:  # torch has no fused one there: in fp32 its input, and that normalised
        kept += 2 * tokens * h * (2 * 4 - e)
    if style.norms_qk:
        kept += tokens * (h + kv_size) * (8 if on_cpu else e)
    if job.dropout > 0:  # GPUs keep a mask of bytes, CPUs the factors in the type of the activations
        kept += 2 * tokens * h * (e if on_cpu else 1)
    return kept + _attention_bytes(job, on_cpu, layer)


def _attention_bytes(job: Job, on_cpu: bool, layer: int = 0) -> float:
    """Of a layer beyond queries, keys, values and result."""
    s, a, b = job.seq_len, job.shape.num_heads, job.micro_batch_size
    is_local = attended_tokens(job, layer) < s
    near = min(s, LOCAL_QUERIES + attended_tokens(job, layer) - 1)  # keys that some query of a block looks at
    if not _is_blockwise(job, on_cpu):  # fused: a sum for each row and head, and the mask as numbers
        return b * s * a * 4 + b * s * (near if is_local else s) * job.element_bytes
    keys = s if job.is_bert or s <= BLOCK_QUERIES else (s + BLOCK_QUERIES) / 2  # that a block of queries looks at
    copies = 3 if job.attention_dropout > 0 else 1  # softmax; the factors of dropout and its result
    return b * s * (near if is_local else keys) * (copies * a * job.element_bytes + 1)  # the mask: a byte for all heads


def _is_blockwise(job: Job, on_cpu: bool) -> bool:
    return on_cpu and job.element_bytes == 2  # with the mask that rows of several documents have


def activations(job: Job, on_cpu: bool = False, in_backward: bool = False) -> list[Block]:
    """What the layers keep; with checkpointing the input of each, and one layer whole while it is done again.

    in_backward adds what the backward pass of one layer makes itself.
    """
    tokens, e, h = job.micro_batch_size * job.seq_len, job.element_bytes, job.shape.hidden_size
    one = activation_bytes(job, on_cpu)
    edges = 3 * tokens * h * e  # the first layer's input; the last normalisation's, and its result
    layers = range(job.shape.num_layers)
    kept = edges + (tokens * h * e * len(layers) if job.checkpointing else 0.0)
    kept += 0.0 if job.checkpointing else sum(activation_bytes(job, on_cpu, layer) for layer in layers)
    if job.checkpointing and in_backward:
        kept += one
    if in_backward:  # gradients of what gelu and the MLP have between them, or of the scores
        scores = 3 * _attention_bytes(job, on_cpu) if _is_blockwise(job, on_cpu) else 0
        in_mlp = (4 if job.shape.style.is_gated else 2) * job.intermediate_size
        kept += max(tokens * (in_mlp + 2 * h) * e, scores + 5 * tokens * h * e)
    return [Block("activations", kept, tokens * max(job.intermediate_size, 3 * h) * e)]


def _loss_blocks(job: Job, on_cpu: bool) -> list[Block]:
    """The fused output layer: gradients instead of logits, a chunk of logits, see kernels/linear_cross_entropy.py."""
    v, h, e = job.shape.vocab_size, job.shape.hidden_size, job.element_bytes
    rows = job.micro_batch_size * job.seq_len * job.target_share
    num_chunks = max(1, -(-rows // min(max(CHUNK_ELEMENTS // v, 2 * h), max(1, MOST_ELEMENTS // v))))
    chunk = rows / num_chunks * v
    softmax = 2 * 4 * (min(chunk, 1 << 18) if on_cpu else chunk)  # the logits and their softmax, fp32
    total = [Block("output layer", 4 * v * h, 4 * v * h)] if num_chunks > 1 else []
    return [
        Block("output layer", chunk * e + softmax + 2 * rows * h * e, chunk * e),
        *total,  # the sum of the weight's gradient
        Block("output layer", e * v * h, e * v * h),  # a chunk's part of it
    ]


def _loss_gradient(job: Job) -> list[Block]:
    """Gradients of the embedding, tied or not: of the output layer, kept and scaled, and of the lookup, at the end."""
    v, h, e = job.shape.vocab_size, job.shape.hidden_size, job.element_bytes
    return [Block("output layer", 3 * e * v * h, e * v * h)]


def _gathered(job: Job) -> list[Block]:
    """ZeRO-3's whole weights: those used last stay, up to LIVE_ELEMENTS, beside the layer that is being gathered."""
    if job.stage != 3 or job.num_gpus == 1:
        return []
    e, p, layer = job.element_bytes, count_parameters(job), count_block_parameters(job)
    fetched = min(p, max(job.bucket_elements, layer))
    live = min(p, LIVE_ELEMENTS) if p <= LIVE_ELEMENTS else max(fetched, job.shape.vocab_size * job.shape.hidden_size)
    return [Block("ZeRO buffers", e * live, e * layer / 3), Block("ZeRO buffers", e * fetched, e * layer / 3)]


def _reduction(job: Job, on_cpu: bool) -> list[Block]:
    """Gradients on their way to the other ranks: flat copies of a bucket, in fp32, and what gloo copies once more."""
    p, e = count_parameters(job), job.element_bytes
    bucket = min(job.bucket_elements, p)
    if job.stage <= 1:
        copy = 4 * min(p, ALLREDUCE_ELEMENTS)
        own = e * p if job.stage == 1 else 0.0  # the model's, until the update, beside their sum
        return [Block("ZeRO buffers", copy, copy), Block("gradients", own, e * count_block_parameters(job) / 3)]
    if job.stage == 2:  # two buffers to be filled in turn; a CPU has touched only what was filled
        buffers = e * (min(2 * job.bucket_elements, p) if on_cpu else 2 * job.bucket_elements)
        copies = (4 + (e if e == 2 else 0)) * bucket
        return [Block("ZeRO buffers", buffers + copies, 4 * bucket)]
    return [Block("ZeRO buffers", (8 if on_cpu else 4) * bucket, 4 * bucket)]


def _update(job: Job) -> list[Block]:
    """The flat fp32 gradient of this rank beside its pieces."""
    if job.stage < 2:
        return []
    share = 4 * count_parameters(job) / job.num_gpus
    return [Block("gradients", share, share)]
