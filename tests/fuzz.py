"""Broken files out of sound ones, reproducibly: bytes of any file, and values anywhere in JSON."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

WORDS = (
    b"", b"\0", b"\n", b"\r", b'"', b"{", b"}", b"[" * 3000, b",", b":", b"-1", b"1e999", b"NaN", b"null", b"\xff\xfe",
    b"\xed\xa0\x80", b"../../x", b"/etc/hostname", b"99999999999999999999", b"\t", b"*a", b"&a ", b"!!python/name:os ",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2**63, 10**30, 1.5, float("nan"), "", "../x", "/etc/hostname", ".", "x\0y", "\ud800", [], {},
    [[]], ["a"], {"a": 1},
)  # fmt: skip


def broken_bytes(content: bytes, count: int) -> Iterator[bytes]:
    """`count` variants: bits flipped, ends cut off, pieces removed, doubled or replaced by WORDS; some have several."""
    rng = random.Random(len(content))
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            at = rng.randrange(len(changed) + 1)
            size = min(len(changed) - at, rng.choice((1, 1, 4, 16, 100)))
            match rng.randrange(6):
                case 0 if at < len(changed):
                    changed[at] ^= 1 << rng.randrange(8)
                case 1:
                    del changed[at:]
                case 2:
                    del changed[at : at + size]
                case 3:
                    changed[at:at] = changed[at : at + size]
                case _:
                    changed[at : at + size] = rng.choice(WORDS)
        yield bytes(changed)


def broken_values(value: Any, count: int) -> Iterator[Any]:
    """`count` copies of a JSON value in each of which one node, at any depth, is another value, gone or doubled."""
    rng = random.Random(count)
    for _ in range(count):
        changed = [copy.deepcopy(value)]
        parents = list(_parents(changed))
        parent, key = rng.choice(parents)
        match rng.randrange(5):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, list):
                parent.append(parent[key])
            case _:
                parent[key] = rng.choice(VALUES)
        if changed:
            yield changed[0]


def _parents(node: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key or index) of every node below `node`."""
    for key, child in node.items() if isinstance(node, dict) else enumerate(node):
        yield node, key
        if isinstance(child, dict | list):
            yield from _parents(child)
