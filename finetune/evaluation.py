"""In-context evaluation: `millstream evaluate CONFIG [key=value ...]`, in one process, on its GPU where it has one.

Writes results.json and, for each task and number of shots, a file of predictions.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from configs.evaluation import EvaluationConfig, EvaluationTask
from configs.load import ConfigError, dump, load_as
from data_pipeline.shards import DataError
from data_pipeline.sources import open_bytes
from finetune.in_context import ask, evaluate_choice, evaluate_cloze, read_questions, record_of
from finetune.likelihoods import Scorer, begin_of_text, load_scorer, perplexities, windows
from finetune.models import check_directory, load_tokenizer
from finetune.texts import read_records


def main(words: list[str]) -> int:
    try:
        if not words:
            raise ConfigError("millstream evaluate: expected a configuration file")
        evaluate(load_as(EvaluationConfig, words[0], words[1:]))
    except (ConfigError, DataError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def evaluate(config: EvaluationConfig) -> None:
    """All tasks, one after the other; a result is printed as soon as it is there."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    check_directory(config.model)
    questions = {name: read_questions(t, t.file) for name, t in config.tasks.items() if t.type != "perplexity"}
    run_dir = Path(config.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(dump(config), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"run_dir={run_dir}: cannot be written ({error}); choose a directory you can write to"
        ) from None
    tokenizer = load_tokenizer(config.model)
    scorer = load_scorer(config.model, config.max_seq_len, config.batch_tokens, config.precision)
    results: dict[str, Any] = {}
    for name, task in config.tasks.items():
        results[name] = {}
        for num_shots in task.num_shots if task.type != "perplexity" else [0]:
            if task.type == "perplexity":
                metrics = evaluate_perplexity(config, task, tokenizer, scorer)
            else:
                shown = read_questions(task, task.train) if task.train and num_shots else []
                asked = ask(config, task, num_shots, questions[name][: config.max_examples], shown, tokenizer, scorer)
                metrics = evaluate_choice(asked) if task.type == "choice" else evaluate_cloze(asked)
                lines = [json.dumps(record_of(task, one), ensure_ascii=False) + "\n" for one in asked]
                (run_dir / f"{name}.{num_shots}-shot.jsonl").write_text("".join(lines), encoding="utf-8")
            results[name][f"{num_shots}-shot"] = metrics
            shown_as = ", ".join(f"{key} {value:.4g}" for key, value in metrics.items())
            print(f"{name}, {num_shots}-shot: {shown_as}", flush=True)
    summary = {"model": config.model, "seed": config.seed, "tasks": results}
    (run_dir / "results.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")


def evaluate_perplexity(
    config: EvaluationConfig, task: EvaluationTask, tokenizer: PreTrainedTokenizerBase, scorer: Scorer
) -> dict[str, float]:
    """Of all texts of a file, each behind the token that texts begin with."""
    begin = begin_of_text(tokenizer, config.model)
    stride = min(task.stride or scorer.max_seq_len, scorer.max_seq_len)
    total, num_tokens, num_words, num_bytes = 0.0, 0, 0, 0
    for number, text in enumerate(read_texts(task)):
        if number == config.max_examples:
            break
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        scores = scorer(list(windows(ids, begin, scorer.max_seq_len, stride)))
        total += sum(score.log_likelihood for score in scores)
        num_tokens, num_words = num_tokens + len(ids), num_words + len(text.split())
        num_bytes += len(text.encode())
    if not num_tokens:
        raise DataError(f"{task.file}: has no text")
    return perplexities(total, num_tokens, num_words, num_bytes)


def read_texts(task: EvaluationTask) -> Iterator[str]:
    """The whole of a .txt(.gz|.zst), or the column `text_key` of every record of another file."""
    if ".txt" in Path(task.file).name:
        if not Path(task.file).is_file():
            raise DataError(f"{task.file}: no such file")
        with open_bytes(task.file) as file:
            try:
                yield file.read().decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{task.file}: is not UTF-8 (byte {error.start}); convert it") from None
        return
    for record, place in read_records(Path(task.file), task.columns):
        if not isinstance(record.get(task.text_key), str):
            raise DataError(f"{place}: has no text `{task.text_key}` (found: {', '.join(record)}); set text_key")
        yield record[task.text_key]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
