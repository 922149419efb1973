"""What is looked at before the first step: every check passes for every objective, and finds its fault."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from configs.load import ConfigError, load_pretrain
from configs.schema import PretrainConfig, TokenizerConfig
from data_pipeline.mask import IGNORE_INDEX
from data_pipeline.shards import open_dataset, read_manifest, write_manifest
from data_pipeline.stream import open_stream
from data_pipeline.tokenizer import make_tokenizer, save_tokenizer
from pretrain import sanity
from pretrain.kernels.attention import sequence_blocks
from pretrain.models import bert, build_model, gpt
from pretrain.objective import count_targets, mean_losses
from pretrain.runtime import Runtime
from tests.conftest import ROOT
from tests.data_pipeline.token_datasets import bert_config, fim_config

SMALL = {"num_layers": 2, "hidden_size": 32, "num_heads": 2}
GPT = [
    {},
    {"packing": "best_fit"},
    {"fim": {"probability": 0.9}},
    {"fim": {"probability": 0.5, "spm_share": 0}, "packing": "best_fit"},
]
BERT = [
    {},
    {"unpad": True, "masking": {"short_probability": 0.5}},
    {"masking": {"pairs": "sop"}},
    {"masking": {"pairs": "none", "unit": "span"}},
    {"masking": {"unit": "word", "mask_share": 1.0, "random_share": 0.0}},
]
CASES = [("gpt", data) for data in GPT] + [("bert", data) for data in BERT]
SHIPPED = sorted([*ROOT.glob("configs/gpt/*.yaml"), *ROOT.glob("configs/bert/*.yaml")])


class Alone(Runtime):
    """The only rank, without a process group."""

    def sum(self, values):
        return values

    def gather(self, value):
        return [value]

    def any(self, *flags):
        return list(flags)


ALONE = Alone(0, 1, 0, torch.device("cpu"))


class Bare(torch.nn.Module):
    """What is asked of an engine."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *arguments, **inputs):
        return self.module(*arguments, **inputs)


def configuration(folder: Path, architecture: str, data: dict) -> PretrainConfig:
    """With a dataset, and micro batches that hold enough targets for a share."""
    if architecture == "gpt":
        config = fim_config(folder, {"fim": {}} | data, {"micro_batch_size": 24})
    else:
        config = bert_config(folder, data, {"micro_batch_size": 48, "global_batch_size": 48})
    shape = config.model.model_copy(update={"architecture": architecture} | SMALL)
    return config.model_copy(update={"model": shape})


def opened(config: PretrainConfig):
    """The untrained model and both splits."""
    data, validation = open_stream(config, "train"), open_stream(config, "validation")
    torch.manual_seed(0)
    return Bare(build_model(config.model, data.vocab_size, config.train.seq_len)), data, validation


def check(config: PretrainConfig, model, data, validation, step: int = 0, ranks: Alone = ALONE) -> None:
    try:
        sanity.check_start(config, model, data, validation, step, ranks)
    finally:
        data.close()
        validation.close()


@torch.no_grad()
def first_line(model, validation) -> dict[str, float]:
    totals, counts = Counter(), Counter()
    for made in validation.eval_batches(0, 48, 0, 1):
        batch = validation.expand(made)
        totals.update({name: loss.item() for name, loss in model(**batch).items()})
        counts.update(count_targets([batch]))
    return {f"eval_{name}": loss for name, loss in mean_losses(totals, counts).items()}


def test_run_that_is_finished_is_checked_as_at_its_last_step_and_named_by_its_own(tmp_path):
    config = configuration(tmp_path, *CASES[0])
    marks: list[tuple[str, int]] = []
    ranks = dataclasses.replace(ALONE, mark=lambda phase, step: marks.append((phase, step)))
    check(config, *opened(config), step=config.train.num_steps, ranks=ranks)
    assert marks == [("data", config.train.num_steps), ("start", config.train.num_steps)]


@pytest.mark.parametrize(("architecture", "data"), CASES)
def test_every_objective_passes_before_the_first_step_and_at_a_resume(tmp_path, architecture, data):
    config = configuration(tmp_path, architecture, data)
    model, train, validation = opened(config)
    sanity.check_first_loss(model, first_line(model, validation))
    check(config, model, train, validation, step=5)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_objectives_of_the_shipped_configurations_pass(tmp_path, file):
    shipped = load_pretrain(str(file), [])
    config = configuration(tmp_path, shipped.model.architecture, {})
    data = shipped.data.model_copy(update={"dir": str(tmp_path)})
    dropout = {"dropout": shipped.model.dropout, "attention_dropout": shipped.model.attention_dropout}
    config = config.model_copy(update={"data": data, "model": config.model.model_copy(update=dropout)})
    model, train, validation = opened(config)
    sanity.check_first_loss(model, first_line(model.eval(), validation))
    check(config, model, train, validation)


