"""MFU of a watched run: by hand for a GPT on known GPUs, and none where the peak is not known."""

from __future__ import annotations

import json
import time

import pytest

from launcher.board import Board
from launcher.utilisation import gpu_of, share_per_token
from tests.launcher.run_directories import make_ring, make_run

CONFIG = """
run_dir: runs/here
model: {preset: nano, num_layers: 2, hidden_size: 32, num_heads: 2}
data: {dir: nowhere, build: {sources: [x.jsonl], tokenizer: {type: byte_bpe, vocab_size: 300}}}
train: {num_steps: 100, seq_len: 32, global_batch_size: 8, micro_batch_size: 2}
"""
BLOCK = 12 * 32 * 32 + 13 * 32  # four products of attention, two of the MLP; biases, two normalisations
FLOPS = 6 * (2 * BLOCK + 300 * 32 + 2 * 32) + 12 * 2 * 32 * 32  # and the output layer, the last normalisation


def test_share_is_palms_definition_over_the_peak_of_all_gpus(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    share = share_per_token(tmp_path, "NVIDIA H100 80GB HBM3", 4)
    assert share == pytest.approx(FLOPS / (4 * 989e12), rel=1e-6)


@pytest.mark.parametrize("device", ["NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA T4", ""])
def test_gpu_whose_peak_is_not_in_the_table_has_none(tmp_path, device):
    assert gpu_of(device) is None and share_per_token(tmp_path, device, 1) is None


def test_watched_run_has_mfu_as_a_curve_and_a_number(tmp_path):
    run_dir = make_run(tmp_path / "run")
    (run_dir / "config.yaml").write_text(CONFIG)
    make_ring(run_dir, 0, 1, [(time.time(), 40, "forward")])
    line = {"rank": 0, "phase": "forward", "seconds": 0.1, "step": 30, "gpu_bytes": 10**9, "device": "NVIDIA H200"}
    (run_dir / "stragglers.jsonl").write_text(json.dumps(line) + "\n")
    board = Board([run_dir])
    board.refresh()
    mfu = board.states()["runs"][0]["mfu"]
    assert mfu == pytest.approx(board.states()["runs"][0]["tokens_per_second"] * FLOPS / 989e12, rel=1e-6)
    points = board.curves()["runs"][0]["points"]
    assert len(points["mfu"]) == len(points["tokens_per_second"]) == 40
    assert points["mfu"][0][1] == pytest.approx(points["tokens_per_second"][0][1] * FLOPS / 989e12, rel=1e-6)
    assert points["gpu_bytes"] == [[30, 1e9]]
