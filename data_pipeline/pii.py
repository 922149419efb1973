"""Find personal data and secrets in text and replace them: <EMAIL>, <PHONE>, <IP>, <CARD>, <KEY>.

Rules, no model: a corpus has terabytes, and most documents have none of it. Each kind looks for something that prose
lacks (an @, five digits, an underscore behind `ghp`) at the speed of a search for one character, and decides there.
Every pattern does bounded work at a place, so that no text, however made, takes more than linear time.
What the rules know is in the docstrings of the finders, here and in `pii_numbers.py`; names and postal addresses of
people are not looked for. Precision and recall on a labelled set: `python -m benchmarks.pii`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator
from itertools import pairwise

from data_pipeline.pii_numbers import Span, digit_runs, find_cards, find_ips, find_phones, with_ascii_digits
from data_pipeline.tally import Tally

KINDS = ("key", "email", "card", "ip", "phone")  # in the order they are looked for: the first to claim a place has it
EXAMPLE_MARGIN = 60  # characters shown on both sides of a replacement


def redact(text: str, kinds: Collection[str], tally: Tally) -> str:
    """`text` with what was found of `kinds` replaced; the same object if nothing was. Redacting again changes nothing.

    The tally counts the replacements. Its examples show the text around them, taken when all is replaced.
    """
    counts: Counter[str] = Counter()
    # A replacement may uncover something (a number that had another one for a neighbour), so until nothing is found.
    # It ends: each replacement takes away an @, a digit or a key, and puts none in.
    while spans := find(text, kinds):
        pieces, position = [], 0
        for start, stop, kind in spans:
            pieces += [text[position:start], f"<{kind.upper()}>"]
            position = stop
            counts[kind] += 1
        text = "".join(pieces) + text[position:]
    for kind, count in counts.items():
        place = max(0, text.find(f"<{kind.upper()}>"))  # not there if a private key around it was found last
        tally.find(kind, count, text[max(0, place - EXAMPLE_MARGIN) : place + EXAMPLE_MARGIN])
    return text


def find(text: str, kinds: Collection[str]) -> list[tuple[int, int, str]]:
    """Places of personal data of `kinds`: (start, stop, kind), in order, not overlapping."""
    plain = with_ascii_digits(text)
    runs = [] if {"card", "ip", "phone"}.isdisjoint(kinds) else digit_runs(plain)
    found: list[tuple[int, int, str]] = []
    taken = bytearray()  # one byte a character, once something is found
    for kind in KINDS:
        for start, stop in _spans(kind, plain, runs) if kind in kinds else ():
            taken = taken or bytearray(len(text))
            if 1 not in taken[start:stop]:
                taken[start:stop] = b"\1" * (stop - start)
                found.append((start, stop, kind))
    return sorted(found)


def _spans(kind: str, text: str, runs: list[Span]) -> Iterator[Span]:
    match kind:
        case "key":
            return find_keys(text)
        case "email":
            return find_emails(text)
        case "card":
            return find_cards(text, runs)
        case "ip":
            return find_ips(text, runs)
        case _:
            return find_phones(text, runs)


# --- e-mail addresses

# Letters of the scripts that put spaces between words; in the others a sentence may touch an address.
_LETTERS = r"A-Za-z0-9_\u00c0-\u024f\u0370-\u052f\u1e00-\u1fff"
_GENERIC = (
    "com|org|net|edu|gov|mil|int|info|biz|name|pro|aero|coop|museum|jobs|mobi|travel|cat|asia|app|dev|page|cloud|online|"
    "site|website|store|shop|tech|xyz|club|vip|live|life|world|today|space|email|mail|news|blog|media|agency|studio|"
    "design|digital|group|team|company|solutions|services|systems|software|network|support|center|education|academy|"
    "institute|university|school|finance|bank|legal|health|care|clinic|church|foundation|charity|energy|eco|green|city|"
    "social|bitnet|uucp|arpa|berlin|hamburg|koeln|bayern|wien|swiss|london|scot|paris|amsterdam|moscow|nyc|tokyo"
)
# A top-level domain is a country's two letters, one of the common others, or in another script than ours. The domain
# ends there: what goes on in small letters, or is called like the function in `q@k.to(device)`, is none.
_TOP_LEVEL = rf"(?:(?i:{_GENERIC}|[a-z]{{2}}|xn--[a-z0-9-]{{2,59}})|[^\W\d_A-Za-z\u00c0-\u024f]{{2,24}})"
_DOMAIN_END = rf"(?![{_LETTERS}]|-[A-Za-z0-9]|\.[a-z0-9]|\((?![A-Z]))"
_LABEL = r"[^\W_][\w-]{0,62}"
_AT_DOMAIN = re.compile(rf"@(?:{_LABEL}\.){{1,8}}{_TOP_LEVEL}{_DOMAIN_END}")
_DOT_IN_WORDS = r"(?:\.| ?[\[({<] ?(?i:dot|\.) ?[\])}>] ?| DOT )"
_REST_IN_WORDS = rf"(?:{_LABEL}{_DOT_IN_WORDS}){{1,8}}{_TOP_LEVEL}{_DOMAIN_END}"
_AT_IN_BRACKETS = re.compile(rf"[\[({{<] ?(?i:at) ?[\])}}>] ?{_REST_IN_WORDS}")
_AT_IN_CAPITALS = re.compile(rf" AT {_REST_IN_WORDS}")
_LOCAL_REVERSED = re.compile(rf"[{_LETTERS}.%+'-]{{0,63}}[{_LETTERS}](?![{_LETTERS}])|\w{{1,64}}")
_URL_HEAD = re.compile(r"://[^\s/@]*$")


def find_emails(text: str) -> Iterator[Span]:
    """Addresses as people write them (not all that RFC 5322 allows), in any script, and `jane (at) example (dot) org`.

    Not: `@handles` and `@user@server`, decorators, `package@1.2.3`, passwords in URLs, `git@host`.
    """
    for at, pattern in (("@", _AT_DOMAIN), ("", _AT_IN_BRACKETS), (" AT ", _AT_IN_CAPITALS)):
        if at not in text:
            continue
        for match in pattern.finditer(text):
            start = _local_start(text, match.start())
            if start is not None:
                yield start, match.end()


def _local_start(text: str, at: int) -> int | None:
    """Where the part in front of the @ begins; none if it is not that of an address."""
    if text[at] != "@" and text[at - 1 : at] == " ":
        at -= 1
    # Backwards from the @, so that the work does not depend on what else is in the text.
    local = _LOCAL_REVERSED.match(text[max(0, at - 65) : at][::-1])
    if local is None:
        return None
    start = at - local.end()
    in_url = _URL_HEAD.search(text[max(0, start - 80) : start])
    return None if in_url or text[start - 1 : start] == "@" or text[start:at] == "git" else start


# --- keys, tokens, passwords

# Each pattern begins with a character or two that are rare, which are searched for at the speed of memory; what comes
# before them is looked at then. The key begins where its word begins.
_KEYS = (
    re.compile(
        r"""_(?:
        (?<=\bgh[pousr]_)[A-Za-z0-9]{36,255}+             # GitHub
        | (?<=\bgithub_pat_)\w{40,255}+
        | (?<=\bhf_)[A-Za-z0-9]{30,40}+                   # Hugging Face
        | (?<=\bnpm_)[A-Za-z0-9]{36}
        | (?<=\b[rs]k_(?:live|test)_)[A-Za-z0-9]{16,255}+  # Stripe
        | (?<=\bdop_v1_)[0-9a-f]{64}                      # DigitalOcean
        | (?<=\bshp(?:at|ca|pa|ss)_)[0-9a-fA-F]{32}       # Shopify
        )(?![A-Za-z0-9])""",
        re.VERBOSE,
    ),
    re.compile(
        r"""-(?:
        (?<=\bsk-)(?=[\w-]{0,60}?[0-9])[\w-]{20,255}+   # OpenAI, Anthropic
        | (?<=\bxox[abeprs]-)(?=[\w-]{0,20}[0-9])[\w-]{10,255}+  # Slack
        | (?<=\bglpat-)[\w-]{20,64}+                        # GitLab
        | (?<=\bpypi-)AgE[\w-]{50,255}+
        )""",
        re.VERBOSE,
    ),
    re.compile(r"KIA(?<=\bAKIA)[0-9A-Z]{16}(?![0-9A-Za-z])"),  # Amazon
    re.compile(r"SIA(?<=\bASIA)[0-9A-Z]{16}(?![0-9A-Za-z])"),
    re.compile(r"AIza(?<=\bAIza)[\w-]{35}(?![\w-])"),  # Google
    re.compile(r"eyJ(?<=\beyJ)[\w-]{10,2000}+\.eyJ[\w-]{10,4000}+\.[\w-]{10,2000}+"),  # JSON web token, RFC 7519
    re.compile(r":AA(?<=[0-9]{8}:AA)[\w-]{33}(?![\w-])"),  # Telegram
    re.compile(r"SG\.(?<=\bSG\.)[\w-]{22}\.[\w-]{43}(?![\w-])"),  # SendGrid
    re.compile(
        r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----"
        r"(?=(?:(?!-----)[\s\S]){0,400}?[A-Za-z0-9+/=]{32})"
        r"(?:(?!-----)[\s\S]){1,20000}+-----END (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----"
    ),
)
_URL_PASSWORD = re.compile(r"""://[^\s/:@"'<>]{0,64}:([^\s/@"'<>${}]{4,64})@(?=[\w\[])""")
# What stands behind a colon or an equals sign; whether it is secret says the name in front and how random it looks.
_ASSIGNED = re.compile(
    r"""[:=]>?[ \t]{0,3}(?:(?:Bearer|Basic|Token)[ ]{1,2})?
    (?: (["'`])(?P<quoted>[^\s"'`<>{}$]{8,64})\1 | ["'`]?(?P<bare>[A-Za-z0-9+/_-]{20,255}+={0,2}+) )
    (?![\w(]|\.\w)""",
    re.VERBOSE,
)
_SECRET_NAME = re.compile(
    r"""(?: (?P<password>passw(?:or)?d|passphrase|pwd) | secret | token | credential | authorization
    | (?:api|access|private|account|auth|encryption|signing|master)[_-]?key
    )(?:s|[_-][\w-]{0,24}|(?-i:[A-Z])\w{0,24})?["'\]]{0,2}[ \t]{0,3}$""",
    re.VERBOSE | re.IGNORECASE,
)
NAME_CHARACTERS = 60


