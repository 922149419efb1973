"""Google's BERT: `bert_model.ckpt.*` under TensorFlow's names, `bert_config.json`, `vocab.txt` (Devlin et al. 2019).

What its optimizer kept (adam_m, adam_v, global_step) is left out. Google's code computes GELU by the tanh formula, and
transformers loads the same files with the exact one, though both call it "gelu"; the argument of `read` chooses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from configs.model_sizes import Shape
from pretrain.formats import tensor_bundle
from pretrain.formats.hugging_face import check_shape, read_json
from pretrain.formats.weights import FormatError, Weights, check_sizes, empty_model
from pretrain.models import hf
from pretrain.models.hf_config import hf_config, shape_from_hf

CHECKPOINT = "bert_model.ckpt"
GELUS = {"tanh": "gelu_new", "erf": "gelu"}  # transformers' names
SETTINGS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "type_vocab_size",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings", "initializer_range",
)  # fmt: skip
NOT_OF_THE_MODEL = re.compile(r"adam_[mv]$|^global_step$|^_CHECKPOINTABLE|^good_steps$|^loss_scale$")


def find(place: Path) -> Path | None:
    """The prefix of the checkpoint that `place` is or holds: a folder, a prefix, or its index; None where none is.

    Raises FormatError for a folder with several.
    """
    if place.is_dir():
        found = sorted(place.glob("*.index"))
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise FormatError(f"{place}: has several checkpoints ({names}); give the one to import")
        return found[0].with_suffix("") if found else None
    if place.suffix == ".index" and place.is_file():
        return place.with_suffix("")
    return place if Path(f"{place}.index").is_file() else None


def read(prefix: Path, gelu: str = "erf") -> Weights:
    """The model of a checkpoint, with the `bert_config.json` beside it. Raises FormatError."""
    file = prefix.with_name("bert_config.json")
    settings = read_json(file)
    try:
        shape = shape_from_hf(settings | {"model_type": "bert", "hidden_act": GELUS[gelu]})
        if settings.get("hidden_act", "gelu") != "gelu":
            raise ValueError(f"hidden_act={settings['hidden_act']}: expected gelu")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise FormatError(f"{file}: {reason}; such a model cannot be continued here") from error
    check_sizes(file, shape)
    entries = tensor_bundle.open_bundle(prefix)
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in empty_model(shape).named_parameters()}
    wanted = {name: list(to_google(shape, name, torch.empty(size, device="meta"))) for name, size in expected.items()}
    used = {theirs for tensors in wanted.values() for theirs, _ in tensors}
    if lost := sorted(used - entries.keys()):
        raise FormatError(
            f"{prefix}.index: lacks {lost[0]} and {len(lost) - 1} more tensors of a BERT of this bert_config.json; "
            f"expected a checkpoint of Google's BERT with both pretraining heads"
        )

    def weight(name: str) -> torch.Tensor:
        parts = []
        for theirs, probe in wanted[name]:
            tensor = tensor_bundle.read_tensor(entries[theirs])
            check_shape(prefix, theirs, tensor, tuple(probe.shape))
            parts.append((tensor.t() if theirs.endswith("/kernel") else tensor).float())
        return torch.cat(parts).contiguous()

    unused = sorted(name for name in entries.keys() - used if not NOT_OF_THE_MODEL.search(name))
    return Weights(shape, weight, (f"left out: {', '.join(unused)}",) if unused else ())


def write(model: Weights, directory: Path, vocabulary: list[str]) -> None:
    """Write checkpoint, `bert_config.json` and `vocab.txt`; `vocabulary` is the tokens in the order of their ids."""
    settings = hf_config(model.shape, {})
    google = {key: settings[key] for key in SETTINGS} | {"hidden_act": "gelu"}
    (directory / "bert_config.json").write_text(json.dumps(google, indent=2), encoding="utf-8")
    (directory / "vocab.txt").write_text("".join(f"{token}\n" for token in vocabulary), encoding="utf-8")
    tensors = (pair for name in model.names() for pair in to_google(model.shape, name, model.weight(name)))
    tensor_bundle.write(directory / CHECKPOINT, tensors)


def to_google(shape: Shape, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """(TensorFlow's name, tensor) for one of our parameters, on the way over transformers' name of it."""
    for theirs, piece in hf.to_hf(shape, name, tensor):
        if theirs == "cls.predictions.bias":
            yield "cls/predictions/output_bias", piece
            continue
        if theirs.startswith("cls.seq_relationship."):
            yield f"cls/seq_relationship/output_{'weights' if theirs.endswith('weight') else 'bias'}", piece
            continue
        path, _, leaf = re.sub(r"\.layer\.(\d+)\.", r".layer_\1.", theirs).rpartition(".")
        if path.endswith("LayerNorm"):
            yield f"{path}.{'gamma' if leaf == 'weight' else 'beta'}".replace(".", "/"), piece
        elif path.endswith("_embeddings"):
            yield path.replace(".", "/"), piece
        else:
            is_matrix = leaf == "weight"
            yield f"{path}.{'kernel' if is_matrix else 'bias'}".replace(".", "/"), piece.t() if is_matrix else piece
