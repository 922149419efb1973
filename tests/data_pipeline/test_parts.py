"""How a build is divided: every piece in exactly one part, every part in exactly one task, files complete or absent."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from configs.load import load_pretrain
from data_pipeline.parts import Part, Plan, group, load_plan, piece_bytes, runs
from data_pipeline.sources import Piece

sizes = st.lists(st.integers(0, 1000), max_size=60)


def pieces_of(sizes: list[int]) -> list[Piece]:
    return [Piece("file", number, number + 1, size) for number, size in enumerate(sizes)]


@given(sizes, st.integers(1, 500))
def test_parts_hold_every_piece_once_in_order_and_reach_their_size(sizes, part_bytes):
    pieces = pieces_of(sizes)
    parts = list(group(pieces, part_bytes, False))
    assert [piece for part in parts for piece in part.pieces] == pieces
    assert all(part.num_bytes >= part_bytes for part in parts[:-1])
    assert all(sum(piece.num_bytes for piece in part.pieces[:-1]) < part_bytes for part in parts)


@given(st.lists(st.booleans(), max_size=50), st.integers(1, 8), st.data())
def test_tasks_hold_every_missing_part_once_and_only_neighbours(held_out, num_workers, data):
    parts = [Part(pieces_of([1]), held) for held in sorted(held_out)]
    todo = [number for number in range(len(parts)) if data.draw(st.booleans())]
    tasks = runs(parts, todo, num_workers)
    assert [number for task in tasks for number in task] == todo
    for task in tasks:
        assert task == list(range(task[0], task[-1] + 1))
        assert len({parts[number].held_out for number in task}) == 1


def test_an_undisturbed_build_has_two_tasks_a_worker():
    parts = [Part(pieces_of([1]), False)] * 128
    assert len(runs(parts, list(range(128)), 2)) == 4


def test_part_size_follows_the_corpus_between_two_bounds():
    assert piece_bytes({"a.jsonl": 10}) == 2 << 20
    assert piece_bytes({"a.jsonl": 1 << 30}) == 8 << 20
    assert piece_bytes({"a.jsonl.zst": 1 << 30}) == 24 << 20
    assert piece_bytes({"a.jsonl": 1 << 50}) == 256 << 20


def test_plan_is_read_back_as_it_was(tmp_path):
    config = load_pretrain("configs/bert/nano.yaml")
    parts = [Part([Piece("a.jsonl", 0, 9, 9, 1), Piece("b.jsonl", 0, 3, 3, 1)], False), Part(pieces_of([4]), True)]
    plan = Plan(tmp_path, "print", config, {"a.jsonl": "9 bytes"}, parts)
    plan.save()
    load_plan.cache_clear()
    assert load_plan(tmp_path) == plan
