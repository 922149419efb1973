"""Every setting of an evaluation in context: a file with the key `tasks` is an `EvaluationConfig`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.schema import PositiveInt, Section

Count = Annotated[int, Field(ge=0)]


class EvaluationTask(Section):
    """One task. In templates, names of columns stand in braces."""

    # choice: the most likely of several options; cloze: is the most likely text the target; perplexity: of whole texts
    type: Literal["choice", "cloze", "perplexity"]
    file: str  # .jsonl(.gz|.zst), .tsv or .csv; perplexity: also .txt, one text
    columns: list[str] = []  # of .tsv and .csv files whose first line does not name them
    train: str | None = None  # file of the same kind, from which examples are drawn for a few-shot prompt
    num_shots: list[Count] = [0]  # one evaluation each
    description: str = ""  # stands once before everything
    separator: str = "\n\n"  # between description, examples and question
    prompt: str = ""  # template of what stands before option or target
    options: list[str] = []  # choice: templates, in the order of `labels`
    options_key: str | None = None  # choice: or the column that holds each example's list of options
    label_key: str = "label"  # choice: the column that says which is right
    labels: list[str] = []  # choice: its values, in the options' order; none: "0", "1", ...
    # choice: a prompt that says nothing, as "Answer:"; scores are then also divided by those behind it (GPT-3)
    unconditional_prompt: str | None = None
    target: str | None = None  # cloze: template
    last_word_of: str | None = None  # cloze: or a column: its last word is the target, all before the prompt (LAMBADA)
    text_key: str = "text"  # perplexity
    stride: PositiveInt | None = None  # perplexity, in tokens: how far a window moves on; none: by its length

    @model_validator(mode="after")
    def _is_complete(self) -> EvaluationTask:
        if self.type == "choice" and bool(self.options) == bool(self.options_key):
            raise ValueError("a choice needs `options`, or `options_key`, the column that holds them")
        if self.type == "choice" and self.labels and self.options and len(self.labels) != len(self.options):
            raise ValueError(f"{len(self.labels)} labels for {len(self.options)} options; give each option its label")
        if self.type == "cloze" and bool(self.target) == bool(self.last_word_of):
            raise ValueError("a cloze needs `target`, a template, or `last_word_of`, a column")
        if self.type == "cloze" and self.last_word_of and self.prompt:
            raise ValueError("with `last_word_of` the text itself is the prompt; leave `prompt` out, or give `target`")
        if any(self.num_shots) and self.train is None:
            raise ValueError(f"num_shots={self.num_shots}: give `train`, the file that examples are drawn from")
        if not self.num_shots:
            raise ValueError("num_shots=[]: give at least one number, 0 for none")
        return self


class EvaluationConfig(Section):
    """What a causal model knows without being trained for it (Radford et al. 2019, Brown et al. 2020)."""

    model: str  # a Hugging Face directory: an export of ours or anybody's
    tasks: dict[str, EvaluationTask]
    run_dir: str
    seed: int = 1  # which examples are shown
    max_examples: PositiveInt | None = None  # of each task, the first ones
    max_seq_len: PositiveInt | None = None  # in tokens; none: the model's positions
    batch_tokens: PositiveInt = 4096  # at once through the model
    precision: Literal["fp32", "bf16"] = "fp32"
