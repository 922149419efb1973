"""Which samples each step has: epochs, mixtures, phases, windows; what the order depends on; what does not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs.batch_sizes import batch_size
from configs.load import ConfigError
from configs.schema import PretrainConfig
from data_pipeline.samples import BLOCK, Samples, open_samples, tokens_before
from tests.conftest import ROOT
from tests.data_pipeline.token_datasets import bert_config, fim_config, gpt_config, lengths, write_dataset

SEQ_LEN, BATCH = 16, 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three sources of different sizes; tokens from 0, 20,000 and 40,000 on say which source a row is from."""
    folder = tmp_path_factory.mktemp("data")
    for number, (name, documents) in enumerate({"a": 120, "b": 40, "c": 15}.items()):
        for split, share in (("train", 1), ("validation", 4)):
            shards = [lengths(number, documents // share), lengths(number + 9, documents // share)]
            write_dataset(folder / name / split, shards, 20_000 * number)
    return folder


def single(folder, data: dict | None = None, train: dict | None = None) -> PretrainConfig:
    return gpt_config(folder / "a", data, train)


def mixed(folder, sources: dict[str, dict], data: dict | None = None, train: dict | None = None) -> PretrainConfig:
    mixture = {name: {"dir": str(folder / name)} | given for name, given in sources.items()}
    return gpt_config(folder, {"mixture": mixture} | (data or {}), train)


WEIGHTS = {"a": {"weight": 3}, "b": {"weight": 2}, "c": {"weight": 1}}


def first_tokens(samples: Samples, step: int, world_size: int = 1) -> np.ndarray:
    """Of each row of the step's global batch, its first token, which says which row it is; (batch,)."""
    ranks = [batch for rank in range(world_size) for batch in samples.micro_batches(step, rank, world_size)]
    return np.concatenate([batch["input_ids"][:, 0] for batch in ranks])


def test_each_epoch_has_every_sample_once(folder):
    samples = open_samples(single(folder), "train")
    num_rows = samples.phases[0].rows[0].num_rows
    steps = -(-3 * num_rows // BATCH)
    order = np.concatenate([first_tokens(samples, step) for step in range(steps)]) // SEQ_LEN
    for epoch in range(3):
        assert np.array_equal(np.sort(order[epoch * num_rows :][:num_rows]), np.arange(num_rows))
    assert not np.array_equal(order[:num_rows], order[num_rows : 2 * num_rows])


def test_steps_that_cross_the_blocks_of_lookups_are_whole(folder):
    samples = open_samples(single(folder), "train")
    step = BLOCK // BATCH  # 24 does not divide 4096: this step is in two blocks
    assert step * BATCH < BLOCK < (step + 1) * BATCH
    first, then = samples._block(0, 0)[1], samples._block(0, 1)[1]
    expected = np.concatenate([first, then])[step * BATCH : (step + 1) * BATCH]
    assert np.array_equal(first_tokens(samples, step) // SEQ_LEN, expected)


@pytest.mark.parametrize("sources", [WEIGHTS, {"a": {"epochs": 1}, "b": {"epochs": 2}, "c": {"epochs": 5}}])
def test_mixture_keeps_its_proportions_in_every_step(folder, sources):
    samples = open_samples(mixed(folder, sources), "train")
    rows = np.array([rows.num_rows for rows in samples.phases[0].rows])
    weights = np.array(
        [given.get("weight") or given["epochs"] * num for given, num in zip(sources.values(), rows, strict=True)]
    )
    seen = np.zeros(3)
    for step in range(40):
        seen += np.bincount(first_tokens(samples, step) // 20_000, minlength=3)
        assert np.abs(seen - weights / weights.sum() * BATCH * (step + 1)).max() <= 1.68


def test_each_source_of_a_mixture_goes_through_all_its_samples_before_any_comes_again(folder):
    samples = open_samples(mixed(folder, WEIGHTS), "train")
    num_rows = [rows.num_rows for rows in samples.phases[0].rows]
    order = np.concatenate([first_tokens(samples, step) for step in range(80)])
    for source, num in enumerate(num_rows):
        own = order[order // 20_000 == source]
        assert len(own) > num
        assert len(np.unique(own[:num])) == num


def test_scheduled_weights_take_over_at_their_step(folder):
    schedule = [
        {"from_step": 5, "weights": {"a": 0, "b": 1, "c": 1}},
        {"from_step": 10, "weights": {"a": 1, "b": 0, "c": 0}, "ramp_steps": 10},
    ]
    samples = open_samples(mixed(folder, WEIGHTS, {"mixture_schedule": schedule}), "train")
    counts = np.stack([np.bincount(first_tokens(samples, step) // 20_000, minlength=3) for step in range(25)])
    assert np.abs(counts[:5] - [12, 8, 4]).max() <= 2
    assert (counts[6:10, 0] == 0).all() and np.abs(counts[5:10, 1:] - 12).max() <= 2
    assert np.abs(counts[10:20, 0] - (np.arange(10) + 0.5) / 10 * BATCH).max() <= 3
    assert (counts[21:, 0] == BATCH).all()


def test_order_of_sources_in_the_file_changes_nothing(folder):
    turned = dict(reversed(WEIGHTS.items()))
    one, other = (open_samples(mixed(folder, sources), "train") for sources in (WEIGHTS, turned))
    assert all(np.array_equal(first_tokens(one, step), first_tokens(other, step)) for step in range(5))
    assert one.facts(5) == other.facts(5)


RAMP = {"batch_ramp": {"start_size": 6, "increment": 6, "num_samples": 300}}


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("given", ["single", "mixed"])
def test_ramp_of_the_batch_size_keeps_the_order_of_the_samples(folder, given, world_size):
    config = single(folder, None, RAMP) if given == "single" else mixed(folder, WEIGHTS, None, RAMP)
    fixed = single(folder) if given == "single" else mixed(folder, WEIGHTS)
    ramped, whole = open_samples(config, "train"), open_samples(fixed, "train")
    steps = [
        [pair for rank in range(world_size) for pair in ramped.sample_ids(step, rank, world_size)] for step in range(40)
    ]
    assert sorted({len(ids) for ids in steps}) == [6, 12, 18, 24]
    laid_out = [pair for ids in steps for pair in ids]
    expected = [pair for step in range(40) for pair in whole.sample_ids(step, 0, 1)]
    assert laid_out == expected[: len(laid_out)]
    tokens = np.concatenate([first_tokens(ramped, step, world_size) for step in range(40)])
    assert np.array_equal(tokens, np.concatenate([first_tokens(whole, step) for step in range(40)])[: len(tokens)])


def test_phase_begins_at_the_place_that_a_ramp_has_reached(folder):
    """A phase has its own order, and of a mixture the places that its sources have not had: nothing comes twice."""
    phases = {"phases": [{"from_step": 7, "seq_len": 32}]}
    samples = open_samples(mixed(folder, WEIGHTS, None, RAMP | phases), "train")
    assert samples.places_before(7) == sum(len(samples.sample_ids(step, 0, 1)) for step in range(7)) < 7 * BATCH
    assert samples.phases[1].before.sum() == samples.places_before(7)
    order = np.concatenate([first_tokens(samples, step) for step in range(7, 14)])
    assert len(order) == samples.places_before(14) - samples.places_before(7)
    for source, rows in enumerate(samples.phases[1].rows):
        own = order[order // 20_000 == source]
        assert len(np.unique(own[: rows.num_rows])) == min(len(own), rows.num_rows)


def test_scheduled_weights_take_over_at_their_step_of_a_ramp(folder):
    schedule = {"mixture_schedule": [{"from_step": 5, "weights": {"a": 0, "b": 1, "c": 1}}]}
    samples = open_samples(mixed(folder, WEIGHTS, schedule, RAMP), "train")
    from_a = [(first_tokens(samples, step) < 20_000).sum() for step in range(12)]
    assert min(from_a[:5]) >= 2 and max(from_a[5:]) <= 1  # what it was owed by rounding


@pytest.mark.parametrize("given", ["single", "mixed"])
def test_phases_have_their_own_length_and_go_through_their_own_samples(folder, given):
    phases = {"phases": [{"from_step": 7, "seq_len": 32}, {"from_step": 20, "seq_len": 16}]}
    config = single(folder, None, phases) if given == "single" else mixed(folder, WEIGHTS, None, phases)
    samples = open_samples(config, "train")
    assert [next(samples.micro_batches(step, 0, 1))["input_ids"].shape[1] for step in (0, 6, 7, 19, 20)] == [
        16,
        16,
        32,
        32,
        16,
    ]
    phase = samples.phases[1]
    order = np.concatenate([first_tokens(samples, step) for step in range(7, 20)])
    for source, rows in enumerate(phase.rows):
        own = order[order // 20_000 == source]
        assert len(np.unique(own[: rows.num_rows])) == min(len(own), rows.num_rows)
        assert ((own - 20_000 * source) % 32 == 0).all()
    # the third phase does not begin with the samples of the first one again
    assert not np.array_equal(first_tokens(samples, 20), first_tokens(samples, 0))


def test_tokens_count_each_phase_with_its_length():
    config = PretrainConfig.model_validate(
        {
            "run_dir": "r",
            "train": {"seq_len": 128, "global_batch_size": 8, "phases": [{"from_step": 90, "seq_len": 512}]},
        }
    )
    assert tokens_before(config.train, 0) == 0
    assert tokens_before(config.train, 90) == 90 * 8 * 128
    assert tokens_before(config.train, 100) == 8 * (90 * 128 + 10 * 512)


def test_tokens_count_each_step_of_a_ramp_with_its_size():
    train = gpt_config(Path("unused"), None, RAMP | {"phases": [{"from_step": 7, "seq_len": 32}]}).train
    before = [tokens_before(train, step) for step in range(60)]
    lengths_of_steps = [16] * 7 + [32] * 52
    assert np.diff(before).tolist() == [
        batch_size(train, step) * seq_len for step, seq_len in enumerate(lengths_of_steps)
    ]


def test_window_keeps_neighbours_near_and_epochs_whole(folder):
    window = 4 * SEQ_LEN * 10
    samples = open_samples(single(folder, {"shuffle_window_tokens": window}), "train")
    rows = samples.phases[0].rows[0]
    order = np.concatenate([first_tokens(samples, step) for step in range(rows.num_rows // BATCH + 1)])[: rows.num_rows]
    assert np.array_equal(np.sort(order), np.sort(rows.first_tokens(np.arange(rows.num_rows))))
    shard = order >= samples.sources[0].shard_starts[1]
    assert np.count_nonzero(np.diff(shard)) < 45  # over everything, half of the 400 neighbours are in different shards


@pytest.mark.parametrize("kind", ["single", "mixed"])
def test_eval_samples_are_the_same_at_every_call_and_number_of_ranks(folder, kind):
    size = {"micro_batch_size": 4}
    config = single(folder, None, size) if kind == "single" else mixed(folder, WEIGHTS, None, size)
    samples = open_samples(config, "validation")
    seen = []
    for world_size in (1, 1, 2, 3):
        ranks = [list(samples.eval_batches(0, 21, rank, world_size)) for rank in range(world_size)]
        assert len({len(batches) for batches in ranks}) == 1  # else ranks would wait for each other for ever
        counted = [
            row
            for batches in ranks
            for batch in batches
            for row, labels in zip(batch["input_ids"][:, 0].tolist(), batch["labels"], strict=True)
            if (labels != -100).any()
        ]
        assert len(counted) == 21
        seen.append(sorted(counted))
    assert seen[0] == seen[1] == seen[2] == seen[3]
    if kind == "mixed":
        assert np.abs(np.bincount(np.array(seen[0]) // 20_000, minlength=3) - [10.5, 7, 3.5]).max() <= 1.68


def test_eval_uses_the_length_of_the_step_before(folder):
    samples = open_samples(single(folder, None, {"phases": [{"from_step": 7, "seq_len": 32}]}), "validation")
    assert [next(samples.eval_batches(step, 4, 0, 1))["labels"].shape[1] for step in (0, 7, 8)] == [16, 16, 32]


def test_facts_are_json_and_name_everything_the_order_depends_on(folder):
    base = mixed(folder, WEIGHTS)
    facts = open_samples(base, "train").facts(10)
    assert json.loads(json.dumps(facts)) == facts
    changes: dict[str, tuple[dict, dict]] = {
        "seed": ({}, {"seed": 5}),
        "global_batch_size": ({}, {"global_batch_size": 48}),
        "seq_len": ({}, {"seq_len": 32}),
        "phases": ({}, {"phases": [{"from_step": 9, "seq_len": 32}]}),
        "batch_ramp": ({}, RAMP),
        "packing": ({"packing": "best_fit"}, {}),
        "shuffle_window_tokens": ({"shuffle_window_tokens": 1000}, {}),
        "mixture_schedule": ({"mixture_schedule": [{"from_step": 9, "weights": {"a": 1, "b": 1, "c": 1}}]}, {}),
    }
    for name, (data, train) in changes.items():
        changed = open_samples(mixed(folder, WEIGHTS, data, train), "train").facts(10)
        assert [key for key in changed if changed[key] != facts.get(key)] == [name]
    other_weights = open_samples(mixed(folder, WEIGHTS | {"c": {"weight": 2}}), "train").facts(10)
    assert [key for key in facts if facts[key] != other_weights[key]] == ["mixture"]
    fewer = open_samples(mixed(folder, {"a": {"weight": 3}, "b": {"weight": 2}}), "train").facts(10)
    assert [key for key in facts if facts[key] != fewer[key]] == ["dataset", "mixture"]


def test_what_is_planned_for_later_steps_can_be_changed(folder):
    later = {"mixture_schedule": [{"from_step": 10, "weights": {"a": 0, "b": 1, "c": 0}, "ramp_steps": 5}]}
    phases = {"phases": [{"from_step": 12, "seq_len": 32}]}
    before, after = (open_samples(mixed(folder, WEIGHTS, *plan), "train") for plan in ((None, None), (later, phases)))
    assert before.facts(10) == after.facts(10)
    assert all(np.array_equal(first_tokens(before, step), first_tokens(after, step)) for step in range(10))
    assert before.facts(11) != after.facts(11)


def test_masking_is_a_fact_of_bert_and_packing_is_not(tmp_path):
    facts = open_samples(bert_config(tmp_path), "train").facts(1)
    assert facts["masking"]["probability"] == 0.15 and "packing" not in facts


def global_batch(samples: Samples, step: int, world_size: int = 1) -> dict[str, np.ndarray]:
    ranks = [batch for rank in range(world_size) for batch in samples.micro_batches(step, rank, world_size)]
    return {name: np.concatenate([batch[name] for batch in ranks]) for name in ranks[0]}


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_filling_in_the_middle_is_the_same_on_any_ranks_and_another_in_every_epoch(tmp_path, packing):
    one = open_samples(fim_config(tmp_path, {"packing": packing}), "train")
    other = open_samples(fim_config(tmp_path, {"packing": packing}, {"micro_batch_size": 4}), "train")
    plain = open_samples(fim_config(tmp_path, {"packing": packing, "fim": {}}), "train")
    name = "tokens" if packing == "concatenate" else "input_ids"
    for step in (0, 7):
        rows = global_batch(one, step)
        again = global_batch(other, step, 3)
        assert rows.keys() == global_batch(plain, step).keys()
        assert all(np.array_equal(rows[key], again[key]) for key in rows)
        assert not np.array_equal(rows[name], global_batch(plain, step)[name])
    num_rows = one.phases[0].rows[0].num_rows
    made = one.phases[0].rows[0].make(np.arange(num_rows), "train", np.arange(num_rows))
    next_epoch = one.phases[0].rows[0].make(np.arange(num_rows), "train", num_rows + np.arange(num_rows))
    assert not np.array_equal(made[name], next_epoch[name])


def test_validation_has_no_middle_to_fill_in(tmp_path):
    batches = [
        list(open_samples(config, "validation").eval_batches(0, 20, 0, 1))
        for config in (fim_config(tmp_path), fim_config(tmp_path, {"fim": {}}))
    ]
    assert all(np.array_equal(a["tokens"], b["tokens"]) for a, b in zip(*batches, strict=True))


def test_filling_in_is_a_fact_only_where_it_is_on(tmp_path):
    facts = open_samples(fim_config(tmp_path), "train").facts(1)
    assert facts["fim"] == {"probability": 0.5, "spm_share": 0.5}
    assert "fim" not in open_samples(fim_config(tmp_path, {"fim": {}}), "train").facts(1)


def test_filling_in_without_sentinels_in_the_vocabulary_says_how_to_get_them(tmp_path):
    config = bert_config(tmp_path, {"fim": {"probability": 0.5}})
    config = config.model_copy(update={"model": config.model.model_copy(update={"architecture": "gpt"})})
    with pytest.raises(ConfigError, match=r"data.fim.probability=0.5 needs .*build\.tokenizer\.fim_tokens=true"):
        open_samples(config, "train")


def test_sources_with_different_tokenizers_are_refused_by_name(tmp_path):
    for name in ("a", "b"):
        write_dataset(tmp_path / name / "train", [lengths(1, 50)], tokenizer=f"tokenizer of {name}")
    with pytest.raises(ConfigError, match=r"data.mixture: b \(.*b/train\) .* another tokenizer than a \(.*a/train\)"):
        open_samples(mixed(tmp_path, {"a": {"weight": 1}, "b": {"weight": 1}}), "train")


def test_source_without_a_single_sample_is_named(folder):
    config = mixed(folder, WEIGHTS, None, {"phases": [{"from_step": 9, "seq_len": 1500}]})
    with pytest.raises(
        ConfigError, match=r"c/train: holds .* tokens, fewer than one sample of 1500; add text or lower"
    ):
        open_samples(config, "train")


def test_opening_samples_imports_no_torch():
    program = "import sys, data_pipeline.workers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
