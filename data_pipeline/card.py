"""The data card of a dataset: `stages.json` as one self-contained HTML page, for people (Pushkarna et al. 2022).

It says what the dataset is made of, under which licences, what each stage changed and dropped, with examples, and how
the tokenizer fits it. The bars are plain HTML, so the page is the same bytes wherever it is made.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Data card</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem; }}
h1 {{ font-size: 1.6rem; margin-bottom: 0; }} h2 {{ font-size: 1.15rem; margin: 2.2rem 0 .5rem; }}
.sub {{ color: #666; margin-top: .2rem; }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; margin: 1.5rem 0; }}
.tile {{ border: 1px solid #ddd; border-radius: .5rem; padding: .7rem .9rem; }}
.tile b {{ display: block; font-size: 1.4rem; white-space: nowrap; font-variant-numeric: tabular-nums; }}
.tile span {{ color: #666; }}
table {{ border-collapse: collapse; width: 100%; font-size: .93rem; }}
th {{ text-align: left; color: #666; font-weight: normal; border-bottom: 1px solid #ddd; }}
td, th {{ padding: .25rem 1rem .25rem 0; vertical-align: top; }}
td {{ border-bottom: 1px solid #f0f0f0; overflow-wrap: anywhere; }}
.n {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; overflow-wrap: normal; }}
.bar {{ width: 24rem; max-width: 100%; }}
.bar i {{ display: block; background: #1f6fb2; height: .8rem; margin-top: .35rem; }}
details {{ margin: .3rem 0 .3rem; }} summary {{ cursor: pointer; color: #1f6fb2; }}
pre {{ background: #f6f6f6; border-radius: .5rem; padding: .7rem .9rem; margin: .4rem 0; overflow-x: auto;
      white-space: pre-wrap; font-size: .85rem; overflow-wrap: anywhere; }}
</style></head><body>
<h1>Data card</h1><p class="sub">{subtitle}</p>
<div class="tiles">{tiles}</div>
{sections}
</body></html>
"""


def data_card(content: Mapping[str, Any]) -> str:
    """The page for a build's `summary` (see build_report.py)."""
    splits, tokenizer = content["splits"], content["tokenizer"]
    documents = sum(split["documents"] for split in splits.values())
    read, last = content["stages"]["read"], content["stages"]["tokenize"]
    kept = last["seen"] - sum(last["dropped"].values())  # not `documents`: some may be cut in two
    tiles = [
        (f"{documents:,}", "documents"),
        (short(sum(split["tokens"] for split in splits.values())), "tokens"),
        (f"{100 * kept / max(read['seen'], 1):.1f} %", "of the documents read were kept"),
        (f"{tokenizer['vocab_size']:,}", f"tokens in the {tokenizer['model']} vocabulary"),
    ]
    sections = [
        section("What it is made of", sources(content["sources"])),
        section("What each stage did", stages(content["stages"], content["duplicates"])),
        section("Duplicates", duplicates(content["duplicates"])) if content["duplicates"] else "",
        *(section(f"Tokens a document, {name}", lengths(split["lengths"])) for name, split in splits.items()),
        section("The tokenizer, by language", fertility(tokenizer)),
        section("Settings", f"<pre>{html.escape(yaml.safe_dump(content['settings'], sort_keys=False))}</pre>"),
    ]
    boxes = (f'<div class="tile"><b>{value}</b><span>{html.escape(what)}</span></div>' for value, what in tiles)
    names = ", ".join(f"{split['documents']:,} for {name}" for name, split in splits.items())
    return PAGE.format(
        subtitle=html.escape(names),
        tiles="".join(boxes),
        sections="\n".join(sections),
    )


def sources(found: Mapping[str, Mapping[str, Any]]) -> str:
    total = max(sum(source["characters"] for source in found.values()), 1)
    rows = [
        [
            html.escape(file),
            number(source["files"]),
            number(source["documents"]),
            number(source["characters"]),
            number(f"{100 * source['characters'] / total:.1f} %"),
            html.escape(source["licence"]),
        ]
        for file, source in found.items()
    ]
    return table(["source", "files", "documents", "characters", "share", "licence"], rows)


