"""Generation end to end on real ranks: a tiny GPT learns to translate word by word; what is cut, and what is scored."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from configs.load import ConfigError
from configs.schema import TokenizerConfig
from configs.tuning import FinetuneConfig
from data_pipeline.shards import DataError
from data_pipeline.tokenizer import make_tokenizer, save_tokenizer
from finetune.lora import merged
from finetune.models import load_tokenizer
from finetune.tasks import IGNORE_INDEX, generation
from finetune.text_metrics import generation_metrics
from tests.ranks import run_ranks

SOURCE = ["sun", "moon", "river", "stone", "bird", "king"]
TARGET = ["soleil", "lune", "fleuve", "pierre", "oiseau", "roi"]


def examples(num: int, seed: int) -> list[dict[str, str]]:
    """Four words, and the same in another language."""
    chosen = np.random.default_rng(seed).integers(0, len(SOURCE), (num, 4))
    return [
        {"text": " ".join(SOURCE[i] for i in row), "target": " ".join(TARGET[i] for i in row)}
        for row in chosen.tolist()
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generation")
    directory = folder / "gpt2"
    directory.mkdir()
    texts = [" ".join(SOURCE + TARGET) + " = " + " ".join(TARGET + SOURCE)] * 5
    tokenizer = make_tokenizer(TokenizerConfig(type="byte_bpe", vocab_size=400), texts, directory)
    save_tokenizer(tokenizer, directory, 64)
    torch.manual_seed(0)
    end = load_tokenizer(str(directory)).eos_token_id
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(),
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        initializer_range=0.1,
        bos_token_id=end,
        eos_token_id=end,
    )
    GPT2LMHeadModel(config).save_pretrained(directory)
    long = " ".join(SOURCE * 10)
    odd = [{"text": long, "target": "roi"}, {"text": "sun", "target": long}]  # one is cut, one left out
    for name, rows in (("train", examples(601, 601) + odd), ("dev", examples(27, 27))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(folder: Path, **more) -> dict:
    tuning = {"num_epochs": 5, "batch_size": 16, "micro_batch_size": 8, "max_seq_len": 32, "precision": "fp32"}
    tuning |= {"dropout": 0.0, "optimizer": {"lr": 1e-2}} | more.pop("tuning", {})
    decoding = {"prompt": "{text} =", "max_new_tokens": 12, "metrics": ["exact_match", "bleu", "chrf", "rouge"]}
    return {
        "task": "generation",
        "model": str(folder / "gpt2"),
        "train": str(folder / "train.jsonl"),
        "dev": str(folder / "dev.jsonl"),
        "label_key": "target",
        "run_dir": str(folder / "run"),
        "log": {"tensorboard": False},
        "tuning": tuning,
        "generation": decoding | more.pop("generation", {}),
        **more,
    }


def config_of(folder: Path, **more) -> FinetuneConfig:
    return FinetuneConfig.model_validate(settings(folder, **more))


def run(folder: Path, name: str, num_ranks: int, **more) -> Path:
    (folder / f"{name}.yaml").write_text(json.dumps(settings(folder, run_dir=str(folder / name), **more)))
    run_ranks(num_ranks, ["-m", "finetune.run", "--config", str(folder / f"{name}.yaml")], folder / f"{name}-logs")
    return folder / name


def rows_of(folder: Path, texts: list[tuple[str, str]], **more) -> list[dict]:
    config = config_of(folder, **more)
    split = generation.Split([(text,) for text, _ in texts], [target for _, target in texts], ["here"] * len(texts))
    return generation.encode(config, load_tokenizer(config.model), split)


def padded(rows: list[dict]) -> dict[str, torch.Tensor]:
    """The batch that the loop makes: padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)
    padding = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE_INDEX}
    batch = {
        name: torch.tensor([r[name] + [fill] * (longest - len(r[name])) for r in rows])
        for name, fill in padding.items()
    }
    return batch | {"prompt_length": torch.tensor([row["prompt_length"] for row in rows])}


def needs_scorers() -> None:
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed (extra generation)")
    pytest.importorskip("rouge_score", reason="rouge-score is not installed (extra generation)")


@pytest.fixture(scope="module")
def learnt(folder) -> Path:
    """A run of two ranks under ZeRO-3, which generate texts of different lengths."""
    needs_scorers()
    return run(folder, "learnt", 2)


@pytest.mark.distributed
def test_it_learns_on_two_ranks(learnt):
    results = json.loads((learnt / "results.json").read_text())
    assert results["exact_match"]["mean"] > 80  # by chance 1 in 1296
    assert results["bleu"]["mean"] > 80 and results["chrf"]["mean"] > 80 and results["rougeL"]["mean"] > 80
    assert len((learnt / "predictions.jsonl").read_text().splitlines()) == 27


