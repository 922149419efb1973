"""Rules of two papers that tell prose from the rest of the web; made for English, by words between white space.

| rules | keeps documents with | source |
| --- | --- | --- |
| gopher | 50 to 100,000 words; 3 to 10 characters a word on average; at most 0.1 `#` a word and 0.1 ellipses a word; at most 90 % of the lines starting with a bullet, 30 % ending in an ellipsis; 80 % of the words with a letter; two of the, be, to, of, and, that, have, with | Rae et al. 2021 (arXiv:2112.11446), appendix A.1.1, quality filtering |
| gopher_repetition | at most the share of duplicate lines, paragraphs and n-grams of words in the constants below | the same, appendix A.1.1, repetition removal, and Table A1 |
| c4 | 3 sentences left of the lines it keeps: those that end in a full stop, exclamation mark, question mark or closing quotation mark but no ellipsis, hold 5 words or more, none of over 1,000 characters, and name neither Javascript nor cookies and terms; no curly bracket and no lorem ipsum in those | Raffel et al. 2020 (JMLR 21:140), section 2.2, and the code the corpus was made with |

How the papers are read where they leave it open:

- A line is one with something on it: it does not matter whether one or two line breaks part the paragraphs.
- A duplicate line, paragraph or n-gram is one that stood before: the first one is never counted.
- Characters of n-grams are those of their words, without the white space between, above and below the line.
- The most frequent n-gram counts only when it occurs twice: a short text is not repetitive because it is short.
- C4's lists of bad words are left out: they are not ours to ship, and Dodge et al. 2021 (arXiv:2104.08758) found
  that they remove texts about minorities more often than others. 5 words and 3 sentences are what the code of the
  published corpus says; the first version of the paper, and datatrove, have 3 words and 5 sentences.
"""  # noqa: E501 - a table's rows cannot be broken

from __future__ import annotations

import itertools
import re
from collections import Counter
from typing import NamedTuple

import numpy as np

MIN_WORDS, MAX_WORDS = 50, 100_000
MIN_MEAN_WORD_LENGTH, MAX_MEAN_WORD_LENGTH = 3, 10  # characters
MAX_SYMBOLS_PER_WORD = 0.1  # of each of `#` and the ellipsis
MAX_BULLET_LINES = 0.9  # share of the lines
MAX_ELLIPSIS_LINES = 0.3  # share of the lines
MIN_ALPHABETIC_WORDS = 0.8  # share of the words
MIN_STOP_WORDS = 2  # different ones
STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
BULLETS = ("•", "‣", "▪", "●", "◦", "-", "* ")  # `***` is emphasis
ELLIPSES = ("...", "…")

# Table A1 of Rae et al. 2021
MAX_DUPLICATE_LINES = 0.30  # share of the lines
MAX_DUPLICATE_PARAGRAPHS = 0.30  # share of the paragraphs
MAX_DUPLICATE_LINE_CHARACTERS = 0.20
MAX_DUPLICATE_PARAGRAPH_CHARACTERS = 0.20
MAX_TOP_NGRAM_CHARACTERS = {2: 0.20, 3: 0.18, 4: 0.16}  # n -> share of the characters
MAX_DUPLICATE_NGRAM_CHARACTERS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
REPETITION_WORDS = 1_000_000  # n-grams are counted in so many words of a document, from its start: bounds the memory

C4_MIN_WORDS = 5  # in a line
C4_MAX_WORD_LENGTH = 1000  # characters
C4_MIN_SENTENCES = 3
C4_LINE_ENDS = (".", "?", "!", '"', "'", "”", "’")
C4_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")

_PARAGRAPHS = re.compile(r"\n\s*\n")
_LONG_WORD = re.compile(rf"\S{{{C4_MAX_WORD_LENGTH + 1}}}")
_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
# An end mark, closing quotes or brackets and white space; or a capital right after it, where a space was forgotten.
_SENTENCE_END = re.compile(r"[.?!]+(?:[\"')\]”’]*\s+|(?<=[a-z][.?!])(?=[A-Z][a-z]))")
# Ends of that kind that are none: titles, initials, abbreviations, and an ellipsis before a small letter.
_NO_END = re.compile(
    r"(?<![^\s(\"'“‘])(?:[A-Z]|Mr|Mrs|Ms|Dr|St|Prof|Sen|Rep|Gen|Jr|Sr|vs|No|e\.g|i\.e|cf)\.\s+|\.\.+\s+(?=[a-z])"
)


class Failure(NamedTuple):
    """Why a document is refused: the rule, without numbers so that it can be counted, and what was measured."""

    reason: str
    measured: str


