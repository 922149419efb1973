"""Loading a configuration: merging, and every fault with its place and its cure."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.load import ConfigError, dump, flatten, load, load_finetune, load_pretrain, valid_keys
from configs.schema import PretrainConfig
from tests.conftest import ROOT

MIXTURE = "data.mixture={a: {dir: a, weight: 1}, b: {dir: b, weight: 2}}"
STAGE = "{{from_step: {}, ramp_steps: {}, weights: {{a: 1, b: 1}}}}"
OF_OTHER_KINDS = set((ROOT / "configs/cluster").iterdir()) | set((ROOT / "configs/in_context").iterdir())
SHIPPED = sorted(set((ROOT / "configs").rglob("*.yaml")) - OF_OTHER_KINDS)


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("run_dir: runs/x\nmodel:\n  architecture: gpt\ntrain:\n  num_steps: 10\n  optimizer: {lr: 1e-3}\n")
    return path


def fault(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, list(overrides))
    return str(caught.value)


def test_file_goes_over_defaults_and_override_over_file(file):
    config = load_pretrain(file, ["train.num_steps=20", "data.masking.probability=0.3"])
    assert config.train.num_steps == 20
    assert config.train.optimizer.lr == 1e-3
    assert config.train.optimizer.weight_decay == PretrainConfig(run_dir="x").train.optimizer.weight_decay
    assert config.data.masking.probability == 0.3


def test_origin_of_each_value_is_known(file):
    loaded = load(file, ["train.seq_len=64"])
    assert loaded.origin("train.num_steps") == f"{file}:5"
    assert loaded.origin("train.optimizer.lr") == f"{file}:6"
    assert loaded.origin("train.seq_len") == "command line"
    assert loaded.origin("train.seed") == "default"


def test_unknown_key_names_line_and_nearest_key(file):
    file.write_text(file.read_text() + "eval:\n  every_step: 5\n")
    assert fault(file) == f"{file}:8: unknown key `eval.every_step`; did you mean `eval.every_steps`?"


def test_unknown_override_names_the_command_line_and_the_nearest_key(file):
    assert "command line: unknown key `train.num_step`; did you mean `train.num_steps`?" in fault(
        file, "train.num_step=5"
    )


def test_key_of_another_section_is_found(file):
    assert "did you mean `train.optimizer.weight_decay`?" in fault(file, "train.weight_decay=0")


def test_ill_typed_value_names_line_value_and_expectation(file):
    file.write_text("run_dir: r\ntrain:\n  num_steps: many\n")
    message = fault(file)
    assert f"{file}:3: train.num_steps='many'" in message and "valid integer" in message


def test_all_faults_are_reported_at_once(file):
    message = fault(file, "train.seed=-1", "model.architecture=rnn", "nonsense=1")
    assert all(part in message for part in ("train.seed", "model.architecture", "nonsense"))
    assert len(message.splitlines()) == 3


def test_duplicate_key_is_refused_with_both_lines(file):
    file.write_text("run_dir: a\nmodel: {preset: nano}\nrun_dir: b\n")
    assert fault(file) == f"{file}:3: key `run_dir` stands here a second time (first at {file}:1); keep one"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.global_batch_size=10", "train.micro_batch_size=4"], "is not a multiple of train.micro_batch_size=4"),
        (["train.schedule.warmup_steps=11"], "the peak would never be reached"),
        (["model.max_seq_len=8"], "lower train.seq_len or raise model.max_seq_len"),
        (["data.masking.mask_share=0.95"], "is more than 1"),
        (["data.build.deduplicate.similarity=0.4"], "similarity=0.4: input should be greater than or equal to 0.5"),
        (["data.mixture={a: {dir: a, weight: 1, epochs: 2}}"], "or every source its epochs, and not both"),
        (["data.mixture={a: {dir: a}}"], "give every source a weight, or every source its epochs"),
        (["data.mixture={a: {dir: a, weight: 1}, b: {dir: b, epochs: 2}}"], "give every source a weight, or every"),
        (["data.mixture_schedule=[{from_step: 3, weights: {a: 1}}]"], "there is no data.mixture"),
        ([MIXTURE, "data.mixture_schedule=[{from_step: 3, weights: {a: 1}}]"], "the mixture's sources are a, b; name"),
        ([MIXTURE, "data.mixture_schedule=[{from_step: 3, weights: {a: 0, b: 0}}]"], "from_step=3: all weights are 0"),
        (
            [MIXTURE, f"data.mixture_schedule=[{STAGE.format(3, 4)}, {STAGE.format(6, 0)}]"],
            "from_step=6: begins before the stage before it has ended, at step 7",
        ),
        ([MIXTURE, f"data.mixture_schedule=[{STAGE.format(3, 0)}, {STAGE.format(3, 0)}]"], "put the stages in order"),
        (["train.phases=[{from_step: 5, seq_len: 64}, {from_step: 2, seq_len: 64}]"], "from_step goes 5, 2; put the"),
        (["train.phases=[{from_step: 5, seq_len: 64}, {from_step: 5, seq_len: 32}]"], "each step once"),
        (
            ["model.max_seq_len=1024", "train.phases=[{from_step: 5, seq_len: 2048}]"],
            "seq_len=2048 from step 5 is more than model.max_seq_len=1024",
        ),
        (["model.architecture=bert", "data.packing=best_fit"], "data.packing=best_fit is for model.architecture=gpt"),
        (["data.shuffle_window_tokens=1000"], "is less than one sample of 1024 tokens"),
        (["train.num_steps"], "expected key=value"),
        (["train.budget=24"], "train.budget=24: expected a number and its unit, as in 24h, 90m or 3600s"),
        (["train.budget=1h30m"], "train.budget='1h30m': expected a number and its unit"),
        (["train.budget=0h"], "train.budget='0h': expected a number and its unit"),
        (["train.budget=-3h"], "expected a number and its unit"),
        (["train.schedule.type=inverse_sqrt"], "set warmup_steps"),
        (["train=5"], "train=5"),
    ],
)
def test_values_that_contradict_each_other_are_refused(file, overrides, expected):
    assert expected in fault(file, *overrides)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"run_dir: [1\n", "is not valid YAML"),
        (b"- a\n- b\n", "expected `key: value` lines, found a list"),
        (b"run_dir: \xff\n", "is not UTF-8"),
        (b"", "key `run_dir` is missing"),
    ],
)
def test_broken_files_are_named(tmp_path, content, expected):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    message = fault(path)
    assert expected in message and str(path) in message


def test_missing_file_is_named(tmp_path):
    assert fault(tmp_path / "none.yaml") == f"{tmp_path}/none.yaml: no such file"


def test_numbers_in_exponent_form_are_numbers(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("run_dir: r\ntrain: {optimizer: {lr: 3e-4, eps: 1E-8}}\n")
    assert load_pretrain(path).train.optimizer.lr == 3e-4


def test_mixture_schedule_and_phases_in_order_are_accepted(file):
    schedule = f"data.mixture_schedule=[{STAGE.format(3, 4)}, {STAGE.format(7, 0)}, {STAGE.format(8, 2)}]"
    phases = "train.phases=[{from_step: 5, seq_len: 512}, {from_step: 9, seq_len: 2048}]"
    config = load_pretrain(file, [MIXTURE, schedule, phases])
    assert [stage.from_step for stage in config.data.mixture_schedule] == [3, 7, 8]
    assert config.train.longest_seq_len == 2048


def test_dump_reads_back_to_an_equal_configuration(file, tmp_path):
    config = load_pretrain(file)
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load_pretrain(tmp_path / "again.yaml") == config


def test_task_decides_the_kind_and_the_wrong_verb_says_so(file):
    with pytest.raises(ConfigError, match="millstream pretrain"):
        load_finetune(file)
    with pytest.raises(ConfigError, match="millstream finetune"):
        load_pretrain(ROOT / "configs/finetune/docstrings.yaml")


def test_every_key_that_flatten_shows_is_a_valid_override(file):
    config = load_pretrain(file)
    assert set(flatten(config)) <= set(valid_keys(PretrainConfig))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_shipped_configuration_loads_and_its_head_says_command_cost_and_result(path):
    load(path)
    head = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert all(word in head for word in ("millstream", "Cost:", "Expected:")), head
