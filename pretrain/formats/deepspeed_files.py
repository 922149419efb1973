"""Checkpoints of others' DeepSpeed runs: recognised and refused, with the way around.

They are pickles of DeepSpeed's and the trainer's own objects (loss scalers, random states, arguments), which cannot be
read without running code that they name. DeepSpeed leaves a script beside them that writes safetensors, to be run where
the checkpoint was made and is trusted.
"""

from __future__ import annotations

from pathlib import Path

from pretrain.formats.weights import FormatError

PATTERNS = ("*_model_states.pt", "*_optim_states.pt")


def refuse(place: Path) -> None:
    """Raise FormatError if `place` is a DeepSpeed checkpoint, or the folder of one."""
    folders = [place, *sorted(place.glob("global_step*"))] if place.is_dir() else [place.parent]
    names = [place.name] if place.is_file() else []
    if any(any(folder.glob(pattern)) for folder in folders for pattern in PATTERNS) and (
        place.is_dir() or any(name.endswith(pattern[1:]) for name in names for pattern in PATTERNS)
    ):
        raise FormatError(
            f"{place}: is a DeepSpeed checkpoint, pickles that are not read, because loading them can run code. Where "
            f"it was made, run `python zero_to_fp32.py . DIR --safe_serialization` in its folder, put the model's "
            f"config.json and tokenizer into DIR, and import DIR"
        )