def find_keys(text: str) -> Iterator[Span]:
    """Keys with a known beginning, private key blocks, passwords in URLs, and random strings that are named a secret.

    Not: hashes, identifiers and UUIDs under other names, placeholders like YOUR_API_KEY and ${PASSWORD}.
    """
    for pattern in _KEYS:
        for match in pattern.finditer(text):
            start = match.start()
            while start and (text[start - 1].isalnum() or text[start - 1] == "_") and match.start() - start < 16:
                start -= 1
            yield start, match.end()
    if "://" in text:
        yield from (match.span(1) for match in _URL_PASSWORD.finditer(text))
    for match in _ASSIGNED.finditer(text):
        before = text[max(0, match.start() - NAME_CHARACTERS) : match.start()]
        name = _SECRET_NAME.search(before) if "public" not in before[-16:].lower() else None
        group = "bare" if match["quoted"] is None else "quoted"
        value = match[group]
        if name and (looks_random(value) or (name["password"] and group == "quoted" and _is_mixed(value))):
            yield match.span(group)


def looks_random(value: str) -> bool:
    """Whether digits, small and capital letters alternate as in hexadecimal or base64, and not as in an identifier."""
    symbols = re.sub("[^A-Za-z0-9]", "", value)
    kinds = "".join("0" if s.isdigit() else "a" if s.islower() else "A" for s in symbols)
    changes = sum(left != right for left, right in pairwise(kinds))
    enough = 0.25 if "a" not in kinds or "A" not in kinds else 0.4
    num_digits, length = kinds.count("0"), len(kinds)
    return length >= 16 and max(1, length // 16) <= num_digits < length and changes >= enough * length


def _has_digit_and_letter(value: str) -> bool:
    return any(c.isdigit() for c in value) and any(c.isalpha() for c in value)


def _is_mixed(password: str) -> bool:
    both_cases = password.lower() != password and password.upper() != password
    return _has_digit_and_letter(password) and (both_cases or not password.isalnum())
