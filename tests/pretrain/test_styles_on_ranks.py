"""Every style on two ranks at ZeRO-3, with activation checkpointing and packed rows."""

from __future__ import annotations

import pytest

from tests.ranks import run_ranks


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_at_zero_3_have_the_losses_of_one_process_in_every_style(tmp_path):
    run_ranks(2, ["tests/pretrain/styles_on_ranks.py"], tmp_path / "logs")
