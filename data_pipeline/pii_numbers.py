"""Personal data made of digits, for `pii.py`: bank cards and accounts, IP addresses, phone numbers.

Digits are rare in prose. `digit_runs` finds the places worth a look at the speed of a search for one class of
characters; the rules see only these. Cards and accounts have checksums, IPv4 addresses are four small numbers; a phone
number has no mark of its own, so it has to be written like one (an international prefix, the groups of a national
form) or to stand behind a word like `tel.`; dates, ISBNs, scores, ranges and rows of tables do neither.

A library of all countries' numbering plans (phonenumbers, 48 MB) was tried as a second step and left out: of 69
international numbers found in 2 MB of Usenet and in the labelled set it calls 15 invalid, and those were right; for
the others it would have to be told the country.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

Span = tuple[int, int]  # start, stop in the text
Runs = list[Span]

# Space, no-break spaces, the dashes of Unicode, and what else stands between the groups of a number.
SEPARATOR = r"[ \u00a0\u202f\u2010-\u2015./()-]"
_RUN = re.compile(rf"[+(0-9](?:{SEPARATOR}{{0,3}}[0-9]){{4,}}+")
_OTHER_DIGIT = re.compile("[\u0660-\u0669\u06f0-\u06f9\u0966-\u096f\uff10-\uff19]")
_OTHER_NUMBER = re.compile(rf"\uff0b?{_OTHER_DIGIT.pattern}(?:[\uff0d\uff08\uff09]?{_OTHER_DIGIT.pattern})*")
_TO_ASCII: dict[int, str] = {
    ord(digit): str(i % 10) for i, digit in enumerate("٠١٢٣٤٥٦٧٨٩۰۱۲۳۴۵۶۷۸۹०१२३४५६७८९０１２３４５６７８９")
}
_TO_ASCII |= {0xFF0D: "-", 0xFF08: "(", 0xFF09: ")", 0xFF0B: "+"}  # full-width signs
# A number does not begin inside of a word; letters of scripts without spaces may touch it.
WORD = r"A-Za-z0-9_\u00c0-\u024f"
# A replaced number is a neighbour as it was before, so what it kept from being found is not found now.
_NO_TAG_BEFORE = "(?<!PHONE>)(?<!CARD>)(?<!IP>)"
_NO_TAG_TOUCHING = "(?<!PHONE>[ .,:-])(?<!CARD>[ .,:-])(?<!IP>[ .,:-])"
_TAG = "<(?:PHONE|CARD|IP)>"
LOOK_AHEAD = 9  # characters behind a run that the patterns look at: a separator and a replaced number


def with_ascii_digits(text: str) -> str:
    """`text` with Arabic, Devanagari and full-width digits as 0-9; as long as before, so that spans fit both."""
    if text.isascii() or not _OTHER_DIGIT.search(text):
        return text
    return _OTHER_NUMBER.sub(lambda match: match[0].translate(_TO_ASCII), text)


def digit_runs(text: str) -> Runs:
    """Stretches of five or more digits with at most three separators between two of them."""
    return [match.span() for match in _RUN.finditer(text)]


# --- cards and bank accounts

_CARD = re.compile(
    rf"(?<![{WORD}.])(?<![0-9][ -]){_NO_TAG_BEFORE}{_NO_TAG_TOUCHING}[2-6][0-9]{{3}}"
    r"(?:([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{4}(?:\1[0-9]{3})?|([ -])[0-9]{6}\2[0-9]{4,5}|[0-9]{10,15})"
    rf"(?![{WORD}]|\.[0-9]| ?[*^]|[ -][0-9]{{4}}|[ -]?{_TAG})"
)
_IBAN = re.compile(rf"(?<![{WORD}])[A-Z]{{2}}[0-9]{{2}}(?:[A-Z0-9]{{11,27}}|(?: [A-Z0-9]{{4}}){{2,6}} [A-Z0-9]{{1,4}})")
_IBAN_LENGTHS = {
    entry[:2]: int(entry[2:])
    for entry in (  # noqa: SIM905 - a list of 76 literals reads worse
        "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DK18 DO28 EE20 EG29 ES24 FI18 "
        "FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 "
        "LU20 LV21 LY25 MC27 MD24 ME22 MK19 MR27 MT31 MU30 NL18 NO15 PK24 PL28 PS29 PT25 QA29 RO24 RS22 SA24 SC31 SE24 "
        "SI19 SK24 SM27 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20"
    ).split()
}


def find_cards(text: str, runs: Runs) -> Iterator[Span]:
    """Numbers of an issuer's range, grouped as on the card or not at all, with a right Luhn checksum; and IBANs.

    IBAN (ISO 13616): the country's letters and two check digits, in groups of four or ungrouped, 1 modulo 97.
    """
    for start, stop in runs:
        for match in _CARD.finditer(text, start, stop + LOOK_AHEAD):
            if match.start() < stop and is_card(re.sub("[ -]", "", match[0])):
                yield match.span()
        before = text[max(0, start - 2) : start]  # a run of digits begins behind the country or the bank's letters
        if before.strip() and before[0].isalnum() and (iban := _IBAN.search(text, max(0, start - 12), stop + 36)):
            length = _IBAN_LENGTHS.get(iban[0][:2], 0)
            account = iban[0][: length + (length - 1) // 4 if " " in iban[0] else length]
            end = iban.start() + len(account)
            if is_iban(account.replace(" ", "")) and not text[end : end + 1].isalnum():
                yield iban.start(), end


def is_card(digits: str) -> bool:
    """Whether the issuer's prefix, the length (ISO/IEC 7812) and the Luhn checksum are those of a payment card.

    Without Visa's 13 and 19 digits, which are hardly in use: such numbers are EAN codes and identifiers of databases.
    """
    first, length = int(digits[:4]), len(digits)
    known = (
        (4000 <= first <= 4999 and length == 16)  # Visa
        or ((5100 <= first <= 5599 or 2221 <= first <= 2720) and length == 16)  # Mastercard
        or ((3400 <= first <= 3499 or 3700 <= first <= 3799) and length == 15)  # American Express
        or ((3000 <= first <= 3059 or 3600 <= first <= 3699 or 3800 <= first <= 3999) and length == 14)  # Diners Club
        or ((3528 <= first <= 3589 or first == 6011 or 6440 <= first <= 6599) and length == 16)  # JCB, Discover
        or (2200 <= first <= 2204 and length == 16)  # Mir
        or (6200 <= first <= 6299 and length in (16, 19))  # UnionPay
        or (first // 100 in (50, 56, 57, 58, 67) and length == 16)  # Maestro
    )
    return known and luhn(digits)


def luhn(digits: str) -> bool:
    """The checksum of ISO/IEC 7812-1: from the right, every second digit doubled and its own digits added."""
    total = 0
    for position, digit in enumerate(reversed(digits)):
        value = int(digit) << (position & 1)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def is_iban(account: str) -> bool:
    """Whether the length is the country's and the number, with letters as 10 to 35, is 1 modulo 97 (ISO 13616)."""
    if len(account) != _IBAN_LENGTHS.get(account[:2]):
        return False
    return int("".join(str(int(symbol, 36)) for symbol in account[4:] + account[:4])) % 97 == 1


