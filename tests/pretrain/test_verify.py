"""A step that is computed twice is the same step; what differs is found, named, and stops the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from configs.incidents import read_incidents
from configs.schema import GuardConfig
from pretrain import verify
from tests.pretrain.bits import flip
from tests.pretrain.test_objective import metrics, small_run, words, write_random_tokens
from tests.ranks import finish, run_ranks, start_ranks


def test_steps_that_are_due_are_multiples_by_the_number_that_metrics_give_them():
    guard = GuardConfig(verify_every_steps=3)
    assert [step + 1 for step in range(9) if verify.is_due(guard, step)] == [3, 6, 9]
    assert not any(verify.is_due(GuardConfig(), step) for step in range(9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_checksum_differs_after_any_flipped_bit(dtype, monkeypatch):
    monkeypatch.setattr(verify, "CHUNK", 16)
    tensor = (torch.randn(5, 10) * 100).to(dtype)
    whole = verify.checksum(tensor)
    assert whole.shape == () and whole == verify.checksum(tensor.clone())
    bits = tensor.view(verify.INTEGERS[tensor.element_size()])
    sums = []
    for place in (0, 15, 16, 49):
        for bit in range(8 * tensor.element_size()):
            mask = torch.tensor(1 << bit if bit < 63 else -(1 << 63)).to(bits.dtype)
            bits.view(-1)[place] ^= mask
            sums.append(int(verify.checksum(tensor)))
            bits.view(-1)[place] ^= mask
    assert len(sums) == 4 * 8 * tensor.element_size() and int(whole) not in sums


def test_checksum_differs_when_elements_change_places_and_takes_any_layout():
    tensor = torch.arange(12.0).view(3, 4)
    assert verify.checksum(tensor) != verify.checksum(tensor.flip(1))
    assert verify.checksum(tensor.t()) == verify.checksum(tensor.t().contiguous())
    assert verify.checksum(torch.empty(0)) == 0


@pytest.mark.parametrize(
    ("values", "expected"),
    [("aaa", []), ("aba", [1]), ("abaa", [1]), ("ab", [0, 1]), ("aabb", [0, 1, 2, 3]), ("abc", [0, 1, 2]), ("a", [])],
)
def test_ranks_that_a_majority_outvotes_are_named_and_all_where_there_is_none(values, expected):
    assert verify.outvoted(values) == expected


def test_ranks_that_have_other_weights_or_weights_unlike_their_masters_are_named_with_the_parameters():
    good, bad, worse = ([1, 2, 3], []), ([1, 7, 3], []), ([1, 2, 8], ["c"])
    assert verify.weight_differences("abc", [good, good]) == []
    found = verify.weight_differences("abc", [good, bad, good, worse, good])
    assert [difference.ranks for difference in found] == [[3], [1, 3]]
    assert found[0].text == "rank 3: its weights are not its fp32 weights, rounded: c"
    assert found[1].text == "ranks 1, 3 have other weights: b and 1 more"


def test_third_execution_says_which_of_the_two_was_wrong_and_where_nothing_repeats_it_is_the_kernels():
    reports = [None, (["a", "b"], 9, [True, False]), (["loss clm"], 9, [False, True]), (["a"], 9, [False, False])]
    found = verify.execution_differences(reports)
    assert [difference.ranks for difference in found] == [[1], [2], [3]]
    assert "in 2 of 9 sums of losses and gradients (a and 1 more), a third time with the first result" in found[0].text
    assert "a third time with the second result" in found[1].text
    assert "a third time with yet another result" in found[2].text
    assert not verify.nothing_repeats(reports) and verify.nothing_repeats([reports[3]] * 2)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "name",
    [
        "verified_steps_change_nothing_at_any_stage",
        "flipped_bit_of_either_execution_is_named_with_rank_and_step",
        "flipped_bit_of_a_weight_is_named_with_its_rank_and_parameter",
        "other_norm_on_one_rank_is_named",
    ],
)
def test_on_two_ranks(tmp_path, name):
    run_ranks(2, ["tests/pretrain/verify_on_ranks.py", name], tmp_path)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    write_random_tokens(folder / "data")
    return small_run(folder, {"dir": str(folder / "data")}, {"num_steps": 4}, {})


def faulty(config: Path, run_dir: Path, fault: str, *overrides: str) -> tuple[list[int], str]:
    """The exit codes of two ranks of which the second one has the fault, and what the first one said."""
    command = words(config, run_dir, *overrides)[2:]
    codes = finish(start_ranks(2, ["tests/pretrain/faulty_train.py", fault, "1", *command], run_dir / "logs"))
    return codes, (run_dir / "logs/rank-0.log").read_text()


@pytest.mark.slow
@pytest.mark.distributed
def test_run_without_any_check_writes_bitwise_the_metrics_and_weights_of_one_with_all_of_them(config, tmp_path):
    more = ("model.dropout=0.1", "checkpoint.every_steps=2")
    codes, said = faulty(config, tmp_path / "plain", "unchecked", *more)
    assert codes == [0, 0], said
    run_ranks(2, words(config, tmp_path / "verified", *more, "guard.verify_every_steps=1"), tmp_path / "logs")
    assert metrics(tmp_path / "plain") == metrics(tmp_path / "verified")
    weights = [(tmp_path / run / "checkpoints/step-00000004/rank-00001.safetensors") for run in ("plain", "verified")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("activation", "rank 1 computed the step twice on the same data with different results"),
        ("weight", "rank 1: its weights are not its fp32 weights, rounded: blocks.0.mlp.up.weight"),
    ],
)
def test_corruption_stops_every_rank_with_70_before_the_update_and_names_the_newest_checkpoint(
    config, tmp_path, fault, expected
):
    more = ("checkpoint.every_steps=2", "checkpoint.background=false", "guard.verify_every_steps=1")
    codes, said = faulty(config, tmp_path, fault, *more)
    assert codes == [70, 70], said
    assert f"step 3: silent data corruption: {expected}" in said and "Traceback" not in said
    assert f"the newest checkpoint is {tmp_path}/checkpoints/step-00000002" in said
    (incident,) = read_incidents(tmp_path)
    assert (incident["kind"], incident["step"], incident["rank"], incident["ranks"]) == ("corruption", 3, 1, [1])
    assert incident["text"] in said
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines) == 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.slow
@pytest.mark.distributed
def test_leak_on_one_rank_ends_every_rank_with_2_before_the_first_step(config, tmp_path):
    codes, said = faulty(config, tmp_path, "leak")
    assert codes == [2, 2], said
    assert "a token is seen by the tokens before it: logits that must not differ do" in said and "(rank 1)" in said
    assert "Traceback" not in said and not (tmp_path / "metrics.jsonl").exists()


def test_flip_changes_one_bit():
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.ones(3, dtype=dtype)
        assert flip(tensor).tolist() != [1.0, 1.0, 1.0] and flip(flip(tensor)).equal(tensor)
