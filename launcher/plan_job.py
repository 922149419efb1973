"""What a plan is made of: the run as plain numbers, and the cluster it is to run on. Pure: no files, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from configs.batch_sizes import samples_before
from configs.deepspeed_json import accumulation_steps
from configs.errors import ConfigError
from configs.hardware import Gpu, Network
from configs.model_sizes import BertShape, GPTShape, model_shape
from configs.schema import PretrainConfig, TrainConfig

STATE_BYTES = {"adamw": 8, "lamb": 8, "lion": 4, "muon": 8}  # of the optimizer, fp32, per parameter; muon: at most


@dataclass(frozen=True)
class Job:
    """A pretraining run in numbers; sizes are in elements, samples and tokens."""

    shape: GPTShape | BertShape
    seq_len: int
    micro_batch_size: int  # samples, on one GPU at once
    global_batch_size: int  # samples, over all GPUs and accumulation steps
    num_gpus: int
    num_steps: int
    num_tokens: int  # of the whole run, if no budget ends it before
    budget_seconds: float | None  # wall-clock time after which the run ends
    element_bytes: int  # of weights and activations: 2 (bf16) or 4 (fp32)
    stage: int
    bucket_elements: int
    state_bytes: int  # of the optimizer's state and the moving average, per parameter
    checkpointing: bool
    dropout: float
    attention_dropout: float
    target_share: float  # of the positions that go through the output layer: 1 for GPT, the masked ones for BERT

    @property
    def is_bert(self) -> bool:
        return isinstance(self.shape, BertShape)

    @property
    def intermediate_size(self) -> int:
        return self.shape.mlp_size

    @property
    def accumulation(self) -> int:
        """Micro batches of one GPU in a step."""
        return self.global_batch_size // (self.micro_batch_size * self.num_gpus)

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_len


@dataclass(frozen=True)
class Cluster:
    num_gpus: int
    num_nodes: int
    gpu: Gpu
    network: Network

    @property
    def gpus_per_node(self) -> int:
        return self.num_gpus // self.num_nodes


def make_job(config: PretrainConfig, vocab_size: int | None, num_gpus: int) -> Job:
    """The numbers of `config` on `num_gpus`, at the longest sequence length of its phases.

    vocab_size: of the dataset; None: that of the published models. Raises ConfigError for a shape that cannot be, a
    batch that does not divide over the GPUs, and a ZeRO stage that this precision cannot have.
    """
    train, model = config.train, config.model
    shape = model_shape(model, vocab_size, train.longest_seq_len)
    accumulation_steps(train.global_batch_size, train.micro_batch_size, num_gpus)
    if config.zero.stage == 0 and train.precision == "bf16":
        raise ConfigError("zero.stage=0 is for train.precision=fp32; with bf16 the whole weights are at zero.stage=1")
    return Job(
        shape=shape,
        seq_len=train.longest_seq_len,
        micro_batch_size=train.micro_batch_size,
        global_batch_size=train.global_batch_size,
        num_gpus=num_gpus,
        num_steps=train.num_steps,
        num_tokens=_tokens_of_run(train),
        budget_seconds=train.budget_seconds,
        element_bytes=2 if train.precision == "bf16" else 4,
        stage=config.zero.stage,
        bucket_elements=config.zero.bucket_elements,
        state_bytes=STATE_BYTES[train.optimizer.type] + (4 if train.optimizer.ema_decay is not None else 0),
        checkpointing=model.activation_checkpointing,
        dropout=model.dropout,
        attention_dropout=model.attention_dropout,
        target_share=config.data.masking.probability if model.architecture == "bert" else 1.0,
    )


def _tokens_of_run(train: TrainConfig) -> int:
    """Over all steps, with the batches and sequence lengths that each has."""
    starts = [(0, train.seq_len), *((p.from_step, p.seq_len) for p in train.phases if p.from_step < train.num_steps)]
    ends = [*(start for start, _ in starts[1:]), train.num_steps]
    return sum(
        (samples_before(train, end) - samples_before(train, start)) * seq_len
        for (start, seq_len), end in zip(starts, ends, strict=True)
    )


def make_cluster(num_gpus: int, num_nodes: int | None, gpu: Gpu, network: Network) -> Cluster:
    """`num_gpus` on `num_nodes` (None: as many as the GPU's usual nodes need); ConfigError if they do not divide."""
    if num_nodes is None:
        num_nodes = max(1, -(-num_gpus // gpu.per_node))
    if num_gpus % num_nodes:
        raise ConfigError(
            f"{num_gpus} GPUs do not divide over {num_nodes} nodes; choose a number of GPUs that is a multiple of "
            f"{num_nodes}, or --nodes {next(n for n in range(num_nodes, 0, -1) if num_gpus % n == 0)}"
        )
    return Cluster(num_gpus, num_nodes, gpu, network)


def count_block_parameters(job: Job) -> int:
    """Of one layer: query, key and value, the output, the MLP's two or three matrices, normalisations; and biases."""
    shape, style = job.shape, job.shape.style
    h, i, bias = shape.hidden_size, job.intermediate_size, int(style.has_bias)
    qkv = h + 2 * shape.kv_heads * shape.head_dim  # outputs
    into_mlp = (2 if style.is_gated else 1) * i
    attention = (h + style.has_qkv_bias) * qkv + (h + bias) * h + (2 * shape.head_dim if style.norms_qk else 0)
    return attention + (h + bias) * into_mlp + (i + bias) * h + 2 * _norm_parameters(job)


def count_parameters(job: Job) -> int:
    """Of the whole model; an output layer that is the word embedding counts once."""
    s, style, h = job.shape, job.shape.style, job.shape.hidden_size
    norm, blocks = _norm_parameters(job), job.shape.num_layers * count_block_parameters(job)
    embeddings = (s.vocab_size + (s.max_seq_len if style.rope_theta is None else 0)) * h
    if not job.is_bert:
        return embeddings + blocks + norm + (0 if style.has_tied_output else s.vocab_size * h)
    masked_words = (h + style.has_bias) * h + norm + s.vocab_size  # transform, and the output's bias
    pairs = 2 * h + (h * h + h) + (2 * h + 2) if style.has_pairs else 0  # token types, pooler, next sentence
    # norm_first: one more after the last block, and one less in the first, which follows the embeddings' own
    return embeddings + norm + blocks + masked_words + pairs


def _norm_parameters(job: Job) -> int:
    style = job.shape.style
    return job.shape.hidden_size * (2 if style.norm == "layer" and style.has_bias else 1)


def attended_tokens(job: Job, layer: int) -> int:
    """Keys that a query of this layer looks at, at most: all of the sequence, or a local layer's window."""
    style = job.shape.style
    window = style.window(layer)
    if window is None:
        return job.seq_len
    return min(job.seq_len, window if style.is_causal else 1 + 2 * (window // 2))
