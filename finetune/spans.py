"""Tags of words and the spans they stand for: BIO, BIOES and IO, entity scores, and the best legal sequence. Pure.

A tag is O, or a place and a type: B(egin), I(nside), E(nd) or S(ingle), as in B-person. Sequences that no scheme allows
are read as conlleval and seqeval's default do: a type that begins in the middle begins a span.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

OUTSIDE = "O"
PLACES = frozenset("BIES")
Span = tuple[str, int, int]  # type, first word, word behind the last one


def are_spans(tags: Iterable[str]) -> bool:
    """Whether tags look like those of spans: every one is O or has a place and a type, and some have."""
    seen = set(tags)
    return seen != {OUTSIDE} and all(tag == OUTSIDE or (tag[:1] in PLACES and tag[1:2] == "-") for tag in seen)


def read_spans(tags: Sequence[str]) -> list[Span]:
    spans: list[Span] = []
    begin, last_place, last_type = None, OUTSIDE, ""
    for word, tag in enumerate([*tags, OUTSIDE]):
        place, _, kind = tag.partition("-")
        begins = place != OUTSIDE and (place in "BS" or last_place in "OES" or kind != last_type)
        if begin is not None and (begins or place == OUTSIDE):
            spans.append((last_type, begin, word))
            begin = None
        if begins:
            begin = word
        last_place, last_type = place, kind
    return spans


def write_tags(spans: Iterable[Span], num_words: int, scheme: str) -> list[str]:
    """Tags of a scheme, BIO, BIOES or IO. In IO neighbours of one type become one span."""
    tags = [OUTSIDE] * num_words
    for kind, begin, end in spans:
        tags[begin:end] = [f"I-{kind}"] * (end - begin)
        if scheme in ("BIO", "BIOES"):
            tags[begin] = f"B-{kind}"
        if scheme == "BIOES":
            tags[end - 1] = f"E-{kind}" if end - begin > 1 else f"S-{kind}"
    return tags


def scheme_of(tags: Iterable[str]) -> str:
    """The scheme that the tags are written in, by the places that occur."""
    places = {tag[0] for tag in tags if tag != OUTSIDE}
    if places & set("ES"):
        return "BIOES"
    return "BIO" if "B" in places else "IO"


def entity_scores(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 over all spans (a span counts if type and both ends are right), and F1 of each type.

    These are seqeval's micro averages in its default mode, and conlleval's.
    """
    right: Counter[str] = Counter()
    of_truth: Counter[str] = Counter()
    of_prediction: Counter[str] = Counter()
    for one, other in zip(true, predicted, strict=True):
        spans, found = set(read_spans(one)), set(read_spans(other))
        of_truth.update(kind for kind, _, _ in spans)
        of_prediction.update(kind for kind, _, _ in found)
        right.update(kind for kind, _, _ in spans & found)
    precision, recall, f1 = _scores(right.total(), of_prediction.total(), of_truth.total())
    scores = {"f1": f1, "precision": precision, "recall": recall}
    for kind in sorted(of_truth):
        scores[f"f1_{kind}"] = _scores(right[kind], of_prediction[kind], of_truth[kind])[2]
    return scores


def _scores(right: int, predicted: int, true: int) -> tuple[float, float, float]:
    precision, recall = right / predicted if predicted else 0.0, right / true if true else 0.0
    return precision, recall, 2 * precision * recall / (precision + recall) if right else 0.0


def allowed(names: Sequence[str], scheme: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which tags may follow each other, begin and end a sentence: bool (tags, tags) [from, to], (tags,), (tags,)."""
    parts = [name.partition("-") for name in names]
    follow = np.ones((len(names), len(names)), dtype=bool)
    begin, end = np.ones(len(names), dtype=bool), np.ones(len(names), dtype=bool)
    if scheme == "IO":
        return follow, begin, end
    for there, (place, _, kind) in enumerate(parts):
        inside = place in "IE"
        begin[there] = not inside
        for here, (before, _, kind_before) in enumerate(parts):
            goes_on = before in "BI" and kind_before == kind
            open_span = scheme == "BIOES" and before in "BI"
            follow[here, there] = goes_on if inside else not open_span
        end[there] = not (scheme == "BIOES" and place in "BI")
    return follow, begin, end


def best_sequence(scores: np.ndarray, follow: np.ndarray, begin: np.ndarray, end: np.ndarray) -> list[int]:
    """The tags of the highest total of `scores`, (words, tags) log probabilities, among legal sequences (Viterbi 1967).

    Of a sentence without a legal sequence (BIOES cut off in the middle) the single best ones are taken.
    """
    total = np.where(begin, scores[0], -np.inf)
    back = []
    for row in scores[1:]:
        ways = np.where(follow, total[:, None], -np.inf)  # (from, to)
        back.append(ways.argmax(0))
        total = ways.max(0) + row
    total = np.where(end, total, -np.inf)
    if not np.isfinite(total.max()):
        return scores.argmax(1).tolist()
    path = [int(total.argmax())]
    for origins in reversed(back):
        path.append(int(origins[path[-1]]))
    return path[::-1]