@pytest.mark.distributed
def test_it_says_what_was_cut_and_what_left_out(learnt):
    log = (learnt.parent / "learnt-logs/rank-0.log").read_text()
    assert "train: 1 of 603 sources cut" in log and "train: 1 of 603 examples left out" in log


@pytest.mark.distributed
def test_transformers_generates_the_same_texts_from_the_saved_model(learnt):
    model = AutoModelForCausalLM.from_pretrained(learnt / "model")
    tokenizer = AutoTokenizer.from_pretrained(learnt / "model")
    lines = [json.loads(line) for line in (learnt / "predictions.jsonl").open()]
    for line in lines:  # one by one, so without padding; how to decode stands in generation_config.json
        prompt = tokenizer(line["text"] + " =", return_tensors="pt")
        ids = model.generate(**prompt)[0, prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == line["prediction"]


def test_an_untrained_model_answers_nothing_right(folder):
    config = config_of(folder, generation={"metrics": ["exact_match"]})
    found, tokenizer = generation.load(config), load_tokenizer(config.model)
    rows = generation.encode(config, tokenizer, found.dev)
    model = generation.build_model(config, found, tokenizer).eval()
    assert generation.evaluate(config, found.dev, rows, generation.predict(model, padded(rows))) == {"exact_match": 0}


def test_the_loss_is_that_of_transformers_with_other_labels_ignored(folder):
    rows = rows_of(folder, [("sun", "soleil"), ("king moon river", "roi lune"), ("bird", "oiseau roi pierre")])
    batch = padded(rows)
    model = GPT2LMHeadModel.from_pretrained(folder / "gpt2").eval()
    num_targets = sum(label != IGNORE_INDEX for row in rows for label in row["labels"])
    mean = model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    torch.testing.assert_close(generation.loss(model, batch), mean * num_targets)
    assert num_targets < batch["attention_mask"].sum() / 2 + len(rows) * 3


def test_a_row_is_prompt_target_and_end_and_the_last_two_are_learnt(folder):
    tokenizer = load_tokenizer(str(folder / "gpt2"))
    (row,) = rows_of(folder, [("sun moon", "soleil lune")])
    assert tokenizer.decode(row["input_ids"]) == f"sun moon = soleil lune{tokenizer.eos_token}"
    learnt = [label for label in row["labels"] if label != IGNORE_INDEX]
    assert tokenizer.decode(learnt) == f" soleil lune{tokenizer.eos_token}"
    assert row["input_ids"][row["prompt_length"] :] == learnt


@pytest.mark.parametrize("decoding", [{}, {"num_beams": 3, "length_penalty": 0.5}, {"no_repeat_ngram_size": 2}])
def test_padding_does_not_change_what_is_generated(folder, decoding):
    config = config_of(folder, generation={"metrics": ["exact_match"]} | decoding)
    model = generation.build_model(config, generation.load(config), load_tokenizer(config.model)).eval()
    rows = rows_of(folder, [("sun", "x"), ("king moon river bird stone king", "y"), ("bird sun", "z")])
    together = generation.predict(model, padded(rows))
    for row, ids in zip(rows, together, strict=True):
        prompt = torch.tensor([row["input_ids"][: row["prompt_length"]]])
        end = model.generation_config.eos_token_id
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt))[0, prompt.shape[1] :].tolist()
        assert ids.tolist() == (alone[: alone.index(end)] if end in alone else alone)


def test_lora_generates_as_told_and_so_does_what_it_is_merged_into(folder):
    pytest.importorskip("peft", reason="peft is not installed (extra lora)")
    config = config_of(
        folder, tuning={"lora": {"rank": 2}}, generation={"max_new_tokens": 5, "metrics": ["exact_match"]}
    )
    torch.manual_seed(0)
    model = generation.build_model(config, generation.load(config), load_tokenizer(config.model)).eval()
    batch = padded(rows_of(folder, [("sun moon", "x")]))
    (ids,) = generation.predict(model, batch)
    whole = merged(
        model, {name: weight.detach().clone() for name, weight in model.named_parameters()}, folder / "adapter"
    )
    assert whole.generation_config.max_new_tokens == 5 and len(ids) <= 5
    assert generation.predict(whole.eval(), batch)[0].tolist() == ids.tolist()


def test_sampling_follows_the_seed(folder):
    sampled = {"temperature": 1.0, "top_p": 0.9, "metrics": ["exact_match"]}
    config = config_of(folder, generation=sampled)
    model = generation.build_model(config, generation.load(config), load_tokenizer(config.model)).eval()
    batch = padded(rows_of(folder, [("sun moon", "x")]))
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(generation.predict(model, batch)[0].tolist())
    assert texts[0] == texts[1] != texts[2]


