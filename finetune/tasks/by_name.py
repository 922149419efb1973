"""The task files by the names that configurations give them."""

from __future__ import annotations

from types import ModuleType

from finetune.tasks import classification, generation, qa, regression, tagging

TASKS: dict[str, ModuleType] = {
    "classification": classification,
    "regression": regression,
    "qa": qa,
    "tagging": tagging,
    "generation": generation,
}