def test_expected_first_loss_is_that_of_a_random_output_layer_of_any_width():
    torch.manual_seed(0)
    for hidden_size, init_std in ((64, 0.02), (128, 0.05), (768, 0.02), (4096, 0.02)):
        hidden = F.layer_norm(torch.randn(2000, hidden_size), (hidden_size,))
        logits = hidden @ (init_std * torch.randn(500, hidden_size)).t()
        loss = F.cross_entropy(logits, torch.randint(500, (2000,))).item()
        expected, tolerance = sanity.expected_loss(500, hidden_size, init_std)
        assert loss == pytest.approx(expected, abs=0.06)
        assert tolerance < 2
    assert expected > math.log(500) + 0.8  # what would look like a fault against ln V alone


def test_first_loss_too_low_too_high_or_not_a_number_is_named_with_what_was_expected():
    def problems(**line):
        return sanity.first_loss_problems(line, 4096, 128, 0.02)

    assert not problems(eval_loss=8.34) and not problems(eval_loss=9.0, eval_loss_mlm=8.34, eval_loss_nsp=0.7)
    assert "is 6.900, expected 8.34 +- 0.73" in problems(eval_loss=6.9)[0] and "far below" in problems(eval_loss=6.9)[0]
    assert "far above, as if its first weights are too large" in problems(eval_loss=12.0)[0]
    assert "is nan" in problems(eval_loss=math.nan)[0]
    assert "eval_loss_nsp of the untrained model is 1.400" in problems(eval_loss_mlm=8.4, eval_loss_nsp=1.4)[0]


def test_model_that_copies_its_targets_from_the_input_is_seen_by_its_first_loss(tmp_path):
    config = configuration(tmp_path, "bert", {"masking": {"mask_share": 0, "random_share": 0}})
    model, train, validation = opened(config)
    with torch.no_grad():  # nothing but the embedding reaches the output layer, which is the embedding
        for block in model.module.blocks:
            block.attention.output.weight.zero_()
            block.mlp.down.weight.zero_()
        model.module.mlm_transform.weight.copy_(torch.eye(32))
        model.module.position_embeddings.weight.zero_()
        model.module.token_type_embeddings.weight.zero_()
    with pytest.raises(ConfigError, match="far below, as if what it should predict can be read from the input"):
        sanity.check_first_loss(model, first_line(model, validation))
    train.close()


def test_one_layer_without_causality_is_found(tmp_path):
    config = configuration(tmp_path, "gpt", {})
    model, train, validation = opened(config)
    model.module.blocks[1].attention.causal = False
    with pytest.raises(ConfigError, match="a token is seen by the tokens before it: logits that must not differ do"):
        check(config, model, train, validation)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_target_that_is_seen_from_the_place_before_it_is_found(tmp_path, precision, monkeypatch):
    """Attention to one token too far, where documents share a row."""
    config = configuration(tmp_path, "gpt", {})
    model, train, validation = opened(config)
    if precision == "bf16":
        model.bfloat16()

    def one_too_far(segments, causal):
        if segments is None:
            return None
        return (segments[:, None, :, None] == segments[:, None, None, :]).tril(1)

    monkeypatch.setattr(gpt, "attention_mask", one_too_far)
    with pytest.raises(ConfigError, match="a token is seen from another document or before it"):
        check(config, model, train, validation)


@pytest.mark.parametrize("architecture", ["gpt", "bert"])
def test_attention_across_documents_is_found(tmp_path, architecture, monkeypatch):
    config = configuration(tmp_path, architecture, {})
    model, train, validation = opened(config)
    monkeypatch.setattr(f"pretrain.models.{architecture}.attention_mask", lambda segments, causal: None)
    with pytest.raises(ConfigError, match=r"is seen from another (document|one)"):
        check(config, model, train, validation)


def test_attention_across_samples_without_padding_is_found(tmp_path, monkeypatch):
    config = configuration(tmp_path, "bert", {"unpad": True})
    model, train, validation = opened(config)
    monkeypatch.setattr(bert, "sequence_blocks", lambda ends, heads: sequence_blocks(ends[[0, -1]], heads))
    with pytest.raises(ConfigError, match="a sample is seen from another one"):
        check(config, model, train, validation)


def test_device_that_does_not_repeat_its_numbers_raises_no_alarm_but_a_leak_beyond_that_does(tmp_path):
    config = configuration(tmp_path, "gpt", {})
    model, train, validation = opened(config)
    model.module.final_norm.register_forward_hook(lambda module, given, out: out + 1e-6 * torch.randn_like(out))
    assert sanity.leaks(config, model, validation, ALONE) == []
    model.module.blocks[1].attention.causal = False
    with pytest.raises(ConfigError, match="a token is seen by the tokens before it"):
        check(config, model, train, validation)


def test_model_that_does_not_look_at_its_input_is_found(tmp_path):
    config = configuration(tmp_path, "gpt", {})
    model, train, validation = opened(config)
    model.module.final_norm.weight.data.zero_()
    with pytest.raises(ConfigError, match="do not depend on the token at their own place"):
        check(config, model, train, validation)


