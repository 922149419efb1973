"""What a dataset's manifest has to hold, so that nothing behind it has to ask: its checksum proves no good intentions.

Names are those of files in the directory itself; numbers agree with each other and with the shards' layout (shards.py).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from data_pipeline.mapped_shard import BLOCK_BYTES

LARGEST_UINT16_VOCABULARY = 65_536


def plain_name(name: str) -> str:
    """`name`, if it is that of a file in the directory itself. Raises ValueError."""
    if "/" in name or "\0" in name or name in ("", ".", ".."):
        raise ValueError("is outside of the directory")
    name.encode()  # a lone surrogate is no name: UnicodeEncodeError, which is a ValueError
    return name


class _File(BaseModel):
    model_config = ConfigDict(strict=True)

    file: Annotated[str, AfterValidator(plain_name)]
    bytes: NonNegativeInt
    xxh3_128: str


class _Shard(_File):
    documents: NonNegativeInt
    tokens: PositiveInt
    sums_xxh3_128: str


class _Manifest(BaseModel):
    model_config = ConfigDict(strict=True)

    dtype: Literal["uint16", "uint32"]
    vocab_size: PositiveInt
    tokenizer_fingerprint: str
    fingerprint: str
    documents: NonNegativeInt
    tokens: NonNegativeInt
    document_end_id: int | None = None
    shards: list[_Shard]
    files: list[_File]
    checksum: str


def manifest_fault(manifest: Any) -> str | None:
    """What is wrong in a parsed manifest of the current format: a key, what it is, what was expected. None: nothing."""
    try:
        found = _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        return f"{key}={first['input']!r:.100}: {first['msg'].removeprefix('Value error, ')}"
    itemsize = 2 if found.dtype == "uint16" else 4
    if (itemsize == 2) != (found.vocab_size <= LARGEST_UINT16_VOCABULARY):
        return f"dtype={found.dtype} does not belong to vocab_size={found.vocab_size}"
    for key in ("tokens", "documents"):
        total = sum(getattr(shard, key) for shard in found.shards)
        if total != getattr(found, key):
            return f"{key}={getattr(found, key)}: its shards have {total} together"
    for shard in found.shards:
        body = -(-shard.tokens * itemsize // 8) * 8 + 8 * shard.documents
        expected = body + 8 * -(-body // BLOCK_BYTES)
        if shard.bytes != expected:
            content = f"{shard.tokens} tokens in {shard.documents} documents"
            return f"{shard.file} has bytes={shard.bytes}: {content} take {expected}"
    return None
