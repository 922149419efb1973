"""Counts of what each stage of a build saw, changed and dropped, with a few examples; sums over parts of the corpus.

A tally is plain JSON, so that every part writes its own and the sum does not depend on how the work was divided.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

MAX_EXAMPLES = 3  # of each reason
EXAMPLE_CHARACTERS = 200


@dataclass
class Tally:
    """Of one stage: documents seen, changed and dropped, by reason."""

    seen: int = 0
    changed: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> documents
    found: Counter[str] = field(default_factory=Counter)  # kind of thing found or replaced -> occurrences
    examples: dict[str, list[str]] = field(default_factory=dict)  # reason or kind -> the first few, shortened

    def drop(self, reason: str, example: str) -> None:
        self.dropped[reason] += 1
        self.show(reason, example)

    def find(self, kind: str, count: int, example: str) -> None:
        self.found[kind] += count
        self.show(kind, example)

    def show(self, key: str, example: str) -> None:
        """Keep `example` (its beginning) if there is room for one more under `key`."""
        kept = self.examples.setdefault(key, [])
        if len(kept) < MAX_EXAMPLES:
            kept.append(example if len(example) <= EXAMPLE_CHARACTERS else example[:EXAMPLE_CHARACTERS] + " ...")

    def add(self, other: Tally) -> None:
        """Add the counts of a later part."""
        self.seen += other.seen
        self.changed += other.changed
        self.dropped.update(other.dropped)
        self.found.update(other.found)
        for key, examples in other.examples.items():
            for example in examples:
                self.show(key, example)

    def to_json(self) -> dict[str, Any]:
        counts = {"dropped": dict(self.dropped), "found": dict(self.found)}
        return {"seen": self.seen, "changed": self.changed, **counts, "examples": self.examples}

    @staticmethod
    def from_json(content: dict[str, Any]) -> Tally:
        return Tally(
            content["seen"],
            content["changed"],
            Counter(content["dropped"]),
            Counter(content["found"]),
            {key: list(examples) for key, examples in content["examples"].items()},
        )
