"""The labelled set of personal data (data/pii.txt), and how well spans agree with it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.pii import KINDS

FILE = Path(__file__).parent / "data" / "pii.txt"
MARK = re.compile("⟦([a-z]+):(.*?)⟧", re.DOTALL)

Spans = list[tuple[int, int, str]]  # start, stop, kind


@dataclass(frozen=True)
class Labelled:
    text: str
    spans: Spans
    held_out: bool  # the rules were written without looking at it


@dataclass
class Score:
    right: int = 0  # the same start, stop and kind
    wrong: int = 0  # found, but not marked so
    missed: int = 0

    @property
    def precision(self) -> float:
        return self.right / max(1, self.right + self.wrong)

    @property
    def recall(self) -> float:
        return self.right / max(1, self.right + self.missed)


def labelled_texts() -> list[Labelled]:
    lines = [line for line in FILE.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return [parse(*line.split("\t")) for line in lines]


def parse(half: str, line: str) -> Labelled:
    line = line.replace("¦", "").replace("⏎", "\n").replace("⇥", "\t")
    pieces, spans, position, length = [], [], 0, 0
    for mark in MARK.finditer(line):
        pieces += [line[position : mark.start()], mark[2]]
        position = mark.end()
        length = sum(len(piece) for piece in pieces)
        spans.append((length - len(mark[2]), length, mark[1]))
    return Labelled("".join(pieces) + line[position:], spans, half == "h")


def scores(texts: list[Labelled], find: Callable[[str], Spans]) -> dict[str, Score]:
    """Of each kind, over all texts."""
    result = {kind: Score() for kind in KINDS}
    for labelled in texts:
        found, marked = set(find(labelled.text)), set(labelled.spans)
        for _, _, kind in found & marked:
            result[kind].right += 1
        for _, _, kind in found - marked:
            result[kind].wrong += 1
        for _, _, kind in marked - found:
            result[kind].missed += 1
    return result