def test_rows_too_short_for_two_documents_are_not_looked_at(tmp_path):
    config = configuration(tmp_path, "gpt", {})
    shorter = config.train.model_copy(update={"seq_len": 3})
    shape = config.model.model_copy(update={"max_seq_len": 3})
    config = config.model_copy(update={"train": shorter, "model": shape})
    check(config, *opened(config))


def test_tokenizer_that_was_put_into_a_finished_dataset_is_refused(tmp_path):
    """Also where the manifest was written again, so that the checksums of the files fit."""
    config = configuration(tmp_path, "gpt", {})
    for split in ("train", "validation"):
        known = read_manifest(tmp_path / split)
        other = make_tokenizer(TokenizerConfig(type="characters", fim_tokens=True), ["9876543210!"], tmp_path)
        save_tokenizer(other, tmp_path / split, 512)
        origin = [known[name] for name in ("vocab_size", "tokenizer_fingerprint", "built_from")]
        write_manifest(tmp_path / split, known["shards"], *origin)
    model, train, validation = opened(config)
    with pytest.raises(ConfigError, match=r"train/tokenizer.json: is not the tokenizer that the tokens were made with"):
        check(config, model, train, validation)


def test_held_out_split_of_another_tokenizer_is_refused(tmp_path):
    configuration(tmp_path / "a", "gpt", {})
    manifest = read_manifest(tmp_path / "a/validation")
    write_manifest(tmp_path / "a/validation", manifest["shards"], manifest["vocab_size"], "another", "test")
    found = sanity.tokenizer_problems([open_dataset(tmp_path / "a" / split) for split in ("train", "validation")])
    assert len(found) == 2 and "was built with another tokenizer (fingerprint another, " in found[0]


def test_tokenizer_file_is_known_again_whatever_version_of_the_library_would_write(tmp_path, monkeypatch):
    configuration(tmp_path, "bert", {})
    monkeypatch.setattr(sanity, "fingerprint", lambda tokenizer: "of a later version")
    assert sanity.tokenizer_problems([open_dataset(tmp_path / "train")]) == []


def problems_of(config: PretrainConfig, change) -> list[str]:
    """Of the first batch, changed in place by change(input_ids, labels, segment_ids)."""
    data = open_stream(config, "train")
    batch = data.expand(data.micro_batches(0, 0, 1)[0])
    change(batch["input_ids"], batch["labels"], batch["segment_ids"])
    data.close()
    return sanity.label_problems(sanity.label_counts(batch, config), config)


def ignore_all(ids, labels, segments):
    labels.fill_(IGNORE_INDEX)


def not_shifted(ids, labels, segments):
    labels.copy_(torch.where(labels == IGNORE_INDEX, labels, ids))


def over_documents(ids, labels, segments):
    labels[:, :-1] = ids[:, 1:]


def every_other_one_ignored(ids, labels, segments):
    labels[:, ::2] = IGNORE_INDEX


def everywhere(ids, labels, segments):
    labels.copy_(torch.where(labels == IGNORE_INDEX, ids, labels))


def not_masked(ids, labels, segments):
    ids.copy_(torch.where(labels == IGNORE_INDEX, ids, labels))


def on_padding(ids, labels, segments):
    segments[:, -5:] = 0
    labels[:, -5:] = 7


@pytest.mark.parametrize(
    ("architecture", "change", "expected"),
    [
        ("gpt", ignore_all, "0 are targets, so there is nothing to learn"),
        ("gpt", not_shifted, "are not the next token ("),
        ("gpt", over_documents, "of them padding or at the end of a document"),
        ("gpt", every_other_one_ignored, "are followed by a token of the same document"),
        ("bert", ignore_all, "set data.masking.probability, which is 0.15"),
        ("bert", everywhere, "what is not masked must have the label -100"),
        ("bert", not_masked, "stand unmasked in the input, where they can be copied"),
        ("bert", on_padding, "of them padding or at the end of a document"),
    ],
)
def test_labels_that_are_not_those_of_the_objective_are_named(tmp_path, architecture, change, expected):
    config = configuration(tmp_path, architecture, {})
    assert problems_of(config, lambda *arrays: None) == []
    assert any(expected in problem for problem in problems_of(config, change))


def test_masking_that_masks_nothing_is_refused(tmp_path):
    config = configuration(tmp_path, "bert", {"masking": {"probability": 0.0}})
    with pytest.raises(ConfigError, match=r"set data.masking.probability, which is 0.0, to 0.15"):
        check(config, *opened(config))


def test_few_targets_say_nothing_about_shares(tmp_path):
    config = configuration(tmp_path, "bert", {})
    counts = {"targets": 9, "tokens": 30, "expected": 4, "outside": 0, "not_next": 0, "readable": 6}
    assert sanity.label_problems(counts, config) == []
    assert len(sanity.label_problems({name: 30 * n for name, n in counts.items()}, config)) == 2
