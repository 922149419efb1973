"""Every setting of millstream, typed, with its unit in its name or beside it.

A file is a `PretrainConfig` or, when it has the key `task`, a `FinetuneConfig` (tuning.py). Values that follow from
others (gradient accumulation, the DeepSpeed JSON, the number of samples) are computed where they are used: no settings.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]  # dropout: 1.0 would erase everything
DURATION = re.compile(r"\d+(\.\d+)?[smhd]")
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Section(BaseModel):
    """A part of the configuration; unknown keys are errors, values are never changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class TokenizerConfig(Section):
    """How text becomes ids. `pretrained` loads `path`; the other types are trained on the sources."""

    type: Literal["byte_bpe", "wordpiece", "unigram", "characters", "pretrained"] = "byte_bpe"
    vocab_size: PositiveInt = 16_384  # in tokens, special ones included; characters, pretrained: their own
    lowercase: bool = False  # wordpiece only: lower-case and strip accents, as bert-base-uncased does
    path: str | None = None  # folder of vocab.json+merges.txt, vocab.txt, spiece.model or tokenizer.json
    sample_bytes: PositiveInt = 30_000_000  # text the training reads, at most; it takes 20 times the memory
    fim_tokens: bool = False  # also <|fim_prefix|>, <|fim_middle|>, <|fim_suffix|>, for data.fim

    @model_validator(mode="after")
    def _fim_is_not_for_bert(self) -> TokenizerConfig:
        if self.fim_tokens and self.type == "wordpiece":
            raise ValueError("fim_tokens=true is for GPT's tokenizers; wordpiece is BERT's, which masks words instead")
        return self


class CleanConfig(Section):
    """Stages between reading and tokenizing, in this order; each is off unless it is set."""

    html: bool = False  # documents are HTML pages: keep their main text
    mojibake: bool = False  # repair text that was decoded with the wrong encoding (ftfy)
    unicode: Literal["keep", "NFC", "NFKC"] = "keep"  # normalisation form; also drops control characters
    languages: list[str] = []  # ISO 639-1 codes; documents identified as another language are dropped
    min_language_score: Fraction = 0.5  # and those identified with less certainty
    quality: list[Literal["gopher", "gopher_repetition", "c4"]] = []  # rules of these papers; see quality.py
    decontaminate: list[str] = []  # files of test sets; documents that share an n-gram with them are dropped
    decontaminate_words: PositiveInt = 13  # n of that n-gram, in words (Brown et al. 2020)
    pii: list[Literal["email", "phone", "ip", "card", "key"]] = []  # replaced by <EMAIL>, <PHONE>, ...


class DedupeConfig(Section):
    """Documents that say the same as an earlier one are dropped, over all sources; the first one stays."""

    exact: bool = False  # the same words
    near: bool = False  # MinHash over 5-grams of words
    similarity: Annotated[float, Field(ge=0.5, le=1.0)] = 0.8  # near: estimated Jaccard similarity from which on


class BuildConfig(Section):
    """Raw text to a dataset directory: read by `millstream data build`."""

    sources: list[str] = []  # files, globs, folders, http(s):// and s3:// addresses, `datasets` on disk, `docstrings:`
    text_key: str = "text"  # the field of jsonl, parquet and `datasets` records that holds the text
    max_document_bytes: PositiveInt = 128_000_000  # a longer record or file is an error; it takes 4 times the memory
    validation_sources: list[str] = []  # when given, these alone are the validation split
    validation_fraction: Fraction = 0.01  # of the documents, chosen by a hash of their text
    split_by: Literal["document", "tail"] = "document"  # tail: the last fraction of each document, in characters
    clean: CleanConfig = CleanConfig()
    deduplicate: DedupeConfig = DedupeConfig()
    licences: dict[str, str] = {}  # source -> its licence, for the data card
    tokenizer: TokenizerConfig = TokenizerConfig()
    shard_tokens: PositiveInt = 100_000_000  # a shard is closed at the first document that passes this
    on_error: Literal["stop", "skip"] = "stop"  # a broken record: stop and name it, or count it and go on
    num_workers: PositiveInt | None = None  # processes; none: the machine's cores. The result does not depend on it
    engine: Literal["processes", "datatrove"] = "processes"  # who runs the workers; under mpirun it is MPI's ranks
    slurm: dict[str, Any] = {}  # datatrove: settings of its SlurmPipelineExecutor (partition, time, ...); none: local


