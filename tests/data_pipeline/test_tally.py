"""Counts of a stage: the sum over parts is what one pass over all of it would have counted."""

from __future__ import annotations

import json

from data_pipeline.tally import MAX_EXAMPLES, Tally


def counted(numbers: range) -> Tally:
    tally = Tally()
    for number in numbers:
        tally.seen += 1
        tally.changed += number % 2
        if number % 3 == 0:
            tally.drop("by three", f"document {number}")
        tally.find("digits", len(str(number)), f"in document {number}")
    return tally


def test_sum_over_parts_is_the_count_of_the_whole():
    total = Tally()
    for part in (range(0, 7), range(7, 7), range(7, 30)):
        total.add(counted(part))
    assert total == counted(range(30))
    assert len(total.examples["by three"]) == MAX_EXAMPLES


def test_a_tally_is_plain_json():
    tally = counted(range(30))
    assert Tally.from_json(json.loads(json.dumps(tally.to_json()))) == tally


def test_examples_are_shortened():
    tally = Tally()
    tally.drop("long", "a" * 1000)
    assert tally.examples["long"] == ["a" * 200 + " ..."]
