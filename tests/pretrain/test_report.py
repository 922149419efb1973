"""report.html stands alone: no network, no other file, and what users wrote is shown as text."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from pretrain.report import write_report

VOID = {"meta", "img", "link", "br", "input"}


class Checker(HTMLParser):
    """Counts open tags and collects addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def run_dir(tmp_path):
    lines = [{"step": 0, "eval_loss": 8.0, "eval_perplexity": 2980.0}]
    for step in range(1, 21):
        lines.append(
            {"step": step, "loss": 8 - step / 10, "lr": 1e-3, "grad_norm": 1.0, "tokens": step * 4096,
             "tokens_per_second": 1234.0, "step_seconds": 3.3}
        )  # fmt: skip
    lines.append({"step": 20, "eval_loss": 6.0, "eval_perplexity": 403.4})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "config.yaml").write_text("run_dir: <b>bold</b>\n")
    (tmp_path / "samples.json").write_text(json.dumps(["<script>alert(1)</script> & more"]))
    return tmp_path


def test_page_is_well_formed_and_needs_nothing_from_outside(run_dir):
    page = write_report(run_dir).read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(page)
    assert not checker.open
    assert checker.addresses and all(address.startswith("data:image/svg+xml") for address in checker.addresses)
    assert not re.search(r"url\(|@import", page)


def test_page_shows_numbers_configuration_samples_and_environment(run_dir):
    page = write_report(run_dir).read_text(encoding="utf-8")
    for shown in ("8.000 → 6.000", "403.4", "1,234", "81,920 tokens", "deepspeed", "Samples", "66 s"):
        assert shown in page


def test_page_says_how_many_steps_had_no_update_and_has_curves_around_them(run_dir):
    assert "without an update" not in write_report(run_dir).read_text(encoding="utf-8")
    with (run_dir / "metrics.jsonl").open("a") as file:
        numbers = '"lr": 1e-3, "tokens": 86016, "tokens_per_second": 1234.0, "step_seconds": 3.3'
        file.write(f'{{"step": 21, "loss": NaN, "grad_norm": NaN, {numbers}, "skipped": 1}}\n')
    assert "<b>1</b><span>steps without an update" in write_report(run_dir).read_text(encoding="utf-8")


def test_text_of_users_and_models_is_escaped(run_dir):
    page = write_report(run_dir).read_text(encoding="utf-8")
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "<b>bold</b>" not in page and "&lt;b&gt;bold" in page


def test_run_without_a_step_has_a_page_too(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "config.yaml").write_text("run_dir: x\n")
    assert "no step yet" in write_report(tmp_path).read_text(encoding="utf-8")
