"""Evaluation in context: prompts, likelihoods, windows; the numbers of a slow obvious way and of lm-eval's harness."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from configs.evaluation import EvaluationConfig, EvaluationTask
from configs.load import ConfigError, load_as, load_finetune
from configs.schema import TokenizerConfig
from data_pipeline.shards import DataError
from data_pipeline.tokenizer import make_tokenizer, save_tokenizer
from finetune import evaluation
from finetune.in_context import Asked, Question, ask, evaluate_choice, evaluate_cloze, read_questions
from finetune.likelihoods import Request, Score, Scorer, load_scorer, windows
from finetune.models import load_tokenizer
from launcher.harness import harness_words
from tests.conftest import ROOT

WORDS = "sun moon river stone bird king queen hill sea good nice fine bad sad poor".split()  # noqa: SIM905


def sentences(num: int, seed: int) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [
        {"text": " ".join(rng.choice(WORDS, rng.integers(3, 9))), "label": int(rng.integers(2))} for _ in range(num)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny random GPT-2 in Hugging Face layout, files of examples, and a text."""
    folder = tmp_path_factory.mktemp("evaluation")
    directory = folder / "gpt2"
    directory.mkdir()
    tokenizer = make_tokenizer(TokenizerConfig(type="byte_bpe", vocab_size=350), [" ".join(WORDS)] * 5, directory)
    save_tokenizer(tokenizer, directory, 64)
    torch.manual_seed(0)
    end = load_tokenizer(str(directory)).eos_token_id
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.2}
    config = GPT2Config(vocab_size=tokenizer.get_vocab_size(), bos_token_id=end, eos_token_id=end, **sizes)
    GPT2LMHeadModel(config).save_pretrained(directory)
    for name, num in (("train", 20), ("dev", 12)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sentences(num, num)))
    (folder / "text.txt").write_text("\n".join(row["text"] for row in sentences(40, 5)) + "\n", encoding="utf-8")
    return folder


def choice(folder: Path, **more) -> dict:
    return {
        "type": "choice",
        "file": str(folder / "dev.jsonl"),
        "prompt": "{text} is",
        "options": ["bad", "good sea"],
    } | more


def config_of(folder: Path, **tasks) -> EvaluationConfig:
    values = {"model": str(folder / "gpt2"), "run_dir": str(folder / "run"), "tasks": tasks}
    return EvaluationConfig.model_validate(values)


@pytest.fixture(scope="module")
def scorer(folder) -> Scorer:
    return load_scorer(str(folder / "gpt2"), None, 256, "fp32")


@torch.no_grad()
def slow_score(scorer: Scorer, context: list[int], continuation: list[int]) -> float:
    """One request alone, token by token."""
    total = 0.0
    for number, token in enumerate(continuation):
        seen = [*context, *continuation[:number]]
        logits = scorer.model(torch.tensor([seen])).logits[0, -1]
        total += logits.log_softmax(-1)[token].item()
    return total


def test_batches_score_as_one_token_after_the_other(scorer):
    rng = np.random.default_rng(1)
    requests = [
        Request(rng.integers(0, 300, rng.integers(1, 30)).tolist(), rng.integers(0, 300, rng.integers(1, 9)).tolist())
        for _ in range(23)
    ]
    scores = scorer(requests)
    for one, score in zip(requests, scores, strict=True):
        assert score.log_likelihood == pytest.approx(slow_score(scorer, one.context, one.continuation), abs=1e-4)
        assert score.num_tokens == len(one.continuation)


def test_the_greedy_continuation_is_known(scorer):
    ids = torch.tensor([[5, 6, 7]])
    best = scorer.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    best = best[0, 3:].tolist()
    right, wrong = scorer([Request([5, 6, 7], best), Request([5, 6, 7], [*best[:3], (best[3] + 1) % 300])])
    assert right.is_greedy and not wrong.is_greedy


