"""From a YAML file and `key.sub=value` words to a checked configuration: defaults <- file <- overrides.

Every fault is reported at once, each with the file and line (or the override) it stands in, what was found, what was
expected and, for an unknown key, the nearest valid one. The origin of each value is kept, so that
`millstream config` can answer "where does this come from?".
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from configs.errors import ConfigError
from configs.model_sizes import check_objective
from configs.schema import PretrainConfig
from configs.tuning import FinetuneConfig

Schema = TypeVar("Schema", bound=BaseModel)


@dataclass(frozen=True)
class Loaded:
    config: PretrainConfig | FinetuneConfig
    origins: dict[str, str]  # dotted key -> "FILE:LINE" or "command line"; keys that are missing here are defaults

    def origin(self, key: str) -> str:
        return self.origins.get(key, "default")


def load_pretrain(path: str | Path, overrides: list[str] | None = None) -> PretrainConfig:
    """Load a configuration that must be of a pretraining run."""
    config = load(path, overrides).config
    if not isinstance(config, PretrainConfig):
        raise ConfigError(f"{path}: has the key `task`, so it describes fine-tuning; use `millstream finetune {path}`")
    check_objective(config)
    return config


def load_finetune(path: str | Path, overrides: list[str] | None = None) -> FinetuneConfig:
    """Load a configuration that must be of a fine-tuning run."""
    config = load(path, overrides).config
    if not isinstance(config, FinetuneConfig):
        raise ConfigError(f"{path}: has no key `task`, so it describes pretraining; use `millstream pretrain {path}`")
    return config


def load(path: str | Path, overrides: list[str] | None = None) -> Loaded:
    """Merge defaults, the YAML file and the overrides, and check the result.

    Raises ConfigError with all faults; the class is FinetuneConfig where a key `task` is set, else PretrainConfig.
    """
    faults: list[str] = []
    origins: dict[str, str] = {}
    values = _read(path, overrides, origins, faults)
    if "tasks" in values:
        raise ConfigError(
            f"{path}: has the key `tasks`, so it describes an evaluation; use `millstream evaluate {path}`"
        )
    schema: type[PretrainConfig | FinetuneConfig] = FinetuneConfig if "task" in values else PretrainConfig
    return Loaded(check(schema, values, str(path), origins, faults), origins)


def load_as(schema: type[Schema], path: str | Path | None, overrides: list[str] | None = None) -> Schema:
    """The same for another kind of file; without a `path`, what defaults and overrides make."""
    faults: list[str] = []
    origins: dict[str, str] = {}
    values = _read(path, overrides, origins, faults)
    return check(schema, values, str(path or "command line"), origins, faults)


def check(
    schema: type[Schema], values: dict[str, Any], path: str, origins: dict[str, str], faults: list[str]
) -> Schema:
    """`values` over the defaults of `schema`. Raises ConfigError with the `faults` there are and those it finds."""
    config = None
    try:
        config = schema.model_validate(_over_defaults(schema, values))
    except ValidationError as error:
        faults += [_explain(fault, schema, origins, path) for fault in error.errors()]
    if faults or config is None:
        raise ConfigError("\n".join(faults))
    return config


def flatten(config: BaseModel) -> dict[str, Any]:
    """Dotted key -> value of every setting, in the schema's order."""
    flat: dict[str, Any] = {}
    for name, value in config:
        if isinstance(value, BaseModel):
            flat.update({f"{name}.{key}": leaf for key, leaf in flatten(value).items()})
        else:
            flat[name] = value
    return flat


def changes(before: BaseModel, now: BaseModel, may_change: tuple[str, ...]) -> list[str]:
    """For each setting that differs "key=before, now value", but for keys that begin with one of `may_change`. Pure."""
    old = flatten(before)
    return [
        f"{key}={old.get(key)}, now {value}"
        for key, value in flatten(now).items()
        if old.get(key) != value and not key.startswith(may_change)
    ]


def valid_keys(schema: type[BaseModel]) -> list[str]:
    """Dotted names of every setting of `schema`, sections included."""
    keys = []
    for name, field in schema.model_fields.items():
        keys.append(name)
        of_union = get_args(field.annotation) if isinstance(field.annotation, UnionType) else (field.annotation,)
        for section in of_union:
            if isinstance(section, type) and issubclass(section, BaseModel):
                keys += [f"{name}.{key}" for key in valid_keys(section)]
    return keys


def dump(config: BaseModel) -> str:
    """The complete configuration as YAML, every value resolved; `load` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-3` as text; numbers are read as YAML 1.2 does."""