class MaskingConfig(Section):
    """BERT's denoising objective (Devlin et al. 2019, section 3.1)."""

    probability: Rate = 0.15  # share of tokens that become targets
    mask_share: Fraction = 0.8  # of the targets: replaced by [MASK]
    random_share: Fraction = 0.1  # of the targets: replaced by a random token; the rest stays
    unit: Literal["token", "word", "span"] = "token"  # what is chosen: pieces, whole words, spans of words (SpanBERT)
    span_mean: Annotated[float, Field(ge=1.0)] = 5.0  # span: 1/p of the geometric lengths, in words
    span_max: PositiveInt = 10  # span: longer ones are not drawn; with these two the mean is 3.8 words
    pairs: Literal["nsp", "sop", "none"] = "nsp"  # half of the time the second segment is random (nsp), swapped (sop)
    short_probability: Rate = 0.0  # share of samples cut to a random shorter length (Devlin et al.: 0.1)


class FimConfig(Section):
    """Fill in the middle (Bavarian et al. 2022): documents whose middle is moved to their end; see fim.py."""

    probability: Fraction = 0.0  # share of the documents of a row; the paper's models: 0.5
    spm_share: Fraction = 0.5  # of those: suffix before prefix; the others prefix, suffix, middle


class MixtureSource(Section):
    """One dataset of a mixture; exactly one of weight and epochs is given, the same one in all sources."""

    dir: str  # as data.dir
    weight: Annotated[float, Field(gt=0)] | None = None  # share of the samples, relative to the other sources'
    epochs: Annotated[float, Field(gt=0)] | None = None  # passes over this source while the others make theirs


class MixtureStage(Section):
    """From a step on, other weights."""

    from_step: PositiveInt
    weights: dict[str, Annotated[float, Field(ge=0)]]  # of every source of the mixture
    ramp_steps: Annotated[int, Field(ge=0)] = 0  # how long the weights take to get there, linearly; 0: at once


class CacheConfig(Section):
    """Where shards of a dataset at an http(s):// or s3:// address are kept; shared by all ranks of a node."""

    dir: str = "~/.cache/millstream"
    max_bytes: PositiveInt = 100_000_000_000  # the shards used longest ago are removed beyond this
    retries: Annotated[int, Field(ge=0)] = 5  # of a failed transfer, each after twice the wait
    prefetch_shards: PositiveInt = 4  # transferred at the same time, ahead of use


class DataConfig(Section):
    dir: str = "data/corpus"  # folder or address of the datasets `train/` and `validation/`, with the tokenizer
    build: BuildConfig = BuildConfig()
    mixture: dict[str, MixtureSource] = {}  # name -> dataset; when given, data.dir is not read
    mixture_schedule: list[MixtureStage] = []  # changes of the mixture's weights, for annealing or a curriculum
    packing: Literal["concatenate", "best_fit"] = "concatenate"  # gpt: cut anywhere, or keep documents whole and pad
    shuffle_window_tokens: PositiveInt | None = None  # none: over everything; else shards stay together, see order.py
    masking: MaskingConfig = MaskingConfig()  # used by architecture bert
    fim: FimConfig = FimConfig()  # gpt, training only: the held-out loss is always of text as it is
    unpad: bool = False  # bert: batches without padding, the samples one after the other
    cache: CacheConfig = CacheConfig()
    num_workers: Annotated[int, Field(ge=0)] = 0  # processes that make batches ahead; 0: a thread

    @model_validator(mode="after")
    def _mixture_is_complete(self) -> DataConfig:
        kinds = {(source.weight is None, source.epochs is None) for source in self.mixture.values()}
        if self.mixture and kinds not in ({(False, True)}, {(True, False)}):
            raise ValueError("mixture: give every source a weight, or every source its epochs, and not both")
        if self.mixture_schedule and not self.mixture:
            raise ValueError("mixture_schedule: there is no data.mixture whose weights it could change")
        reached = 0
        for stage in self.mixture_schedule:
            place = f"mixture_schedule, from_step={stage.from_step}"
            if set(stage.weights) != set(self.mixture):
                raise ValueError(
                    f"{place}: has weights for {', '.join(sorted(stage.weights))}, the mixture's sources are "
                    f"{', '.join(sorted(self.mixture))}; name each of them (a weight can be 0)"
                )
            if not any(stage.weights.values()):
                raise ValueError(f"{place}: all weights are 0; give one source a positive weight")
            if stage.from_step < reached:
                raise ValueError(
                    f"{place}: begins before the stage before it has ended, at step {reached}; put the stages in order "
                    f"and let each ramp end before the next one begins"
                )
            reached = max(stage.from_step + stage.ramp_steps, stage.from_step + 1)
        return self


