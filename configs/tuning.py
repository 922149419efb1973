"""Every setting of fine-tuning: a file with the key `task` is a `FinetuneConfig`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from configs.schema import (
    Fraction,
    LaunchConfig,
    LogConfig,
    OptimizerConfig,
    PositiveInt,
    Rate,
    Section,
    ZeroConfig,
)

LOWER_IS_BETTER = frozenset({"rmse", "loss", "perplexity"})  # metrics; of all others more is better
Scalar = str | int | float | bool


class LoraConfig(Section):
    """Low-rank adaptation (Hu et al. 2022): the weights stay, a product of two thin matrices is added to some."""

    rank: PositiveInt = 8
    alpha: PositiveInt = 16  # the product is multiplied by alpha / rank
    dropout: Rate = 0.0  # of what goes into the product
    # names of modules; none: peft's choice for the architecture, [all-linear]: every linear one but the head
    targets: list[str] = []


class TuningConfig(Section):
    num_epochs: Annotated[float, Field(gt=0)] = 3.0
    batch_size: PositiveInt = 32  # in examples, over all ranks
    micro_batch_size: PositiveInt = 32  # in examples, on one rank at once
    max_seq_len: PositiveInt = 128  # in tokens; longer examples are cut, or become windows
    # in tokens: longer texts become windows that share so many; none: they are cut (question answering: 128)
    window_overlap: PositiveInt | None = None
    precision: Literal["bf16", "fp32"] = "bf16"
    dropout: Rate | None = None  # none: the model's own
    warmup_share: Fraction = 0.06  # of all steps; the rate then falls linearly to zero
    optimizer: OptimizerConfig = OptimizerConfig(lr=5e-5, betas=(0.9, 0.999), weight_decay=0.01)
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0  # a layer's lr over that of the one above; 1: all the same
    lora: LoraConfig | None = None  # none: all weights are trained
    # classification, of labels in the loss; balanced: as if all were equally frequent; labels that are left out have 1
    class_weights: Literal["balanced"] | dict[str, Annotated[float, Field(ge=0)]] | None = None
    eval_every: PositiveInt | None = None  # in steps: evaluate meanwhile too, and take the best weights; none: the last
    metric: str | None = None  # which says what is best; none: the task's first one
    patience: PositiveInt | None = None  # evaluations without a better one, after which the run ends; none: never
    save_every: PositiveInt = 500  # in steps: a checkpoint, besides those of evaluations; a killed run goes on from it
    non_finite_limit: PositiveInt = 3  # steps in a row that had no update, after which the run stops with 70
    seeds: list[int] = [1]  # one run each; metrics are reported for each, with mean and spread


class AnswersConfig(Section):
    """Question answering: how an answer is chosen from the scores of its first and its last token."""

    longest: PositiveInt = 30  # in tokens
    num_best: PositiveInt = 20  # candidates, written to predictions.jsonl
    # SQuAD v2.0: no answer is given where its score is above the best answer's by more than this
    no_answer_threshold: float = 0.0
    language: Literal["en", "ar", "de", "es", "hi", "ru", "vi", "zh"] = "en"  # how answers are compared; see squad.py


class TaggingConfig(Section):
    """Tagging: where the tags stand, how spans are written for training, how they are decoded."""

    column: int | None = None  # from 0, -1 the last; none: the last one of CoNLL, UPOS (3) of CoNLL-U
    scheme: Literal["BIO", "BIOES", "IO"] | None = None  # none: as the file writes its spans
    document_context: bool = False  # rows are filled with the sentences around, of the same document
    constrained: bool = True  # only sequences that the scheme allows


class RangeConfig(Section):
    """From low to high, both included: whole numbers if both are written as such (1, not 1.0)."""

    low: int | float
    high: int | float
    log: bool = False  # every power of ten is as likely as the next one
    step: int | float | None = None  # none: 1 for whole numbers, any number for others

    @model_validator(mode="after")
    def _ends_are_in_order(self) -> RangeConfig:
        if self.low >= self.high:
            raise ValueError(f"low={self.low} is not below high={self.high}; exchange them")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError(f"log=true with low={self.low}, step={self.step}: needs low above 0 and no step")
        return self


class SweepConfig(Section):
    """`millstream sweep`: trials of other settings, chosen by Optuna; see docs/finetuning.md."""

    metric: str  # of results.json, whose mean is to be as good as possible
    num_trials: PositiveInt = 20
    sampler: Literal["tpe", "random"] = "tpe"  # tpe learns from the trials before (Bergstra et al. 2011)
    seed: Annotated[int, Field(ge=0)] = 1
    ranges: dict[str, RangeConfig | list[Scalar]]  # dotted key of this file -> a range, or the values to choose from

    @model_validator(mode="after")
    def _there_is_something_to_choose(self) -> SweepConfig:
        empty = [key for key, of in self.ranges.items() if of == []]
        if not self.ranges or empty:
            raise ValueError(f"ranges: {empty[0] if empty else 'nothing'} has no values; give low and high, or a list")
        return self


class GenerationConfig(Section):
    """Generation: what stands before the target, how texts are decoded, how they are compared."""

    # the columns' names in braces, as "{text} TL;DR:"; none: each text and then an empty line
    prompt: str | None = None
    max_new_tokens: PositiveInt = 64  # the room that sources leave in tuning.max_seq_len
    num_beams: PositiveInt = 1  # 1: no beams
    length_penalty: float = 1.0  # of beams: their scores are divided by length ** this
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] = 0  # 0: any may come again
    temperature: Annotated[float, Field(ge=0)] = 0.0  # 0: the most probable token or beam; above: sampling
    top_k: Annotated[int, Field(ge=0)] = 0  # sampling among so many; 0: all
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0  # sampling among those that make up so much of the probability
    metrics: Annotated[list[Literal["exact_match", "rouge", "bleu", "chrf"]], Field(min_length=1)] = ["exact_match"]
    bleu_tokenizer: Literal["13a", "intl", "zh", "char", "none"] = "13a"  # sacreBLEU's; zh for Chinese


class FinetuneConfig(Section):
    """A downstream task on a Hugging Face directory."""

    task: Literal["classification", "regression", "qa", "tagging", "generation"]
    model: str  # the directory: an export of ours or anybody's
    from_scratch: bool = False  # same architecture and tokenizer, weights drawn anew: the baseline
    train: str  # file of training examples: .jsonl(.gz|.zst), .tsv or .csv; qa: SQuAD's .json; tagging: CoNLL
    dev: str = ""  # file of held-out examples
    # cross-validation: that many runs, each with another part of the training file held out; `dev` is not read
    folds: Annotated[int, Field(ge=2)] | None = None
    text_keys: list[str] = ["text"]  # one column, or two for sentence pairs
    label_key: str = "label"
    columns: list[str] = []  # of .tsv and .csv files whose first line does not name them
    run_dir: str
    max_train_examples: PositiveInt | None = None  # the first ones of the shuffled file
    tuning: TuningConfig = TuningConfig()
    answers: AnswersConfig = AnswersConfig()  # qa
    tagging: TaggingConfig = TaggingConfig()
    sweep: SweepConfig | None = None
    generation: GenerationConfig = GenerationConfig()
    log: LogConfig = LogConfig()
    zero: ZeroConfig = ZeroConfig()
    launch: LaunchConfig = LaunchConfig()
    deepspeed: dict[str, Any] = {}

    @model_validator(mode="after")
    def _sizes_agree(self) -> FinetuneConfig:
        if self.tuning.batch_size % self.tuning.micro_batch_size:
            raise ValueError(
                f"tuning.batch_size={self.tuning.batch_size} is not a multiple of "
                f"tuning.micro_batch_size={self.tuning.micro_batch_size}; choose a micro batch that divides it"
            )
        if not 1 <= len(self.text_keys) <= 2:
            raise ValueError(f"text_keys={self.text_keys}: give one column, or two for sentence pairs")
        overlap = self.tuning.window_overlap
        if overlap is not None and len(self.text_keys) == 2:
            raise ValueError("tuning.window_overlap is for single texts; pairs are cut at tuning.max_seq_len")
        if overlap is not None and overlap > self.tuning.max_seq_len // 2:
            raise ValueError(
                f"tuning.window_overlap={overlap} is more than half of tuning.max_seq_len={self.tuning.max_seq_len}; "
                f"lower it, or windows hardly move on"
            )
        if self.from_scratch and self.tuning.lora is not None:
            raise ValueError(
                "from_scratch=true with tuning.lora: the new weights would stay as they were drawn; leave one"
            )
        if self.tuning.class_weights is not None and self.task != "classification":
            raise ValueError(f"tuning.class_weights is for task=classification, found task={self.task}; leave it out")
        room = self.tuning.max_seq_len - self.generation.max_new_tokens
        if self.task == "generation" and room < 1:
            raise ValueError(
                f"generation.max_new_tokens={self.generation.max_new_tokens} leaves no room for a source in "
                f"tuning.max_seq_len={self.tuning.max_seq_len}; raise the latter"
            )
        if not self.tuning.seeds:
            raise ValueError("tuning.seeds=[]: give at least one seed")
        if not self.dev and self.folds is None:
            raise ValueError("dev: give a file of held-out examples, or folds=5 for cross-validation on `train`")
        if self.folds is not None and len(self.tuning.seeds) > 1:
            raise ValueError(f"folds={self.folds} with tuning.seeds={self.tuning.seeds}: give one seed, or no folds")
        if len(set(self.tuning.seeds)) < len(self.tuning.seeds):
            raise ValueError(f"tuning.seeds={self.tuning.seeds}: each seed is one run; give each once")
        for key in ("patience", "metric"):
            if getattr(self.tuning, key) is not None and self.tuning.eval_every is None:
                raise ValueError(f"tuning.{key} is of evaluations meanwhile; set tuning.eval_every too, in steps")
        return self
