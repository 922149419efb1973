"""The stages between reading a document and tokenizing it: each repairs the text, or drops the document and says why.

A stage is a pure function of one document, so the result does not depend on what else is in the corpus nor on how the
work is divided. A process makes its stages once, which loads models and test sets, and runs its documents through them.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal

from configs.load import ConfigError
from configs.schema import CleanConfig
from data_pipeline import quality
from data_pipeline.language import NO_LANGUAGE, identify, known_languages, score_together
from data_pipeline.tally import EXAMPLE_CHARACTERS, Tally

if TYPE_CHECKING:
    from data_pipeline.decontaminate import Ngrams

MAX_NESTING = 100  # of <div> and <article> in a page whose main text is looked for; pages of the web have 20 to 40


@dataclass(frozen=True)
class Stage:
    name: str
    apply: Callable[[str, Tally], str | None]  # the text, changed or not; None: dropped, which the tally was told


def make_stages(config: CleanConfig) -> list[Stage]:
    """The stages that are on, in the order of the settings.

    Raises ConfigError for a language that cannot be identified, DataError for a test set that cannot be read.
    """
    stages = []
    if config.html:
        stages.append(Stage("html", _html_stage))
    if config.mojibake:
        stages.append(Stage("mojibake", _mojibake_stage))
    if config.unicode != "keep":
        stages.append(Stage("unicode", partial(_unicode_stage, form=config.unicode)))
    if config.languages:
        _check_languages(config.languages)
        languages, min_score = frozenset(config.languages), config.min_language_score
        stages.append(Stage("language", partial(_language_stage, languages=languages, min_score=min_score)))
    if config.quality:
        stages.append(Stage("quality", partial(_quality_stage, rules=config.quality)))
    if config.decontaminate:
        from data_pipeline.decontaminate import load_ngrams

        ngrams = load_ngrams(config.decontaminate, config.decontaminate_words)
        stages.append(Stage("decontaminate", partial(_decontaminate_stage, ngrams=ngrams)))
    if config.pii:
        stages.append(Stage("pii", partial(_pii_stage, kinds=config.pii)))
    return stages


def _check_languages(languages: list[str]) -> None:
    known = known_languages()
    unknown = [code for code in languages if code not in known]
    if unknown:
        raise ConfigError(
            f"data.build.clean.languages: {', '.join(unknown)}: cannot be identified; known: {', '.join(known)}"
        )


def clean(text: str, stages: list[Stage], tallies: dict[str, Tally]) -> str | None:
    """`text` after all stages, or None if one of them dropped it or left nothing but white space.

    `tallies`, by the stages' names, count what each of them saw, changed and dropped.
    """
    for stage in stages:
        tally = tallies.setdefault(stage.name, Tally())
        tally.seen += 1
        result = stage.apply(text, tally)
        if result is None:
            return None
        if not result or result.isspace():
            tally.drop(f"{stage.name}: no text", text)
            return None
        if result != text:
            tally.changed += 1
        text = result
    return text


# ---- html

_ELEMENTS = (
    "a|abbr|address|article|aside|b|big|blockquote|body|br|button|center|cite|code|dd|del|div|dl|dt|em|font|footer|form|"
    "h[1-6]|head|header|hr|html|i|iframe|img|input|ins|kbd|label|li|link|main|mark|meta|nav|noscript|ol|option|p|pre|q|s|"
    "samp|script|section|select|small|span|strike|strong|style|sub|sup|svg|table|tbody|td|textarea|tfoot|th|thead|title|"
    "tr|tt|u|ul|var|video"
)
_TAG = re.compile(rf"<(?=[a-z/!])(?:/?(?:{_ELEMENTS})(?:\s[^<>]*)?/?>|!--|!doctype\b)", re.IGNORECASE)
_PAGE = re.compile(r"<(?:!doctype|html|head|body|frameset)\b", re.IGNORECASE)
_BLOCK = re.compile(r"<(?:br|p|div|li|tr|pre|h[1-6]|blockquote|table|dd|hr)\b", re.IGNORECASE)
_NO_TAG = re.compile(rf"<(?!/?(?:{_ELEMENTS}|[a-z]+:[a-z]+)\b|!--|!doctype\b)", re.IGNORECASE)
_NESTING = re.compile(r"<(/?)(?:div|article)\b", re.IGNORECASE)


def html_to_text(text: str) -> str:
    """The main text of a page, without menus, scripts and footers; of a piece of HTML, all its text.

    What has no tag of HTML is returned as it is, entities too. Lists, tables and preformatted text keep their lines. A
    page from which nothing is left but menus gives the empty string; resiliparse also takes a bulleted list that stands
    less than three elements below <body> for a menu.
    """
    from resiliparse.extract.html2text import extract_plain_text

    if "<" not in text or not _TAG.search(text):
        return text
    # Looking for the main text takes quadratic time in the depth: 16,000 nested <div> take 3 s.
    is_page = bool(_PAGE.search(text))
    main_content = is_page and _depth(text) <= MAX_NESTING
    if not is_page:
        text = _NO_TAG.sub("&lt;", text)  # people write <sighs>, and i < 3
        if not _BLOCK.search(text):
            text = text.replace("\n", "<br>")  # prose with a tag here and there: its own lines are the lines
    return extract_plain_text(text, preserve_formatting=True, main_content=main_content, alt_texts=False)


def _html_stage(text: str, tally: Tally) -> str | None:
    return html_to_text(text)


def _depth(html: str) -> int:
    depth = deepest = 0
    for match in _NESTING.finditer(html):
        depth = max(0, depth - 1) if match[1] else depth + 1
        deepest = max(deepest, depth)
    return deepest


# ---- mojibake


def repair_mojibake(text: str) -> str:
    """`text` with what was decoded by the wrong encoding decoded by the right one (`cafÃ©` -> `café`), line by line.

    Only that: quotes, widths, ligatures, entities and normalisation forms stay as they are.
    """
    if text.isascii() or not _suspicious().search(text):
        return text
    import ftfy

    return ftfy.fix_text(text, _only_encoding())


def _mojibake_stage(text: str, tally: Tally) -> str | None:
    return repair_mojibake(text)


@cache
def _suspicious() -> re.Pattern[str]:
    """A pattern that is found in every text in which ftfy sees mojibake, over ten times faster than ftfy's own.

    ftfy's pattern lists sequences of characters that come of wrong decodings. Most of them hold two neighbours out of
    its categories, of which the first is no common sign (dashes, right quote) and the second no Greek or Cyrillic
    letter but one; the others hold a character of `alone`.
    """
    from ftfy.badness import MOJIBAKE_CATEGORIES as categories

    first = "".join(characters for name, characters in categories.items() if name != "common")
    letters = ("lower_common", "upper_common")
    second = "".join(characters for name, characters in categories.items() if name not in letters) + "Ђ"
    alone = categories["c1"] + "ŒœÃÂ"
    return re.compile(f"[{first}](?:[{second}]|(?<=[{alone}]))")


@cache
def _only_encoding() -> Any:
    from ftfy import TextFixerConfig

    return TextFixerConfig(
        unescape_html=False,
        remove_terminal_escapes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        fix_surrogates=False,
        remove_control_chars=False,
        normalization=None,
        explain=False,
    )


# ---- unicode

# Carriage return, vertical tab, form feed, NEL, and Unicode's line and paragraph separators end a line.
_NEWLINES = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
# C0 without tab and line feed, DEL, C1, and the byte order mark. Joiners (U+200C, U+200D) stay: emoji and many scripts
# are written with them.
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff]")


def normalise(text: str, form: Literal["NFC", "NFKC"]) -> str:
    """`text` in this normalisation form, its lines ended by line feeds, without control characters but tabs."""
    if _NEWLINES.search(text):
        text = _NEWLINES.sub("\n", text)
    if _CONTROLS.search(text):
        text = _CONTROLS.sub("", text)  # before normalising: a letter and its accent may have been parted
    return text if unicodedata.is_normalized(form, text) else unicodedata.normalize(form, text)


def _unicode_stage(text: str, tally: Tally, form: Literal["NFC", "NFKC"]) -> str | None:
    return normalise(text, form)


# ---- the stages that drop documents


def _language_stage(text: str, tally: Tally, languages: frozenset[str], min_score: float) -> str | None:
    code, score = identify(text)
    if score < min_score and code in languages and len(languages) > 1:
        score = score_together(text, languages)
    if code == NO_LANGUAGE:
        tally.drop("language: none (numbers, markup, code)", text)
    elif score < min_score:
        tally.drop("language: uncertain", _example(f"{code} {score:.2f}", text))
    elif code not in languages:
        tally.drop(f"language: {code}", text)
    else:
        tally.found[code] += 1
        return text
    return None


def _quality_stage(text: str, tally: Tally, rules: Sequence[str]) -> str | None:
    for rule in rules:
        if rule == "c4":
            dropped_lines: Counter[str] = Counter()
            text, failure = quality.c4(text, dropped_lines)
            for reason, count in dropped_lines.items():
                tally.found[reason] += count
        else:
            failure = quality.gopher(text) if rule == "gopher" else quality.gopher_repetition(text)
        if failure is not None:
            tally.drop(failure.reason, _example(failure.measured, text))
            return None
    return text


def _pii_stage(text: str, tally: Tally, kinds: Sequence[str]) -> str | None:
    from data_pipeline.pii import redact

    return redact(text, kinds, tally)


def _decontaminate_stage(text: str, tally: Tally, ngrams: Ngrams) -> str | None:
    from data_pipeline.decontaminate import contaminated_by

    file = contaminated_by(text, ngrams)
    if file is None:
        return text
    tally.drop(f"decontaminate: {file}", text)
    return None


def _example(measured: str, text: str) -> str:
    """What was measured, before the text; of a long text only what a tally keeps."""
    return f"[{measured}] {text[:EXAMPLE_CHARACTERS]}"
