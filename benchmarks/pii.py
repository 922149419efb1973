"""Personal data: precision and recall on the labelled set, and speed: `python -m benchmarks.pii DATA`.

DATA is a folder with pretrain/novels.valid.jsonl.zst, pretrain/reviews.jsonl.zst and tasks/newsgroups/dev.jsonl.zst
(records of `text`). A span counts as right with the same start, end and kind. Speed is MB of UTF-8 a second of
processor time on one core: the median of the rounds, with the range, contestants one after the other in each round.
The peer is datatrove's PIIFormatter (e-mail and public IP addresses only), left out where it is not installed; of it
only the output is known, so what is counted is how many of the marked addresses are gone from it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from data_pipeline.files import open_bytes
from data_pipeline.pii import KINDS, find, redact
from data_pipeline.tally import Tally
from tests.data_pipeline.pii_labelled import Labelled, labelled_texts, scores

CORPORA = {
    "novels": "pretrain/novels.valid.jsonl.zst",
    "reviews": "pretrain/reviews.jsonl.zst",
    "newsgroups": "tasks/newsgroups/dev.jsonl.zst",
}
MAX_TEXTS = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    print(quality_table(labelled_texts()))
    contestants: dict[str, Callable[[str], object]] = {
        "all kinds": lambda text: redact(text, KINDS, Tally()),
        "email, ip": lambda text: redact(text, ["email", "ip"], Tally()),
    }
    if importlib.util.find_spec("datatrove"):
        from datatrove.pipeline.formatters import PIIFormatter

        contestants["datatrove: email, ip"] = PIIFormatter().format
        print(peer_table(labelled_texts(), PIIFormatter().format))
    print(speed_table(arguments.data, contestants, arguments.rounds))


def quality_table(texts: list[Labelled]) -> str:
    rows = ["| kind | half | right | wrong | missed | precision | recall |", "|---|---|---|---|---|---|---|"]
    for name, held_out in (("developed on", False), ("held out", True)):
        half = [labelled for labelled in texts if labelled.held_out == held_out]
        for kind, score in scores(half, lambda text: find(text, KINDS)).items():
            counts = f"{score.right} | {score.wrong} | {score.missed}"
            rows.append(f"| {kind} | {name} | {counts} | {score.precision:.3f} | {score.recall:.3f} |")
    return "\n".join(rows) + "\n"


def peer_table(texts: list[Labelled], peer: Callable[[str], str]) -> str:
    """Marked values that are gone from the output, and unmarked texts that are changed."""
    rows = ["| e-mail and IP addresses | of marked ones gone | of texts with no such mark changed |", "|---|---|---|"]
    for name, replace in (("ours", lambda text: redact(text, ["email", "ip"], Tally())), ("datatrove", peer)):
        gone = marked = changed = unmarked = 0
        for labelled in texts:
            values = [labelled.text[start:stop] for start, stop, kind in labelled.spans if kind in ("email", "ip")]
            output = replace(labelled.text)
            marked += len(values)
            gone += sum(value not in output for value in values)
            unmarked += not values
            changed += not values and output != labelled.text
        rows.append(f"| {name} | {gone} of {marked} | {changed} of {unmarked} |")
    return "\n".join(rows) + "\n"


def speed_table(data: Path, contestants: dict[str, Callable[[str], object]], rounds: int) -> str:
    rows = [f"| text | {' | '.join(contestants)} |", "|---" * (len(contestants) + 1) + "|"]
    for corpus, file in CORPORA.items():
        with open_bytes(str(data / file)) as opened:
            texts = [json.loads(line)["text"] for line, _ in zip(opened, range(MAX_TEXTS), strict=False)]
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        speeds: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(rounds):
            for name, replace in contestants.items():
                began = time.process_time()
                for text in texts:
                    replace(text)
                speeds[name].append(megabytes / (time.process_time() - began))
        cells = [f"{statistics.median(s):.1f} ({min(s):.1f} to {max(s):.1f})" for s in speeds.values()]
        rows.append(f"| {corpus}, {megabytes:.0f} MB | {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
