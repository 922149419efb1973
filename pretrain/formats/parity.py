"""The last step of an export or import: what was written gets its name only if its logits are those of the model."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pretrain.formats.weights import FormatError

TOLERANCE = 1e-4  # of the largest logit: fp32 on both sides, so only the order of additions differs


def token_ids(vocab_size: int, seq_len: int) -> torch.Tensor:
    """Random ids, (2, seq_len), the same ones each time."""
    return torch.randint(vocab_size, (2, seq_len), generator=torch.Generator().manual_seed(0))


def compare(
    ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], tolerance: float = TOLERANCE
) -> dict[str, float]:
    """What parity.json says: the largest absolute difference over all heads, the largest logit, what is allowed.

    `tolerance` is of the largest logit.
    """
    difference = max((a.float() - b.float()).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    largest = max(a.abs().max().item() for a in ours)
    return {"max_abs_logit_difference": difference, "max_abs_logit": largest, "tolerance": tolerance * largest}


@contextmanager
def writing(output: Path) -> Iterator[Path]:
    """An empty directory beside `output` to write into, gone after an error; `finish` makes it `output`."""
    aside = output.with_name(f".writing-{output.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def finish(aside: Path, output: Path, parity: dict[str, Any], what: str = "the written model's") -> None:
    """Write parity.json into `aside` and make it `output`; raises FormatError where logits differ.

    What stood at `output` before is kept then.
    """
    difference, allowed = parity["max_abs_logit_difference"], parity["tolerance"]
    if not difference <= allowed or math.isnan(allowed):
        raise FormatError(
            f"{output}: not written: {what} logits differ by {difference:.3g} from the original's "
            f"(allowed {allowed:.3g})"
        )
    (aside / "parity.json").write_text(json.dumps(parity, indent=2), encoding="utf-8")
    old = output.with_name(f".removing-{output.name}")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)  # not removed first: at a crash meanwhile there would be neither
    aside.rename(output)
    shutil.rmtree(old, ignore_errors=True)
