"""Hugging Face directories of the styles here: config.json, safetensors of bounded size, the tokenizer's files.

Read are also directories with only a part of the heads, with the names of 2018 (gamma, beta), and those whose weights
are `pytorch_model.bin`, as tensors without any code (`weights_only`).
"""

from __future__ import annotations

import functools
import json
import pickle
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

from configs.errors import ConfigError
from data_pipeline.tokenizer import end_of_text_id, is_bert
from pretrain.formats import parity
from pretrain.formats.weights import FormatError, Weights, check_sizes, empty_model, inside
from pretrain.models import hf
from pretrain.models.hf_config import hf_config, shape_from_hf

HEADS = ("pooler.", "nsp_output.", "mlm_transform.", "mlm_norm.", "mlm_output.")  # of a BERT; all else is its body
FRESH_SEED = 0  # of heads that a directory lacks
OUTPUTS = ("lm_head.weight", "cls.predictions.decoder.weight", "decoder.weight")  # the embedding, where they are tied
NO_WEIGHTS = (
    "attn.bias",
    "attn.masked_bias",
    "position_ids",
    "token_type_ids",
    "rotary_emb.inv_freq",
    "cls.predictions.decoder.bias",
)  # buffers that older files have

Tensors = dict[str, Callable[[], torch.Tensor]]


def read(directory: Path) -> Weights:
    """The model of a directory; parameters are read when they are asked for.

    Heads that it lacks are drawn as for a new model. Raises FormatError for a directory that is damaged or of another
    kind of model.
    """
    settings = read_json(directory / "config.json")
    try:
        shape = shape_from_hf(settings)
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise FormatError(f"{directory / 'config.json'}: {reason}; such a model cannot be continued here") from error
    check_sizes(directory / "config.json", shape)
    tensors = {plain_name(name, settings): get for name, get in open_tensors(directory).items()}
    if shape.style.has_tied_output:
        check_tied(directory, tensors, hf.hf_names(shape, "word_embeddings.weight")[0])
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in empty_model(shape).named_parameters()}
    wanted = {name: list(hf.to_hf(shape, name, torch.empty(size, device="meta"))) for name, size in expected.items()}
    lost = [name for name, theirs in wanted.items() if any(their not in tensors for their, _ in theirs)]
    if body := [name for name in lost if not name.startswith(HEADS)]:
        theirs = next(their for their, _ in wanted[body[0]] if their not in tensors)
        raise FormatError(f"{directory}: lacks the tensor {theirs} and {len(body) - 1} more; get the model again")
    fresh: dict[str, torch.Tensor] = {}
    if lost:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(FRESH_SEED)
            fresh = {name: p.detach() for name, p in empty_model(shape).named_parameters() if name in lost}

    def weight(name: str) -> torch.Tensor:
        if name in fresh:
            return fresh[name]
        for their, probe in wanted[name]:
            check_shape(directory, their, tensors[their](), tuple(probe.shape))
        return hf.from_hf(shape, [name], {their: tensors[their]().float() for their, _ in wanted[name]})[name]

    used = {their for theirs in wanted.values() for their, _ in theirs}
    unused = sorted(name for name in tensors.keys() - used if not name.endswith((*NO_WEIGHTS, *OUTPUTS)))
    notes = [f"drawn anew, because the directory has no such head: {', '.join(lost)}"] if lost else []
    notes += [f"left out: {', '.join(unused)}"] if unused else []
    return Weights(shape, weight, tuple(notes), tuple(lost))


def read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{file}: cannot be read ({error}); expected a JSON object, get the model again") from error
    if not isinstance(found, dict):
        raise FormatError(f"{file}: holds {type(found).__name__}, expected a JSON object; get the model again")
    return found


def plain_name(name: str, settings: dict[str, Any]) -> str:
    """A tensor's name as in a directory of all heads: OpenAI's GPT-2 has no prefix, BERT of 2018 gamma and beta."""
    if settings["model_type"] == "gpt2":
        return f"transformer.{name}" if name.startswith(("wte.", "wpe.", "h.", "ln_f.")) else name
    if settings["model_type"] != "bert":
        return name
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    return f"bert.{name}" if name.startswith(("embeddings.", "encoder.", "pooler.")) else name


