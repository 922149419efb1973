"""How a build is divided: every piece in exactly one part, every part in exactly one task, read back as it was."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from configs.load import load_pretrain
from data_pipeline import parts
from data_pipeline.parts import PASSING_SPEED, group, load_plan, part_bytes, runs, save_plan, text_bytes
from data_pipeline.sources import Piece

sizes = st.lists(st.integers(0, 1000), max_size=60)


def pieces_of(sizes: list[int]) -> list[Piece]:
    return [Piece("file", number, number + 1, size) for number, size in enumerate(sizes)]


@given(sizes, st.integers(1, 500))
def test_parts_hold_every_piece_once_in_order_and_reach_their_size(sizes, part_bytes):
    pieces = pieces_of(sizes)
    found = list(group(pieces, part_bytes))
    assert [piece for part in found for piece in part] == pieces
    assert all(sum(piece.num_bytes for piece in part) >= part_bytes for part in found[:-1])
    assert all(sum(piece.num_bytes for piece in part[:-1]) < part_bytes for part in found)


def test_part_of_very_small_files_ends_at_a_number_of_them(monkeypatch):
    monkeypatch.setattr(parts, "MOST_PIECES", 10)
    assert [len(part) for part in group(pieces_of([1] * 25), 1 << 20)] == [10, 10, 5]


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 8), st.data())
def test_tasks_hold_every_missing_part_once_and_only_neighbours(num_own, num_held_out, num_workers, data):
    total = num_own + num_held_out
    todo = [number for number in range(total) if data.draw(st.booleans())]
    sizes, reach = (data.draw(st.lists(st.integers(0, 99), min_size=total, max_size=total)) for _ in range(2))
    tasks = runs(todo, sizes, reach, num_own, num_workers)
    assert [number for task in tasks for number in task] == todo
    for task in tasks:
        assert task == list(range(task[0], task[-1] + 1))
        assert len({number < num_own for number in task}) == 1


def test_one_compressed_file_is_one_task_a_worker():
    tasks = runs(list(range(128)), [10] * 128, [10 * part for part in range(128)], 128, 2)
    assert [len(task) for task in tasks] == [4, 67, 57]  # one more where the beginning is still near
    passed_over = [10 * task[0] for task in tasks]
    assert sum(passed_over) < 128 * 10
    work = [10 * len(task) + passed / PASSING_SPEED for task, passed in zip(tasks, passed_over, strict=True)]
    assert abs(work[0] + work[2] - work[1]) < 10  # both workers have as much to do, to a part


def test_files_that_can_be_read_from_anywhere_are_many_small_tasks():
    assert [len(task) for task in runs(list(range(128)), [10] * 128, [0] * 128, 128, 2)] == [4] * 32


def test_part_size_follows_the_corpus_between_two_bounds():
    assert part_bytes(10) == 2 << 20
    assert part_bytes(1 << 30) == 8 << 20
    assert part_bytes(1 << 50) == 256 << 20
    assert text_bytes("a.jsonl.zst", 100) == 300 and text_bytes("a.jsonl", 100) == 100


def test_plan_and_its_parts_are_read_back_as_they_were(tmp_path):
    config = load_pretrain("configs/bert/nano.yaml")
    packed = [Piece("c.zst", number, number + 8, 8, 1, 0, 1) for number in (3, 11)]
    own = [Piece("ä [1].jsonl", 0, 9, 9, 1, 3, 0, "9 bytes"), Piece("b.jsonl", 0, 3, 3, 1), *packed]
    plan = save_plan(tmp_path, "print", config, own, pieces_of([4]), 10)
    assert load_plan(tmp_path) == plan
    assert [plan.pieces(part) for part in range(plan.num_parts)] == [own[:2], own[2:], pieces_of([4])]
    assert [plan.is_held_out(part) for part in range(plan.num_parts)] == [False, False, True]
    assert plan.sizes == [12, 16, 4] and plan.reach == [0, 2, 0]


@given(st.integers(1, 1000))
def test_samples_are_taken_from_parts_all_over_the_corpus(num_own):
    plan = parts.Plan(None, "", None, num_own, [1] * (num_own + 3), [], [])  # type: ignore[arg-type]
    assert len(plan.sampled) <= 64 and plan.sampled[0] == 0
    assert num_own - 2 * -(-num_own // 64) < plan.sampled[-1] < num_own