# --- IP addresses

_IPV4 = re.compile(
    rf"(?<![{WORD}])(?<![A-Za-z_\u00c0-\u024f][./-])(?<![0-9]\.)(?<![=!<>~^]=){_NO_TAG_BEFORE}(?:[0-9]{{1,3}}\.){{3}}[0-9]{{1,3}}"
    rf"(?![{WORD}]|\.[0-9]|-[0-9]*[A-Za-z]|\.?{_TAG})"
)
# Global unicast addresses are those of 2000::/3. The anchor is a colon: hexadecimal digits are too common.
_IPV6 = re.compile(
    rf":(?<=(?<![{WORD}:.])[23][0-9A-Fa-f]{{3}}:)(?:[0-9A-Fa-f]{{0,4}}:){{1,6}}[0-9A-Fa-f]{{0,4}}(?![{WORD}:])"
)
_VERSION_BEFORE = re.compile(
    r"(?<![A-Za-z])(?:versions?|ver\.?|v\.|releases?|firmware|builds?|drivers?|sections?|sec\.|§|chapters?|articles?|clauses?|oid)"
    r"[ :=]{0,3}$",
    re.IGNORECASE,
)
_PUBLIC_RESOLVERS = {"208.67.222.222", "208.67.220.220"}  # the others are small numbers, see below
SMALLEST_OCTET = 20