class MupConfig(Section):
    """Maximal update parametrization (Yang et al. 2022) relative to a base model; see docs/training.md."""

    base_hidden_size: PositiveInt  # the width at which lr and the other settings were chosen
    base_head_dim: PositiveInt | None = None  # hidden_size / num_heads there; none: as here, wider models have more


class ModelConfig(Section):
    """A row of the size table in `model_sizes.py` (`preset`), any value of which can be overridden here."""

    architecture: Literal["gpt", "bert"] = "gpt"
    preset: str = "nano"
    num_layers: PositiveInt | None = None
    hidden_size: PositiveInt | None = None
    num_heads: PositiveInt | None = None
    num_kv_heads: PositiveInt | None = None  # llama, qwen3: heads of keys and values (GQA); none: the preset's, or all
    intermediate_size: PositiveInt | None = None  # none: 4 x hidden_size, with a gated MLP 8/3 of it
    max_seq_len: PositiveInt | None = None  # rows of the position table; none: the preset's, at least train.seq_len
    style: str | None = None  # gpt2, gpt-neo, llama, qwen3; bert, modernbert: how blocks are made; none: the preset's
    local_window: Annotated[int, Field(ge=2)] | None = None  # gpt-neo, modernbert: tokens that a local block looks at
    rope_theta: Annotated[float, Field(gt=0)] | None = None  # base of rotary positions, where the style has them
    tied_output: bool | None = None  # llama, qwen3: the output layer is the word embedding; none: the preset's
    gelu: Literal["tanh", "erf"] | None = None  # approximated or exact; none: as published, gpt2 tanh, bert erf
    init_from: str | None = None  # a Hugging Face directory whose weights a new run begins with; see docs/export.md
    dropout: Rate = 0.0  # on embeddings and residuals
    attention_dropout: Rate = 0.0
    mup: MupConfig | None = None  # gpt with adamw: models of any width have the same best settings
    activation_checkpointing: bool = False  # recompute each block in backward: less memory, a third more compute
    compile: bool = False  # torch.compile of each block, in training; needs a C++ compiler, see docs/training.md


class OptimizerConfig(Section):
    """Biases and normalisation weights are not decayed. docs/training.md has each type's formula and usual values."""

    type: Literal["adamw", "lion", "lamb", "muon"] = "adamw"  # muon: matrices inside the blocks; the rest is adamw's
    lr: Annotated[float, Field(gt=0)] = 6e-4  # the peak
    betas: tuple[float, float] = (0.9, 0.95)  # lion's are usually (0.9, 0.99)
    eps: Annotated[float, Field(gt=0)] = 1e-8  # not lion
    momentum: Rate = 0.95  # muon
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    grad_clip: Annotated[float, Field(ge=0)] = 1.0  # largest global gradient norm; 0 turns clipping off
    ema_decay: Rate | None = None  # also keep a moving average of the weights, in fp32; see `millstream export`