def gopher(text: str) -> Failure | None:
    """The first quality rule of Rae et al. 2021 that `text` breaks, or None."""
    words = text.split(maxsplit=MAX_WORDS + 1)  # a book of a million words is not cut up to be refused
    if len(words) < MIN_WORDS:
        return Failure("gopher: too few words", f"{len(words)} < {MIN_WORDS}")
    if len(words) > MAX_WORDS:
        return Failure("gopher: too many words", f"> {MAX_WORDS:,}")
    mean = sum(map(len, words)) / len(words)
    if not MIN_MEAN_WORD_LENGTH <= mean <= MAX_MEAN_WORD_LENGTH:
        expected = f"< {MIN_MEAN_WORD_LENGTH}" if mean < MIN_MEAN_WORD_LENGTH else f"> {MAX_MEAN_WORD_LENGTH}"
        return Failure("gopher: mean word length", f"{mean:.1f} {expected}")
    for name, symbols in (("hash signs", ("#",)), ("ellipses", ELLIPSES)):
        share = sum(map(text.count, symbols)) / len(words)
        if share > MAX_SYMBOLS_PER_WORD:
            return Failure(f"gopher: {name} per word", f"{share:.2f} > {MAX_SYMBOLS_PER_WORD}")
    lines = _lines(text)
    share = sum(line.startswith(BULLETS) for line in lines) / len(lines)
    if share > MAX_BULLET_LINES:
        return Failure("gopher: lines starting with a bullet", f"{share:.1%} > {MAX_BULLET_LINES:.0%}")
    share = sum(line.endswith(ELLIPSES) for line in lines) / len(lines)
    if share > MAX_ELLIPSIS_LINES:
        return Failure("gopher: lines ending in an ellipsis", f"{share:.1%} > {MAX_ELLIPSIS_LINES:.0%}")
    # Most words start with a letter: only the others are looked at character by character.
    unsure = [word for word in words if not word[0].isalpha()]
    share = 1 - sum(not any(map(str.isalpha, word)) for word in unsure) / len(words)
    if share < MIN_ALPHABETIC_WORDS:
        return Failure("gopher: words with a letter", f"{share:.1%} < {MIN_ALPHABETIC_WORDS:.0%}")
    found = len(STOP_WORDS.intersection(words))
    if found < MIN_STOP_WORDS:
        return Failure("gopher: stop words", f"{found} < {MIN_STOP_WORDS}")
    return None


def gopher_repetition(text: str) -> Failure | None:
    """The first repetition rule of Rae et al. 2021, Table A1, that `text` breaks, or None."""
    for name, parts, max_parts, max_characters in (
        ("paragraphs", _paragraphs(text), MAX_DUPLICATE_PARAGRAPHS, MAX_DUPLICATE_PARAGRAPH_CHARACTERS),
        ("lines", _lines(text), MAX_DUPLICATE_LINES, MAX_DUPLICATE_LINE_CHARACTERS),
    ):
        share, share_of_characters = _duplicate_shares(parts)
        if share > max_parts:
            return Failure(f"gopher_repetition: duplicate {name}", f"{share:.1%} > {max_parts:.0%}")
        if share_of_characters > max_characters:
            measured = f"{share_of_characters:.1%} > {max_characters:.0%}"
            return Failure(f"gopher_repetition: characters in duplicate {name}", measured)
    return _ngram_failure(text.split(maxsplit=REPETITION_WORDS)[:REPETITION_WORDS])


def c4(text: str, dropped_lines: Counter[str]) -> tuple[str, Failure | None]:
    """The lines of `text` that C4 keeps, and why the whole is refused, if it is; counts the lines it drops by reason.

    The order of the rules is that of the code the corpus was made with: a curly bracket or a lorem ipsum refuses the
    document only where the line would have been kept.
    """
    kept, num_sentences = [], 0
    for line in text.split("\n"):
        line = line.strip()
        if not line:
            continue
        line = _CITATION.sub("", line)
        reason = _c4_line(line)
        if reason is not None:
            dropped_lines[reason] += 1
            continue
        lowered = line.lower()
        if "lorem ipsum" in lowered:
            return text, Failure("c4: lorem ipsum", line[:80])
        if "javascript" in lowered:
            dropped_lines["c4: line with Javascript"] += 1
        elif "{" in line:
            return text, Failure("c4: curly bracket", line[:80])
        elif any(phrase in lowered for phrase in C4_POLICY):
            dropped_lines["c4: line about cookies or terms"] += 1
        else:
            kept.append(line)
            num_sentences += count_sentences(line)
    if num_sentences < C4_MIN_SENTENCES:
        return text, Failure("c4: too few sentences", f"{num_sentences} < {C4_MIN_SENTENCES}")
    return "\n".join(kept), None