def test_only_the_source_is_cut(folder):
    tokenizer = load_tokenizer(str(folder / "gpt2"))
    long, target = " ".join(SOURCE * 8), "roi lune roi lune"
    decoding = {"prompt": "moon: {text} =", "max_new_tokens": 12}
    (row,) = rows_of(folder, [(long, target)], generation=decoding)
    text = tokenizer.decode(row["input_ids"])
    head, _, tail = text.partition(" =")
    assert head.startswith("moon: sun moon river") and long.startswith(head.removeprefix("moon: ").rstrip())
    assert tail == f" {target}{tokenizer.eos_token}"
    assert 18 <= row["prompt_length"] <= 20 and row["cut"] > 20  # of the 32 - 12 tokens that there are


def test_an_example_whose_target_does_not_fit_has_nothing_to_learn(folder):
    (row,) = rows_of(folder, [("sun", " ".join(TARGET * 10))])
    assert set(row["labels"]) == {IGNORE_INDEX} and len(row["input_ids"]) == row["prompt_length"]


def test_a_prompt_that_fits_without_no_source_is_refused(folder):
    with pytest.raises(DataError, match=r"here: its prompt without `text` is longer than .* = 20 tokens"):
        rows_of(folder, [("sun", "roi")], generation={"prompt": "moon " * 30 + "{text}"})


def test_two_columns_make_an_instruction_with_input(folder):
    rows = [{"instruction": "translate", "input": "{sun}", "target": "soleil"}]  # braces in a text are text
    (folder / "pairs.jsonl").write_text(json.dumps(rows[0]))
    config = config_of(
        folder,
        train=str(folder / "pairs.jsonl"),
        dev=str(folder / "pairs.jsonl"),
        text_keys=["instruction", "input"],
        generation={"prompt": "{instruction}: {input}\n", "metrics": ["exact_match"]},
    )
    tokenizer = load_tokenizer(config.model)
    (row,) = generation.encode(config, tokenizer, generation.load(config).train)
    assert tokenizer.decode(row["input_ids"]) == f"translate: {{sun}}\nsoleil{tokenizer.eos_token}"


def test_what_cannot_serve_is_named(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"\{words\} is none of text_keys=\['text'\]"):
        generation.load(config_of(folder, generation={"prompt": "{words} ="}))
    with pytest.raises(ConfigError, match=r"has no \{text\}"):
        generation.load(config_of(folder, generation={"prompt": "nothing"}))
    with pytest.raises(ConfigError, match=r"max_seq_len=128 is more than the 64 positions"):
        generation.load(config_of(folder, tuning={"max_seq_len": 128}))
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertForMaskedLM(BertConfig(vocab_size=50, **small)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is BertForMaskedLM; expected a causal model"):
        generation.load(config_of(folder, model=str(tmp_path)))


def test_a_metric_without_its_package_says_what_to_install(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"rouge needs the package rouge_score.*pip install 'millstream\[gen"):
        generation.load(config_of(folder, generation={"metrics": ["rouge"]}))


def test_scores_are_those_of_the_official_command_lines(tmp_path):
    needs_scorers()
    targets = ["the cat sat on the mat .", "it is raining again , they said", "Two men are playing chess", "ça va ?"]
    predictions = ["a cat sat on a mat", "it rains again , they say .", "Two men play chess in a park", "ça va bien ?"]
    (tmp_path / "targets").write_text("\n".join(targets) + "\n")
    (tmp_path / "predictions").write_text("\n".join(predictions) + "\n")
    ours = generation_metrics(["bleu", "chrf", "rouge"], targets, predictions)

    def command(*words: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", *words], cwd=tmp_path, check=True, capture_output=True
        ).stdout.decode()

    for metric in ("bleu", "chrf"):
        score = command("sacrebleu", "targets", "-i", "predictions", "-m", metric, "-b", "-w", "8")
        assert ours[metric] == pytest.approx(float(score), abs=1e-7)
    files = ["--target_filepattern=targets", "--prediction_filepattern=predictions", "--output_filename=scores.csv"]
    kinds = ["rouge1", "rouge2", "rougeL"]
    command("rouge_score.rouge", *files, f"--rouge_types={','.join(kinds)}", "--use_stemmer", "--noaggregate")
    with (tmp_path / "scores.csv").open() as file:
        scores = list(csv.DictReader(file))
    for kind in kinds:
        mean = np.mean([float(row[f"{kind}-F"]) for row in scores])
        assert ours[kind] == pytest.approx(100 * mean, abs=1e-4)  # the file has six digits