def test_a_context_that_is_too_long_loses_its_beginning(scorer):
    ids = np.random.default_rng(2).integers(0, 300, 100).tolist()
    whole, cut = scorer([Request(ids, [7, 8]), Request(ids[-63:], [7, 8])])
    assert whole.log_likelihood == pytest.approx(cut.log_likelihood, abs=1e-5)


@pytest.mark.parametrize("num_ids", [1, 9, 10, 11, 37])
@pytest.mark.parametrize("stride", [1, 3, 10])
def test_windows_score_every_token_once_with_all_the_context_there_is_room_for(num_ids, stride):
    ids = list(range(1, num_ids + 1))
    found = list(windows(ids, 0, 10, stride))
    assert [token for one in found for token in one.continuation] == ids
    for one in found[1:]:
        assert len(one.context) + len(one.continuation) - 1 == 10 and len(one.continuation) <= stride
        assert one.context[-1] + 1 == one.continuation[0]


def test_examples_are_drawn_by_the_seed_and_stand_before_the_question(folder, scorer):
    tokenizer = load_tokenizer(str(folder / "gpt2"))
    task = EvaluationTask.model_validate(
        choice(folder, train=str(folder / "train.jsonl"), num_shots=[2], description="Say it.", separator="\n")
    )
    config = config_of(folder, one=task)
    questions, shown = (read_questions(task, file) for file in (task.file, task.train))
    first, again = (ask(config, task, 2, questions, shown, tokenizer, scorer) for _ in range(2))
    assert [one.prompt for one in first] == [one.prompt for one in again]
    other = ask(config.model_copy(update={"seed": 2}), task, 2, questions, shown, tokenizer, scorer)
    assert [one.prompt for one in first] != [one.prompt for one in other]
    solved = {question.solved for question in shown}
    for one, question in zip(first, questions, strict=True):
        head, *examples, last = one.prompt.split("\n")
        assert head == "Say it." and last == question.prompt and one.num_shots == len(examples) <= 2
        assert set(examples) <= solved and len(set(examples)) == len(examples)
    assert any(one.num_shots == 2 for one in first)
    assert len({one.prompt.split("\n")[1] for one in first}) > 1  # each question has its own


def test_fewer_examples_are_shown_where_not_all_fit(folder, scorer):
    task = EvaluationTask.model_validate(choice(folder, train=str(folder / "train.jsonl"), num_shots=[15]))
    questions, shown = (read_questions(task, file) for file in (task.file, task.train))
    tokenizer = load_tokenizer(str(folder / "gpt2"))
    asked = ask(config_of(folder, one=task), task, 15, questions, shown, tokenizer, scorer)
    for one in asked:
        assert 0 < one.num_shots < 15 and one.prompt.endswith(one.question.prompt)
        assert len(tokenizer(one.prompt + " good sea")["input_ids"]) <= 64


def test_no_question_is_its_own_example(folder, scorer):
    task = EvaluationTask.model_validate(choice(folder, train=str(folder / "dev.jsonl"), num_shots=[1]))
    questions = read_questions(task, task.file)
    tokenizer = load_tokenizer(str(folder / "gpt2"))
    for seed in range(5):
        config = config_of(folder, one=task).model_copy(update={"seed": seed})
        for one in ask(config, task, 1, questions, questions, tokenizer, scorer):
            assert one.prompt.count(one.question.prompt) == 1


def test_options_are_ranked_by_sum_by_token_by_character_and_over_the_unconditional():
    def asked(sums: list[float], tokens: list[int], without: list[float]) -> Asked:
        scores, others = (
            [Score(v, False, n) for v, n in zip(values, tokens, strict=True)] for values in (sums, without)
        )
        return Asked(Question("p", ["a", "bbbb"], 1), "p", 0, list(scores), list(others))

    metrics = evaluate_choice([asked([-2.0, -3.0], [1, 2], [-1.0, -3.0]), asked([-1.0, -4.5], [1, 4], [-1.0, -4.4])])
    assert metrics["accuracy"] == 0.0
    assert metrics["accuracy_per_token"] == 0.5  # -2 < -1.5, -1 > -1.125
    assert metrics["accuracy_per_character"] == 0.5  # -2 < -0.75, -1 > -1.125
    assert metrics["accuracy_unconditional"] == 0.5  # -1 < 0, 0 > -0.1
    assert metrics["majority"] == 1.0 and metrics["num_examples"] == 2


