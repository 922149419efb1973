"""The house's fences: who may import whom. The table below is their documentation."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

MAY_IMPORT = {
    "configs": {"configs"},
    "data_pipeline": {"configs", "data_pipeline"},
    "pretrain": {"configs", "data_pipeline", "pretrain"},
    "finetune": {"configs", "data_pipeline", "pretrain", "finetune"},
    "launcher": {"configs", "launcher"},
}
# What fine-tuning may use of pretraining: what keeps a run. Models come through transformers.
KEEPS_A_RUN = {"engine", "runtime", "checkpoint", "metrics", "report", "optim", "state", "saver", "guard"}
ENTRY_FILES = {
    "data_pipeline.build",
    "data_pipeline.exchange",
    "data_pipeline.show",
    "pretrain.train",
    "pretrain.export",
    "pretrain.import_model",
    "pretrain.probe",
    "pretrain.replay",
    "pretrain.host_checks",
    "finetune.run",
    "finetune.predict",
    "launcher.cli",
    "launcher.demo",
    "finetune.evaluation",
}
PURE = {
    "data_pipeline.order",
    "data_pipeline.mixture",
    "data_pipeline.chance",
    "data_pipeline.pack",
    "data_pipeline.mask",
    "configs.deepspeed_json",
    "configs.batch_sizes",
    "launcher.plan",
    "launcher.plan_job",
    "launcher.plan_memory",
    "launcher.plan_time",
    "launcher.plan_probe",
    "launcher.plan_scale",
}
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
SHADOWING = {"logging", "datasets", "evaluate", "tokenizers", "random", "types", "json"}


def modules() -> list[Path]:
    return [path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path: Path) -> Iterator[str]:
    """Full names of all that a file imports, at its head or inside of functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_imports_run_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    for name in imports(path):
        top = name.split(".")[0]
        assert top not in MAY_IMPORT or top in MAY_IMPORT[package], f"{package} may not import {name}"
        assert top not in ("tests", "benchmarks"), f"{package} may not import {name}"
        if package == "finetune" and top == "pretrain":
            assert name.split(".")[1] in KEEPS_A_RUN, f"finetune may not import {name}"


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_nobody_imports_an_entry_file(path):
    # `from pretrain import train` gives pretrain.train, `from pretrain.train import x` pretrain.train.x
    imported = {name for name in imports(path) if name in ENTRY_FILES or name.rpartition(".")[0] in ENTRY_FILES}
    assert not imported


def test_entry_files_exist():
    assert {module_name(path) for path in modules()} >= ENTRY_FILES


def test_only_the_engine_imports_deepspeed():
    users = {module_name(path) for path in modules() for name in imports(path) if name.split(".")[0] == "deepspeed"}
    assert users == {"pretrain.engine"}


def test_the_launcher_never_imports_torch():
    for path in (ROOT / "launcher").rglob("*.py"):
        assert not {"torch", "transformers", "deepspeed", "datasets"} & {name.split(".")[0] for name in imports(path)}


def test_pure_modules_touch_no_files_and_no_torch():
    for name in PURE:
        found = {imported.split(".")[0] for imported in imports(ROOT / (name.replace(".", "/") + ".py"))}
        assert not {"os", "pathlib", "io", "torch", "glob", "shutil"} & found


def test_no_module_has_a_vague_or_a_shadowing_name():
    for path in modules():
        stem = path.parent.name if path.name == "__init__.py" else path.stem
        assert stem not in FORBIDDEN_NAMES, f"{path}: name it by its subject"
        assert stem not in SHADOWING, f"{path}: would shadow another module when a script is started in its folder"


def test_every_package_says_what_it_is():
    for package in MAY_IMPORT:
        docstring = ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text()))
        assert docstring and len(docstring.splitlines()) >= 3