def open_tensors(directory: Path) -> Tensors:
    """The tensors of all weight files of a directory; nothing is read before it is asked for."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return open_safetensors(single)
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise FormatError(f"{index}: has no weight_map, which says where tensors are; get the model again")
        found = {name: inside(directory, file, index) for name, file in weight_map.items()}
        files = {file.name: open_safetensors(file) for file in sorted(set(found.values()))}
        lost = [(name, file) for name, file in weight_map.items() if name not in files[file]]
        if lost:
            raise FormatError(f"{directory / lost[0][1]}: has no tensor {lost[0][0]}, {index} says so; get both again")
        return {name: files[file][name] for name, file in weight_map.items()}
    pickled = directory / "pytorch_model.bin"
    if pickled.is_file():
        tensors = read_pickled_tensors(pickled)
        return {name: functools.partial(tensors.__getitem__, name) for name in tensors}
    raise FormatError(
        f"{directory}: has no weights (looked for model.safetensors, model.safetensors.index.json, pytorch_model.bin); "
        f"give a directory that transformers' save_pretrained has written"
    )


def open_safetensors(file: Path) -> Tensors:
    try:
        opened = safe_open(file, framework="pt")
        return {name: functools.partial(opened.get_tensor, name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{file}: is damaged ({error}); get the model again") from error


def read_pickled_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file of torch.save, without running code of it."""
    found = read_torch_file(file)
    if not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise FormatError(f"{file}: holds more than tensors; expected a state dict, name -> tensor")
    return found