def find_ips(text: str, runs: Runs) -> Iterator[Span]:
    """Addresses that belong to somebody: not those of private networks, loopback, documentation, multicast.

    Four numbers all below 20 are taken for a version or a section: that is one real address in 27,000, and public name
    servers (8.8.8.8). So are four numbers behind a word such as `version`, `name/` or `name-`.
    """
    for start, stop in runs:
        for match in _IPV4.finditer(text, start, stop + LOOK_AHEAD):
            before = text[max(0, match.start() - 20) : match.start()]
            if match.start() < stop and _is_personal(match[0]) and not _VERSION_BEFORE.search(before):
                yield match.span()
    for match in _IPV6.finditer(text):
        if _is_personal(text[match.start() - 4 : match.end()]):
            yield match.start() - 4, match.end()


def _is_personal(written: str) -> bool:
    try:
        address = ipaddress.ip_address(written)
    except ValueError:
        return False
    if not address.is_global or address.is_multicast or written in _PUBLIC_RESOLVERS:
        return False
    return address.version == 6 or max(address.packed) >= SMALLEST_OCTET


# --- phone numbers

_S = r"[ \u00a0\u202f\u2010-\u2015./-]"  # between two groups of a number
# In front of a number: no word, amount, path or decimal point; a bracket may follow a word, as in `fax(03)`.
_BEFORE = (
    rf"(?:(?<![{WORD}#$€£¥=+/@-])(?<![0-9][.,:])|(?<=[A-Za-z])(?=\([0-9]{{2,4}}\))){_NO_TAG_BEFORE}{_NO_TAG_TOUCHING}"
)
_AFTER = rf"(?![{WORD}%°])(?![.,:/\u2010-\u2015-]?(?:[0-9]|{_TAG}))"
_INTERNATIONAL = re.compile(
    rf"{_BEFORE}\(?(?P<prefix>\+|00)(?P<gap>{_S})?\(?(?P<number>[1-9](?:{SEPARATOR}{{0,3}}[0-9]){{6,16}}){_AFTER}"
)
_NATIONAL = re.compile(
    rf"""{_BEFORE}(?:
    (?P<nanp>(?:\+?1{_S})?(?:\([2-9][0-9]{{2}}\){_S}{{0,2}}|[2-9][0-9]{{2}}{_S})[2-9][0-9]{{2}}{_S}[0-9]{{4}})
    |(?P<trunk>\(?0[1-9][0-9]{{0,4}}+(?:(?:\){_S}?|{_S}(?:[/-]{_S})?)[0-9]{{2,8}}+){{1,5}}(?:-[0-9])?)
    |(?P<turkish>0{_S}5[0-9]{{2}}{_S}[0-9]{{3}}{_S}[0-9]{{2}}{_S}[0-9]{{2}})
    |(?P<russian>8{_S}?\(?[3489][0-9]{{2}}\)?{_S}?[0-9]{{3}}{_S}[0-9]{{2}}{_S}[0-9]{{2}})
    |(?P<chinese>1[3-9][0-9]{_S}[0-9]{{4}}{_S}[0-9]{{4}})
    |(?P<area>\([1-9][0-9]{{1,2}}\){_S}?[0-9]{{4,5}}-[0-9]{{4}})
    ){_AFTER}""",
    re.VERBOSE,
)
# Numbers written with spaces alone, with another number at one space's distance, are rows of a table.
_NUMBER_BEFORE = re.compile(r"[0-9][ \u00a0\u202f]$")
_NUMBER_AFTER = re.compile(rf"[ \u00a0\u202f](?:[0-9]|{_TAG})")
_HEXADECIMAL_BEFORE, _HEXADECIMAL_AFTER = re.compile(r"\b[0-9a-fA-F]{2}\s$"), re.compile(r"\s[0-9a-fA-F]{2}\b")
_DATE = re.compile(r"\(?[0-3]?[0-9]([-./])[0-3]?[0-9]\1(?:[12][0-9])?[0-9]{2}(?![0-9])")
_YEARS = re.compile(r"\(?(?:1[5-9]|20)[0-9]{2} ?[/\u2010-\u2015-] ?(?:1[5-9]|20)[0-9]{2}(?![0-9])")
_THOUSANDS = re.compile(r"[0-9]{1,3}(?:[ .][0-9]{3})*[ .]000$")
_NOT_TRUNK = re.compile(r"[0-9]{3}-[0-9]{2}-[0-9]{4}|[0-9]{5}-[0-9]{4}")  # U.S. social security, ZIP+4
_BEHIND_WORD = re.compile(rf"{_BEFORE}\(?[0-9](?:{SEPARATOR}{{0,3}}[0-9]){{6,12}}{_AFTER}")
_PHONE_WORD = re.compile(
    rf"""(?:(?<![{WORD}])(?!(?-i:PHONE)>)(?:
    (?P<strong> (?:tele)?phones? | (?:tele)?fax | t[eé]l(?:[eé](?:fono?|phone|fone))?s? | telefon[a-zéü]* | fone
    | cellulare | celular | m[oó]vil | whatsapp | hotline | gsm | tlf | telf | puh | тел | телефон[а-я]* | моб
    | мобильный | τηλ )
    | cell | mobile? | portable | handy | call | dial | ring | voice | cep | kom | ll[aá]m(?:a|e|ar)\ al | звоните
    )(?![{WORD}\u0370-\u052f])
    | (?P<unspaced> 电话 | 電話 | 手机 | 手機 | 携帯 | 联系方式 | 전화 | 휴대폰 | هاتف | फ़ोन )
    )(?:(?!{_TAG})[^0-9\n]){{0,15}}$""",
    re.VERBOSE | re.IGNORECASE,
)
CONTEXT_CHARACTERS = 32