def count_sentences(line: str) -> int:
    """Sentences in a line of prose, of which the last may lack its end mark."""
    line = line.rstrip()
    ends = len(_SENTENCE_END.findall(line))
    return max(1, 1 + ends - len(_NO_END.findall(line))) if ends else 1


def _c4_line(line: str) -> str | None:
    """Why C4 drops this line, or None."""
    if len(line) > C4_MAX_WORD_LENGTH and _LONG_WORD.search(line):
        return "c4: line with a word of over 1,000 characters"
    if not line.endswith(C4_LINE_ENDS) or line.endswith("..."):
        return "c4: line without an end mark"
    if len(line.split(maxsplit=C4_MIN_WORDS - 1)) < C4_MIN_WORDS:
        return "c4: line of fewer than 5 words"
    return None


def _lines(text: str) -> list[str]:
    """Lines without the white space around them; empty ones left out."""
    return [stripped for line in text.split("\n") if (stripped := line.strip())]


def _paragraphs(text: str) -> list[str]:
    """What stands between empty lines, without the white space around it."""
    if "\n" not in text:
        return [text.strip()]
    return [stripped for paragraph in _PARAGRAPHS.split(text) if (stripped := paragraph.strip())]


def _duplicate_shares(parts: list[str]) -> tuple[float, float]:
    """Share of `parts` that stood before, and of their characters."""
    distinct = set(parts)
    if len(distinct) == len(parts):
        return 0.0, 0.0
    return 1 - len(distinct) / len(parts), 1 - sum(map(len, distinct)) / sum(map(len, parts))


def _ngram_failure(words: list[str]) -> Failure | None:
    """The first n-gram rule that is broken.

    An n-gram is repeated only where both (n-1)-grams in it are, and is named by their two ranks: so n goes up by
    sorting pairs of numbers, of fewer places each time, as suffix arrays are built by doubling. Exact, no hashes.
    """
    num_words = len(words)
    before = np.zeros(num_words + 1, np.int64)  # characters before each word
    np.cumsum(np.fromiter(map(len, words), np.int64, num_words), out=before[1:])
    ids = dict(zip(set(words), itertools.count(), strict=False))  # numbered in any order: the result is the same
    ranks = np.fromiter(map(ids.__getitem__, words), np.int64, num_words)
    num_ranks = len(ids)
    places = np.arange(num_words)  # first words of the n-grams that are looked at
    for n in range(2, max(MAX_DUPLICATE_NGRAM_CHARACTERS) + 1):
        follows = np.flatnonzero(places[1:] - places[:-1] == 1)
        places = places[follows]
        keys = ranks[follows] * num_ranks + ranks[follows + 1]
        order = np.argsort(keys)
        is_new = np.ones(len(keys), bool)  # in sorted order: the first of its n-gram
        np.not_equal(keys[order[1:]], keys[order[:-1]], out=is_new[1:])
        groups = np.flatnonzero(is_new)
        num_ranks = len(groups)
        if num_ranks == len(keys):
            return None  # no n-gram is repeated, so no longer one is
        counts = np.diff(groups, append=len(keys))
        firsts = np.minimum.reduceat(order, groups)  # where each n-gram stands first
        if n in MAX_TOP_NGRAM_CHARACTERS:
            limit, name = MAX_TOP_NGRAM_CHARACTERS[n], f"the most frequent {n}-gram"
            most = counts.max()
            top = places[firsts[counts == most].min()]
            characters = most * (before[top + n] - before[top])
        else:
            limit, name = MAX_DUPLICATE_NGRAM_CHARACTERS[n], f"duplicate {n}-grams"
            is_duplicate = np.ones(len(keys), bool)
            is_duplicate[firsts] = False
            characters = _covered(places[is_duplicate], n, before)
        share = float(characters / before[-1])
        if share > limit:
            return Failure(f"gopher_repetition: characters in {name}", f"{share:.1%} > {limit:.0%}")
        ranks = np.empty(len(keys), np.int64)
        ranks[order] = np.cumsum(is_new) - 1
        is_repeated = counts[ranks] > 1
        places, ranks = places[is_repeated], ranks[is_repeated]
    return None


def _covered(places: np.ndarray, n: int, before: np.ndarray) -> int:
    """Characters of the words in the n-grams at `places` (num_places,), which ascend; each word once."""
    ends = places + n
    starts = places.copy()
    np.maximum(places[1:], ends[:-1], out=starts[1:])
    return int((before[ends] - before[starts]).sum())