def read_torch_file(file: Path) -> dict[str, Any]:
    """The dictionary in a file of torch.save: tensors, numbers, texts and containers of them, nothing else."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        if named := re.search(r"GLOBAL (\S+)", str(error)):  # the rest of the message advises to run it
            raise FormatError(
                f"{file}: cannot be read without running code: it names {named[1]}; save its tensors with "
                f"`safetensors.torch.save_file` where it was made"
            ) from error
        raise FormatError(
            f"{file}: is damaged or no file of torch.save ({type(error).__name__}); copy it again"
        ) from error
    if not isinstance(found, dict):
        raise FormatError(f"{file}: holds {type(found).__name__}, expected a dictionary")
    return found


def check_tied(directory: Path, tensors: Tensors, embedding: str) -> None:
    """Raise FormatError where an output layer of its own would be lost: here it is the embedding."""
    for name in OUTPUTS:
        if name in tensors and embedding in tensors and not torch.equal(tensors[name](), tensors[embedding]()):
            raise FormatError(
                f"{directory}: {name} is not {embedding}; a model like this has no output layer of its own"
            )


def check_shape(place: Path, name: str, found: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(found.shape) != expected:
        raise FormatError(
            f"{place}: {name} has the shape {tuple(found.shape)}, the configuration beside it says {expected}; they "
            f"are not of the same model"
        )


def write(
    model: Weights, directory: Path, special: Mapping[str, int | None], dtype: torch.dtype, shard_bytes: int
) -> None:
    """Write config.json and the weights in `dtype`, and for BERT a second directory, `encoder`, without the heads.

    A classifier that transformers loads from the whole BERT reports the pretraining heads as unexpected; from `encoder`
    it has nothing to report but its own new head. `directory` has the tokenizer's files already; special: the ids of
    "eos", "cls" and "sep" in it.
    """
    style = model.shape.style
    if model.architecture == "bert" and not style.has_pairs:
        without_token_types(directory)
    tokenizer_files = [file for file in directory.iterdir() if file.is_file()]
    settings = hf_config(model.shape, special) | {"dtype": str(dtype).removeprefix("torch.")}
    write_model(model, directory, settings, dtype, shard_bytes)
    if model.architecture == "bert":
        encoder = directory / "encoder"
        encoder.mkdir()
        for file in tokenizer_files:
            shutil.copyfile(file, encoder / file.name)
        body = {"architectures": ["BertModel" if style.has_pairs else "ModernBertModel"]}
        write_model(model, encoder, settings | body, dtype, shard_bytes, heads=False)


def without_token_types(directory: Path) -> None:
    """Let the tokenizer there, if any, make no token_type_ids, which ModernBERT does not take."""
    path = directory / "tokenizer_config.json"
    if path.is_file():
        settings = read_json(path) | {"model_input_names": ["input_ids", "attention_mask"]}
        path.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def special_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """The ids that a config.json names, where the tokenizer has such tokens."""
    if tokenizer is None:
        return {}
    ids = {name: tokenizer.token_to_id(token) for name, token in (("cls", "[CLS]"), ("sep", "[SEP]"))}
    return ids | {"eos": None if is_bert(tokenizer) else end_of_text_id(tokenizer)}


def write_model(
    model: Weights, directory: Path, settings: dict[str, Any], dtype: torch.dtype, shard_bytes: int, heads: bool = True
) -> None:
    """config.json and safetensors files of at most `shard_bytes` (a larger tensor has one of its own)."""
    (directory / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    shards: list[list[str]] = []
    total = 0

    def close(tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, directory / f"part-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(tensors))

    waiting: dict[str, torch.Tensor] = {}
    for name, tensor in hf_tensors(model, dtype, heads):
        if waiting and bytes_of(*waiting.values(), tensor) > shard_bytes:
            close(waiting)
            waiting = {}
        waiting[name] = tensor
        total += bytes_of(tensor)
    close(waiting)
    if len(shards) == 1:
        (directory / "part-0").rename(directory / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"part-{number}").rename(directory / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def hf_tensors(model: Weights, dtype: torch.dtype, heads: bool) -> Iterator[tuple[str, torch.Tensor]]:
    for ours in model.names():
        for name, tensor in hf.to_hf(model.shape, ours, model.weight(ours)):
            if heads or not hf.is_head(model.shape, name):
                yield name, tensor.to(dtype).contiguous()


def bytes_of(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@torch.no_grad()
def logits(directory: Path, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Those of transformers' model of a directory, fp32: (batch, seq, vocab), with pairs also (batch, 2)."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForPreTraining

    kind = read_json(directory / "config.json").get(
        "model_type"
    )  # the import takes a second that training does not need
    auto = {"bert": AutoModelForPreTraining, "modernbert": AutoModelForMaskedLM}.get(str(kind), AutoModelForCausalLM)
    try:
        model = auto.from_pretrained(directory, dtype=torch.float32, trust_remote_code=False).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{directory}: transformers cannot load it ({error})") from error
    found = model(ids)
    return (found.prediction_logits, found.seq_relationship_logits) if kind == "bert" else (found.logits,)


@torch.no_grad()
def our_logits(model: torch.nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Those of our model, as `logits` gives them."""
    found = model(ids)
    return found if isinstance(found, tuple) else (found,)


@torch.no_grad()
def compare_with_source(
    ours: torch.nn.Module, directory: Path, ids: torch.Tensor, fresh: tuple[str, ...]
) -> dict[str, float]:
    """`parity.compare` with transformers' model of the directory it was read from, in the heads that it has.

    fresh: our parameters that it does not have; without any head the hidden states of the last block are compared.
    """
    from transformers import AutoModel

    with (
        tempfile.TemporaryDirectory() as folder
    ):  # transformers gets what was read here, and nothing else that lies there
        alone = Path(folder)
        settings = read_json(directory / "config.json")
        settings.pop("auto_map", None)
        (alone / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        for file in weight_files(directory):
            (alone / file.name).symlink_to(file.resolve())
        if not fresh:
            return parity.compare(our_logits(ours, ids), logits(alone, ids))
        if not any(name.startswith("mlm_") for name in fresh):  # BertForMaskedLM: no pooler, no next sentence
            return parity.compare(our_logits(ours, ids)[:1], logits(alone, ids)[:1])
        body = AutoModel.from_pretrained(alone, dtype=torch.float32, trust_remote_code=False).eval()
        hidden = ours.encode(ids, None, None, None)  # type: ignore[operator]
        return parity.compare([hidden], [body(ids).last_hidden_state])


def weight_files(directory: Path) -> list[Path]:
    """The files that `open_tensors` reads."""
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    if index.is_file():
        return [index, *sorted({directory / name for name in read_json(index)["weight_map"].values()})]
    return [directory / "pytorch_model.bin"]
