"""Which kind of attention a model is loaded with."""

from __future__ import annotations

import pytest

from configs.tuning import FinetuneConfig
from finetune.models import attention


@pytest.mark.parametrize(
    ("accelerator", "precision", "max_seq_len", "wanted"),
    [
        ("cpu", "bf16", 512, "eager"),
        ("cpu", "bf16", 513, None),  # its scores of all pairs would take much memory
        ("cpu", "fp32", 128, None),
        ("cuda", "bf16", 128, None),
    ],
)
def test_short_rows_in_bf16_on_a_cpu_have_plain_attention(monkeypatch, accelerator, precision, max_seq_len, wanted):
    monkeypatch.setenv("DS_ACCELERATOR", accelerator)
    tuning = {"precision": precision, "max_seq_len": max_seq_len}
    files = {"model": "m", "train": "t", "dev": "d", "run_dir": "r"}
    assert attention(FinetuneConfig.model_validate({"task": "classification", "tuning": tuning} | files)) == wanted