# Digits after the country code, fewest and most, of those that have a code of two digits, and of +1 and +7.
_NATIONAL_DIGITS = {
    "1": (10, 10), "7": (10, 10), "20": (8, 10), "27": (9, 9), "30": (10, 10), "31": (9, 9), "32": (8, 9), "33": (9, 9),
    "34": (9, 9), "36": (8, 9), "39": (6, 11), "40": (9, 9), "41": (9, 9), "43": (7, 12), "44": (9, 10), "45": (8, 8),
    "46": (7, 10), "47": (8, 8), "48": (9, 9), "49": (7, 11), "51": (8, 9), "52": (10, 11), "53": (6, 8),
    "54": (10, 11), "55": (10, 11), "56": (9, 9), "57": (8, 10), "58": (10, 10), "60": (8, 10), "61": (9, 9),
    "62": (8, 12), "63": (8, 10), "64": (8, 10), "65": (8, 8), "66": (8, 9), "81": (9, 10), "82": (8, 10),
    "84": (9, 10), "86": (10, 11), "90": (10, 10), "91": (10, 10), "92": (9, 10), "93": (9, 9), "94": (9, 9),
    "95": (7, 10), "98": (10, 10),
}  # fmt: skip
_THREE_DIGIT_CODES = re.compile("2[1-69]|3[578]|42|5[09]|6[7-9]|8[05-8]|9[679]")  # how those begin
_OTHER_NATIONAL_DIGITS = (7, 11)


