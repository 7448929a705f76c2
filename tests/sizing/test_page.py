"""docs/sizing.md is up to date, and the command that checks it detects if it isn't."""

from __future__ import annotations

from pathlib import Path

import pytest

from sizing.__main__ import PAGE, main
from sizing.fits import GPUS, METHODS
from sizing.models import MODELS
from sizing.page import page

_DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_up_to_date() -> None:
    assert _DOCS / "sizing.md" == PAGE
    assert page() == PAGE.read_text("utf-8"), "docs/sizing.md is out of date; run make sizing"


def test_an_outdated_page_is_detected_and_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "sizing.md"
    assert main(["--check"], copy) == 1
    copy.write_text(page().replace("ddp", "zero2", 1), "utf-8")
    assert main(["--check"], copy) == 1
    assert capsys.readouterr().err.splitlines() == [f"{copy} is out of date; run make sizing"] * 2
    assert main([], copy) == 0
    assert capsys.readouterr().out == f"wrote {copy}\n"
    assert main(["--check"], copy) == 0
    assert copy.read_text("utf-8") == page()


def test_each_table_has_a_row_for_every_model_and_gpu() -> None:
    lines = page().splitlines()
    for model in MODELS:
        assert len([line for line in lines if line.startswith(f"| {model.name} | ") and " GB | " not in line]) == 1
        for gpu in GPUS:
            rows = [line for line in lines if line.startswith(f"| {model.name} | {gpu.name} | ")]
            assert len(METHODS) <= len(rows) <= 2 * len(METHODS)


def test_the_page_does_not_claim_longer_than_true_that_nothing_has_run_on_a_gpu() -> None:
    no_gpu = "No GPU has run it yet." in (_DOCS / "gpu.md").read_text("utf-8")
    assert no_gpu == ("nothing has run on a GPU yet" in page()), "correct the head of hack/sizing/page.py"


def test_prose_has_short_lines() -> None:
    assert [line for line in page().splitlines() if len(line) > 100 and not line.startswith("|")] == []