class ScheduleConfig(Section):
    """The learning rate as a function of the step: linear warmup, then `type` down to `final_share` of the peak."""

    type: Literal["cosine", "linear", "wsd", "inverse_sqrt", "constant"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    final_share: Fraction = 0.1
    # Length of the final decay of wsd (none: a tenth of train.num_steps) and of inverse_sqrt (none: there is none)
    decay_steps: PositiveInt | None = None

    @model_validator(mode="after")
    def _inverse_sqrt_has_a_scale(self) -> ScheduleConfig:
        if self.type == "inverse_sqrt" and not self.warmup_steps:
            raise ValueError("type=inverse_sqrt falls as sqrt(warmup_steps / step); set warmup_steps (T5: 10000)")
        return self


class PhaseConfig(Section):
    """A stretch of a run with a sequence length of its own, out of the same dataset (BERT: 128, then 512)."""

    from_step: PositiveInt
    seq_len: PositiveInt  # in tokens


class BatchRampConfig(Section):
    """The global batch size grows from start_size to train.global_batch_size; see batch_sizes.py."""

    start_size: PositiveInt  # in samples
    increment: PositiveInt  # in samples; each size is used for equally many samples
    num_samples: PositiveInt  # that have been seen when the full size is reached


class TrainConfig(Section):
    num_steps: PositiveInt = 1000  # optimizer steps; with a budget, at most so many
    budget: str | None = None  # wall-clock time of the whole run, resumes included: 24h, 90m, 3600s; see budget.py
    seq_len: PositiveInt = 1024  # in tokens
    phases: list[PhaseConfig] = []  # later changes of seq_len, in order of their steps
    global_batch_size: PositiveInt = 64  # in samples, over all ranks and accumulation steps
    batch_ramp: BatchRampConfig | None = None  # smaller global batches at first
    micro_batch_size: PositiveInt = 8  # in samples, on one rank at once
    precision: Literal["bf16", "fp32"] = "bf16"
    label_smoothing: Rate = 0.0  # of the tokens' targets: this share of each goes to the whole vocabulary
    z_loss: Annotated[float, Field(ge=0)] = 0.0  # coefficient of log^2 Z of the tokens (PaLM: 1e-4)
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    seed: Annotated[int, Field(ge=0)] = 1234
    resume: Literal["auto", "never"] = "auto"  # auto: go on from the newest valid checkpoint of run_dir

    @field_validator("budget", mode="before")
    @classmethod
    def _budget_is_a_duration(cls, value: Any) -> Any:
        if value is not None and (not DURATION.fullmatch(str(value)) or not float(str(value)[:-1])):
            raise ValueError("expected a number and its unit, as in 24h, 90m or 3600s")
        return value

    @property
    def budget_seconds(self) -> float | None:
        return None if self.budget is None else float(self.budget[:-1]) * SECONDS[self.budget[-1]]

    @property
    def longest_seq_len(self) -> int:
        return max([self.seq_len, *(phase.seq_len for phase in self.phases)])


class EvalConfig(Section):
    every_steps: PositiveInt = 500
    num_samples: PositiveInt = 256  # of the validation split, always the same ones; rounded up to whole batches


class CheckpointConfig(Section):
    every_steps: PositiveInt = 500
    keep_last: PositiveInt = 3
    keep_every_steps: PositiveInt | None = None  # those of steps that are multiples of it are never removed
    keep_best: Annotated[int, Field(ge=0)] = 0  # so many with the lowest eval_loss stay too
    background: bool = True  # written while the run goes on, from a copy in host memory; see docs/resuming.md
    local_dir: str | None = None  # on a disk of each node: written there first, then copied to run_dir
    # s3://BUCKET/FOLDER, https://... or another address of fsspec: finished ones are copied there
    upload: Annotated[str, Field(pattern=r"^[a-z0-9+]+://.")] | None = None


class LogConfig(Section):
    every_steps: PositiveInt = 10  # lines on the terminal; metrics.jsonl has every step
    tensorboard: bool = True
    trace: bool = False  # sample ids and a random number of each step and rank, in run_dir/trace


class ZeroConfig(Section):
    """DeepSpeed ZeRO (Rajbhandari et al. 2020): what is split over the ranks instead of being held by each."""

    stage: Literal[0, 1, 2, 3] = 3  # 0: nothing (fp32 only), 1: optimizer state, 2: also gradients, 3: also weights
    persistence_threshold: Annotated[int, Field(ge=0)] = 0  # smaller weights stay whole; each costs a gather a step
    bucket_elements: PositiveInt = 50_000_000  # gradients are reduced in buckets of this many elements


class GuardConfig(Section):
    """What is done about numbers that cannot be right; see docs/trust.md."""

    non_finite_limit: PositiveInt = 3  # steps in a row that had no update, after which the run stops with 70
    # A loss so many standard deviations above those of the steps before is a spike; none: nothing is one. See spikes.py
    spike_sigmas: Annotated[float, Field(gt=0)] | None = None
    spike_rollback: bool = False  # at a spike, go back to a checkpoint before it and pass over batches
    spike_margin_steps: PositiveInt = 100  # the checkpoint is so much older than the spike, where there is such a one
    spike_skip_batches: PositiveInt = 200  # global batches passed over then, at least up to that of the spike
    spike_rollback_limit: Annotated[int, Field(ge=0)] = 5  # a spike after so many rollbacks stops the run with 70
    verify_every_steps: PositiveInt | None = None  # such a step is computed twice, bitwise compared; see verify.py

    @model_validator(mode="after")
    def _rollback_has_spikes(self) -> GuardConfig:
        if self.spike_rollback and self.spike_sigmas is None:
            raise ValueError("spike_rollback=true, but spike_sigmas is not set: no loss is a spike; set it, say to 10")
        return self


class LaunchConfig(Section):
    """What is done about ranks that stand still or fail; see docs/running.md."""

    stall_seconds: PositiveInt | None = 600  # a rank without a mark for so long ends the run with 124; none: never
    restarts: Annotated[int, Field(ge=0)] = 0  # of a run that failed, in a row without progress
    backoff_seconds: Annotated[float, Field(ge=0)] = 10.0  # before the first restart; each further one waits twice that
    silence_seconds: Annotated[float, Field(ge=1)] = 20.0  # a host (--hosts) that is not heard for so long is gone


class PretrainConfig(Section):
    run_dir: str
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    zero: ZeroConfig = ZeroConfig()
    guard: GuardConfig = GuardConfig()
    launch: LaunchConfig = LaunchConfig()
    deepspeed: dict[str, Any] = {}  # raw additions to the generated DeepSpeed JSON; may not contradict it

    @model_validator(mode="after")
    def _sizes_agree(self) -> PretrainConfig:
        train, model = self.train, self.model
        if train.global_batch_size % train.micro_batch_size:
            raise ValueError(
                f"train.global_batch_size={train.global_batch_size} is not a multiple of "
                f"train.micro_batch_size={train.micro_batch_size}; choose a micro batch that divides it"
            )
        if problem := _ramp_problem(train):
            raise ValueError(problem)
        if train.schedule.warmup_steps > train.num_steps:
            raise ValueError(
                f"train.schedule.warmup_steps={train.schedule.warmup_steps} is more than "
                f"train.num_steps={train.num_steps}: the peak would never be reached"
            )
        if model.max_seq_len is not None and train.seq_len > model.max_seq_len:
            raise ValueError(
                f"train.seq_len={train.seq_len} is more than model.max_seq_len={model.max_seq_len}; "
                f"lower train.seq_len or raise model.max_seq_len"
            )
        if model.mup is not None and (model.architecture != "gpt" or train.optimizer.type != "adamw"):
            raise ValueError(
                f"model.mup is for model.architecture=gpt with train.optimizer.type=adamw, found {model.architecture} "
                f"with {train.optimizer.type}; leave model.mup out"
            )
        if model.compile and self.data.unpad:
            raise ValueError(
                "model.compile=true with data.unpad=true: batches without padding have another shape at every step, "
                "and each would be compiled anew; turn one of them off"
            )
        if problem := _phase_problem(train, model):
            raise ValueError(problem)
        if self.data.packing == "best_fit" and model.architecture == "bert":
            raise ValueError(
                "data.packing=best_fit is for model.architecture=gpt; BERT's rows are cut at sentence ends"
            )
        if self.data.fim.probability and model.architecture == "bert":
            raise ValueError(
                f"data.fim.probability={self.data.fim.probability} is for model.architecture=gpt; BERT fills in with "
                f"data.masking"
            )
        window = self.data.shuffle_window_tokens
        if window is not None and window < train.longest_seq_len:
            raise ValueError(
                f"data.shuffle_window_tokens={window} is less than one sample of {train.longest_seq_len} tokens; give "
                f"that of several shards, or leave it out"
            )
        if self.data.masking.mask_share + self.data.masking.random_share > 1:
            raise ValueError("data.masking.mask_share + data.masking.random_share is more than 1")
        return self


def _ramp_problem(train: TrainConfig) -> str | None:
    ramp, full_size = train.batch_ramp, train.global_batch_size
    if ramp is None:
        return None
    if ramp.start_size >= full_size or (full_size - ramp.start_size) % ramp.increment:
        return (
            f"train.batch_ramp: from start_size={ramp.start_size} in increments of {ramp.increment} there is no way to "
            f"train.global_batch_size={full_size}; choose an increment that divides the difference"
        )
    sizes = range(ramp.start_size, full_size, ramp.increment)
    if unfit := [str(size) for size in sizes if size % train.micro_batch_size]:
        return (
            f"train.batch_ramp: the sizes {', '.join(unfit)} are not multiples of train.micro_batch_size="
            f"{train.micro_batch_size}; choose start_size and increment that are, or a smaller micro batch"
        )
    return None


def _phase_problem(train: TrainConfig, model: ModelConfig) -> str | None:
    steps = [phase.from_step for phase in train.phases]
    if steps != sorted(set(steps)):
        return f"train.phases: from_step goes {', '.join(map(str, steps))}; put the phases in order, each step once"
    for phase in train.phases:
        if model.max_seq_len is not None and phase.seq_len > model.max_seq_len:
            return (
                f"train.phases: seq_len={phase.seq_len} from step {phase.from_step} is more than "
                f"model.max_seq_len={model.max_seq_len}; lower it or raise model.max_seq_len"
            )
    return None