def find_phones(text: str, runs: Runs) -> Iterator[Span]:
    """Numbers with an international prefix, in a common national form, or behind a word such as `tel.`."""
    for start, stop in runs:
        end = stop + LOOK_AHEAD
        found = _INTERNATIONAL.finditer(text, max(0, start - 1), end)  # in `(+44)` the run begins behind the bracket
        spans = [span for match in found if match.start() < stop and (span := _international(match))]
        found = _NATIONAL.finditer(text, start, end)
        spans += [match.span() for match in found if match.start() < stop and _is_national(match)]
        yield from spans or _behind_phone_word(text, start, end)


def _international(match: re.Match[str]) -> Span | None:
    """The span of a number whose country has numbers of its length; what follows after a space may be cut off."""
    written = match["number"]
    if match["gap"] and len(re.findall("[0-9]+", written)) < 3:
        return None  # a sum
    before = match.string[max(0, match.start() - 2) : match.start()]
    if match["prefix"] == "00" and (written.isdigit() or _NUMBER_BEFORE.search(before)):
        return None  # any long number with zeros in front, or a group of a longer one
    while True:
        digits = re.sub("[^0-9]", "", written.replace("(0)", ""))
        code = next((digits[:n] for n in (1, 2) if digits[:n] in _NATIONAL_DIGITS), None)
        if code is None and not _THREE_DIGIT_CODES.match(digits):
            return None
        fewest, most = _NATIONAL_DIGITS[code] if code else _OTHER_NATIONAL_DIGITS
        national = digits[len(code) if code else 3 :]
        if len(national) <= most:
            valid = len(national) >= fewest and not (code == "1" and national[0] in "01")
            return (match.start(), match.start("number") + len(written)) if valid else None
        written = written.rpartition(" ")[0].rstrip(" ./(-")


def _is_national(match: re.Match[str]) -> bool:
    form, text, written = match.lastgroup, match.string, match[0]
    before, after = text[max(0, match.start() - 4) : match.start()], text[match.end() : match.end() + 8]
    alone = not _NUMBER_BEFORE.search(before) and not _NUMBER_AFTER.match(after)
    if not alone and (form == "area" or not re.search(r"[(./\u2010-\u2015-]", written)):
        return False
    groups = re.findall("[0-9]+", written)
    if form == "nanp":  # 206.768 2823 is a decimal number, 259-264 1970 pages and a year
        is_decimal = written.count(".") == 1 and "(" not in written
        return not is_decimal and not re.search("-[0-9]{3} (?:1[5-9]|20)[0-9]{2}$", written)
    if form == "trunk":
        in_dump = _HEXADECIMAL_BEFORE.search(before) and _HEXADECIMAL_AFTER.match(after)
        return not in_dump and _is_trunk(written, groups)
    if form == "area":  # (12) 1234-1245 is an issue and its pages
        return not 0 < int(groups[-1]) - int(groups[-2]) < 500
    return True


def _is_trunk(written: str, groups: list[str]) -> bool:
    """Whether a number that begins with a zero is a phone number of, say, Britain, Germany, Italy, Australia, Japan."""
    if all(len(group) == 2 for group in groups):  # France: five pairs; in ascending order they are something else
        return len(groups) == 5 and groups != sorted(groups)
    num_digits = sum(len(group) for group in groups)
    return 9 <= num_digits <= 12 and not _DATE.match(written) and not _NOT_TRUNK.fullmatch(written)


def _behind_phone_word(text: str, start: int, end: int) -> Iterator[Span]:
    match = _BEHIND_WORD.match(text, start, end)
    word = match and _PHONE_WORD.search(text[max(0, start - CONTEXT_CHARACTERS) : start])
    if not match or not word or any(form.match(match[0]) for form in (_DATE, _YEARS, _THOUSANDS)):
        return
    groups = re.findall("[0-9]+", match[0])
    named = word["strong"] or word["unspaced"]
    if (len(groups) > 1 and min(len(group) for group in groups[1:]) > 1) or (len(groups) == 1 and named):
        yield match.span()