def test_the_last_word_is_right_when_all_of_its_tokens_are_the_most_probable():
    def asked(log_likelihood: float, is_greedy: bool) -> Asked:
        return Asked(Question("so said the", ["king"], 0), "so said the", 0, [Score(log_likelihood, is_greedy, 2)], [])

    metrics = evaluate_cloze([asked(-1.0, True), asked(-3.0, False)])
    assert metrics["accuracy"] == 0.5 and metrics["target_perplexity"] == pytest.approx(math.exp(2))
    assert metrics["accuracy_stderr"] == pytest.approx(0.5)


def test_a_text_without_its_last_word_is_the_prompt(tmp_path):
    (tmp_path / "lambada.jsonl").write_text(json.dumps({"text": "so said the king "}))
    task = EvaluationTask(type="cloze", file=str(tmp_path / "lambada.jsonl"), last_word_of="text")
    assert read_questions(task, task.file) == [Question("so said the", ["king"], 0)]


def test_options_may_stand_in_a_column_and_labels_may_have_names(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"q": "2+2?", "choices": ["3", "4", "5"], "answer": "B"}))
    task = EvaluationTask(
        type="choice",
        file=str(tmp_path / "a.jsonl"),
        prompt="{q}",
        options_key="choices",
        label_key="answer",
        labels=["A", "B", "C", "D"],
    )
    assert read_questions(task, task.file) == [Question("2+2?", ["3", "4", "5"], 1)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": "{words}"}, r"dev.jsonl:1: has no `words` \(found: text, label\)"),
        ({"labels": ["no", "yes"]}, r"dev.jsonl:1: `label` is '\d', expected one of \['no', 'yes'\]"),
        ({"options": [], "options_key": "text"}, r"dev.jsonl:1: `text` is '.*', expected a list of two options"),
    ],
)
def test_faults_of_examples_are_named(folder, wrong, message):
    task = EvaluationTask.model_validate(choice(folder, **wrong))
    with pytest.raises(DataError, match=message):
        read_questions(task, task.file)


@pytest.mark.parametrize("file", sorted((ROOT / "configs/in_context").glob("*.yaml")), ids=lambda file: file.name)
def test_shipped_configurations_load_and_say_what_to_expect(file):
    assert load_as(EvaluationConfig, file).tasks
    head = file.read_text().partition("\nmodel:")[0]
    assert "Cost:" in head and "Expected:" in head and f"millstream evaluate configs/in_context/{file.name}" in head


def test_faults_of_the_configuration_are_named(folder, tmp_path):
    file = tmp_path / "evaluation.yaml"
    file.write_text(json.dumps({"model": "m", "run_dir": "r", "tasks": {"a": choice(folder, num_shots=[3])}}))
    with pytest.raises(ConfigError, match=r"num_shots=\[3\]: give `train`"):
        load_as(EvaluationConfig, file)
    with pytest.raises(ConfigError, match=r"describes an evaluation; use `millstream evaluate"):
        load_finetune(file)


def test_a_run_dir_that_cannot_be_written_is_named(folder, tmp_path):
    (tmp_path / "file").write_text("")
    config = config_of(folder, one=choice(folder)).model_copy(update={"run_dir": str(tmp_path / "file/run")})
    with pytest.raises(ConfigError, match=r"file/run: cannot be written .*; choose a directory"):
        evaluation.evaluate(config)


