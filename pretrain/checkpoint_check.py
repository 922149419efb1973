"""What a checkpoint's manifest has to hold: its checksum proves that it is whole, not who wrote it."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, NonNegativeInt, TypeAdapter, ValidationError

from data_pipeline.manifest_check import plain_name
from pretrain.state import TrainState

MOST_ELEMENTS = 1 << 48  # of one parameter; what torch counts in 64 bits stays far above
Name = Annotated[str, AfterValidator(plain_name)]


class _File(BaseModel):
    model_config = ConfigDict(strict=True)

    bytes: NonNegativeInt
    xxh3_128: str


class _Piece(BaseModel):
    model_config = ConfigDict(strict=True)

    file: Name
    start: NonNegativeInt
    length: NonNegativeInt
    keys: list[str]


class _Parameter(BaseModel):
    model_config = ConfigDict(strict=True)

    shape: list[NonNegativeInt]
    pieces: list[_Piece]


class _Manifest(BaseModel):
    model_config = ConfigDict(strict=True)

    state: dict[str, Any]
    facts: dict[str, Any]
    files: dict[Name, _File]
    parameters: dict[str, _Parameter]


def manifest_fault(manifest: Any) -> str | None:
    """What is wrong in a parsed manifest of the current format: a key, what it is, what was expected. None: nothing."""
    try:
        found = _Manifest.model_validate(manifest)
        TypeAdapter(TrainState).validate_python(found.state)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        return f"{key}={first['input']!r:.100}: {first['msg'].removeprefix('Value error, ')}"
    for name, parameter in found.parameters.items():
        if math.prod(parameter.shape) > MOST_ELEMENTS:
            return f"parameters.{name}.shape={parameter.shape}: has more than {MOST_ELEMENTS} elements"
        for piece in parameter.pieces:
            if piece.file not in found.files:
                return f"parameters.{name} is in {piece.file!r}, which is not one of its files"
            if piece.start + piece.length > math.prod(parameter.shape):
                return f"parameters.{name}: {piece.length} elements from {piece.start} on, of {parameter.shape}"
    return None