_Loader.yaml_implicit_resolvers = {
    first: list(resolvers) for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_OF_BASE_60 = ("tag:yaml.org,2002:str", re.compile(r"^[0-9]+(:[0-9]+)+(\.[0-9]*)?$"))  # 24:00:00 is text
for _digit in "0123456789":
    _Loader.yaml_implicit_resolvers[_digit].insert(0, _OF_BASE_60)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def _over_defaults(schema: type[BaseModel], values: dict[str, Any]) -> dict[str, Any]:
    """Fill in each section's defaults key by key, so that setting one key of a section keeps the others as declared."""
    merged = dict(values)
    for name, field in schema.model_fields.items():
        if isinstance(field.default, BaseModel) and isinstance(values.get(name, {}), dict):
            declared = {key: getattr(field.default, key) for key in type(field.default).model_fields}
            merged[name] = _over_defaults(type(field.default), {**declared, **values.get(name, {})})
    return merged


def _read(
    path: str | Path | None, overrides: list[str] | None, origins: dict[str, str], faults: list[str]
) -> dict[str, Any]:
    values = {} if path is None else _read_yaml(Path(path), origins, faults)
    for word in overrides or []:
        _apply_override(word, values, origins, faults)
    return values


def _read_yaml(path: Path, origins: dict[str, str], faults: list[str]) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a directory, expected a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    try:
        root = yaml.compose(text, Loader=_Loader)
        values = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: is no configuration: values lie within each other too deeply") from None
    if values is None:
        return {}
    if not isinstance(root, yaml.MappingNode) or not isinstance(values, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, found a {type(values).__name__}")
    _note_lines(root, "", path, origins, faults)
    return values


def _note_lines(node: yaml.MappingNode, prefix: str, path: Path, origins: dict[str, str], faults: list[str]) -> None:
    for key_node, value_node in node.value:
        key, place = f"{prefix}{key_node.value}", f"{path}:{key_node.start_mark.line + 1}"
        if key in origins:
            faults.append(f"{place}: key `{key}` stands here a second time (first at {origins[key]}); keep one")
        origins[key] = place
        if isinstance(value_node, yaml.MappingNode):
            _note_lines(value_node, f"{key}.", path, origins, faults)


def _apply_override(word: str, values: dict[str, Any], origins: dict[str, str], faults: list[str]) -> None:
    key, equals, text = word.partition("=")
    if not equals or not key:
        faults.append(f"command line: found `{word}`, expected key=value, for example train.num_steps=100")
        return
    try:
        value = yaml.load(text, Loader=_Loader) if text else ""
    except yaml.YAMLError as error:
        faults.append(f"command line: {key}={text}: the value is not valid YAML: {error}")
        return
    *sections, name = key.split(".")
    place = values
    for section in sections:
        below = place.setdefault(section, {})
        if not isinstance(below, dict):
            faults.append(f"command line: `{key}`: `{section}` is not a section")
            return
        place = below
    place[name] = value
    for below_key in [k for k in origins if k.startswith(f"{key}.")]:  # a whole section was replaced
        del origins[below_key]
    origins[key] = "command line"


def _explain(fault: Any, schema: type[BaseModel], origins: dict[str, str], path: str) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    place = _place(key, origins, path)
    if fault["type"] == "extra_forbidden":
        return f"{place}: unknown key `{key}`{_did_you_mean(key, valid_keys(schema))}"
    if fault["type"] == "missing":
        return f"{path}: key `{key}` is missing; add it to the file or give {key}=VALUE"
    message = fault["msg"].removeprefix("Value error, ")
    if not key:
        return f"{path}: {message}"
    return f"{place}: {key}={fault['input']!r}: {message[0].lower() + message[1:]}"


def _place(key: str, origins: dict[str, str], path: str) -> str:
    for below, origin in origins.items():
        if below.startswith(f"{key}."):  # an unknown section given as `section.key=value`
            return origin
    while key and key not in origins:
        key = key.rpartition(".")[0]
    return origins.get(key, path)


def _did_you_mean(key: str, valid: list[str]) -> str:
    """The nearest valid key: of the same section by spelling, else the same name in another section."""
    section, _, name = key.rpartition(".")
    prefix = f"{section}." if section else ""
    siblings = [k[len(prefix) :] for k in valid if k.startswith(prefix) and "." not in k[len(prefix) :]]
    near = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    if near:
        return f"; did you mean `{prefix}{near[0]}`?"
    elsewhere = [k for k in valid if k.rpartition(".")[2] == name]
    elsewhere = elsewhere or difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    if elsewhere:
        return f"; did you mean `{elsewhere[0]}`?"
    return f"; valid here: {', '.join(siblings)}" if siblings else ""