def test_the_harness_gets_the_directory_and_all_options(folder):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra harness)")
    model = str(folder / "gpt2")
    found = harness_words(model, ["--tasks", "lambada", "--model_args", "dtype=float32", "--limit", "5"])
    arguments = f"pretrained={model},dtype=float32"
    assert found == ["run", "--model", "hf", "--model_args", arguments, "--tasks", "lambada", "--limit", "5"]
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        harness_words(str(folder), ["--tasks", "lambada"])


@pytest.mark.slow
def test_log_likelihoods_are_those_of_the_harness(folder):
    """Both commands on one choice, one cloze and one text; the harness from local task files, offline."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra harness)")
    tasks = {
        "choice": choice(folder),
        "cloze": {"type": "cloze", "file": str(folder / "dev.jsonl"), "last_word_of": "text"},
        "text": {"type": "perplexity", "file": str(folder / "texts.jsonl")},
    }
    text = (folder / "text.txt").read_text()
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in (text, text[: len(text) // 3])))
    ours = {"model": str(folder / "gpt2"), "run_dir": str(folder / "ours"), "tasks": tasks}
    (folder / "ours.yaml").write_text(json.dumps(ours))
    common = {"dataset_path": "json", "test_split": "test"}
    splits = {"data_files": {"test": str(folder / "dev.jsonl")}}
    theirs = {
        "choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}} is",
            "doc_to_target": "{{label}}",
            "doc_to_choice": ["bad", "good sea"],
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "cloze": {
            "output_type": "loglikelihood",
            "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' '+text.split(' ')[-1]}}",
            "metric_list": [{"metric": "acc"}],
        },
        "text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
        },
    }
    (folder / "tasks").mkdir()
    for name, task in theirs.items():
        files = {"data_files": {"test": str(folder / "texts.jsonl")}} if name == "text" else splits
        local = {"task": f"local_{name}", **common, "dataset_kwargs": files, **task}
        (folder / "tasks" / f"{name}.yaml").write_text(json.dumps(local))
    names = ",".join(f"local_{name}" for name in theirs)
    command(folder, "evaluate", str(folder / "ours.yaml"))
    command(
        folder,
        *("lm-eval", str(folder / "gpt2"), "--tasks", names, "--include_path", str(folder / "tasks")),
        *("--output_path", str(folder / "theirs"), "--log_samples", "--batch_size", "4"),
    )
    (file,) = (folder / "theirs").rglob("results_*.json")
    of_harness = json.loads(file.read_text())["results"]
    of_ours = {
        name: one["0-shot"] for name, one in json.loads((folder / "ours/results.json").read_text())["tasks"].items()
    }
    assert of_ours["choice"]["accuracy"] == of_harness["local_choice"]["acc,none"]
    assert of_ours["choice"]["accuracy_per_character"] == of_harness["local_choice"]["acc_norm,none"]
    assert of_ours["choice"]["accuracy_stderr"] == pytest.approx(of_harness["local_choice"]["acc_stderr,none"])
    assert of_ours["cloze"]["accuracy"] == of_harness["local_cloze"]["acc,none"]
    for ours_name, theirs_name in (("byte_perplexity", "byte_perplexity"), ("bits_per_byte", "bits_per_byte")):
        assert of_ours["text"][ours_name] == pytest.approx(of_harness["local_text"][f"{theirs_name},none"], rel=1e-5)
    for name in ("choice", "cloze"):
        (file,) = (folder / "theirs").rglob(f"samples_local_{name}_*.jsonl")
        samples = sorted((json.loads(line) for line in file.open()), key=lambda sample: sample["doc_id"])
        lines = [json.loads(line) for line in (folder / f"ours/{name}.0-shot.jsonl").open()]
        for sample, line in zip(samples, lines, strict=True):
            values = [float(answer[0][0]) for answer in sample["resps"]]
            mine = line["log_likelihoods"] if name == "choice" else [line["log_likelihood"]]
            np.testing.assert_allclose(mine, values, atol=2e-4)


def command(folder: Path, *words: str) -> None:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "launcher.cli", *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