def stages(found: Mapping[str, Mapping[str, Any]], compared: Mapping[str, Any] | None) -> str:
    """One row a stage; reasons and what was found below it, each with its examples."""
    rows = []
    for name, tally in found.items():
        if name == "tokenize" and compared:  # after all other stages, before this one
            count = compared["exact"] + compared["near"]
            rows.append(["duplicates", number(tally["seen"] + count), number(0), number(count), "see below"])
        dropped = sum(tally["dropped"].values())
        reasons = {**tally["dropped"], **{f"{kind} (occurrences)": count for kind, count in tally["found"].items()}}
        shown = "".join(
            f"<details><summary>{html.escape(reason)}: {count:,}</summary>"
            + "".join(f"<pre>{html.escape(text)}</pre>" for text in examples(tally, reason))
            + "</details>"
            for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
        )
        rows.append([html.escape(name), number(tally["seen"]), number(tally["changed"]), number(dropped), shown])
    return table(["stage", "documents seen", "changed", "dropped", "reasons, with examples"], rows)


def examples(tally: Mapping[str, Any], reason: str) -> Sequence[str]:
    return tally["examples"].get(reason.removesuffix(" (occurrences)"), [])


def duplicates(found: Mapping[str, Any]) -> str:
    parts = [f"<p>{found['exact']:,} documents had the words of an earlier one, {found['near']:,} nearly so.</p>"]
    for kind, pairs in found["examples"].items():
        for dropped, earlier in pairs:
            parts.append(
                f"<details><summary>{html.escape(kind)}: {html.escape(dropped[:80])}</summary>"
                f"<pre>dropped: {html.escape(dropped)}</pre><pre>earlier: {html.escape(earlier)}</pre></details>"
            )
    return "".join(parts)


def lengths(histogram: Mapping[Any, int]) -> str:
    if not histogram:
        return "<p>no documents</p>"
    counts = {int(low): count for low, count in histogram.items()}
    most, low = max(counts.values()), min(counts)
    rows = []
    while low <= max(counts):
        count = counts.get(low, 0)
        rows.append([number(f"{low:,} to {2 * low - 1:,}"), number(count), bar(count / most)])
        low *= 2
    return table(["tokens", "documents", ""], rows)


def fertility(tokenizer: Mapping[str, Any]) -> str:
    """How the tokenizer fits a sample of the training text, by language; see tokenizer_report.py."""
    labels = sorted(tokenizer["labels"].items(), key=lambda item: (-item[1]["bytes"], item[0]))
    rows = [
        [
            html.escape(label),
            number(found["texts"]),
            number(f"{found['bytes_per_token']:.2f}"),
            number(f"{found['tokens_per_word']:.2f}"),
            number(f"{100 * found['unknown_share']:.2f} %"),
            number(found["round_trip_failures"]),
        ]
        for label, found in labels
    ]
    heads = ["language", "texts sampled", "bytes a token", "tokens a word", "unknown tokens", "texts not restored"]
    return table(heads, rows)


def section(title: str, body: str) -> str:
    return f"<h2>{html.escape(title)}</h2>\n{body}"


class Number(str):
    """A cell that stands to the right."""


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table of HTML cells; a column is aligned like the cell of its first row."""
    rows = list(rows)
    classes = [" class=n" if rows and isinstance(rows[0][column], Number) else "" for column in range(len(heads))]
    head = "".join(f"<th{kind}>{html.escape(name)}</th>" for name, kind in zip(heads, classes, strict=True))
    lines = ("".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(row, classes, strict=True)) for row in rows)
    return f"<table><tr>{head}</tr>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def number(value: int | str) -> Number:
    return Number(f"{value:,}" if isinstance(value, int) else html.escape(value))


def bar(share: float) -> str:
    return f'<div class="bar"><i style="width:{100 * share:.1f}%"></i></div>'


def short(value: int) -> str:
    """1,234 or 12.3 k, M, G."""
    for size, suffix in ((10**9, " G"), (10**6, " M"), (10**4, " k")):
        if value >= size:
            return f"{value / (10**3 if suffix == ' k' else size):.1f}{suffix}"
    return f"{value:,}"
