"""What `finetune run` shows of losses: a line that a terminal can draw."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from finetune_cli import screen


@pytest.mark.parametrize(
    ("values", "drawn"),
    [
        ([], ""),
        ([math.nan], ""),
        ([2.0], "▁"),
        ([1.0, 1.0], "▁▁"),
        ([8.0, 1.0], "█▁"),
        ([1, 2, 3, 4, 5, 6, 7, 8], "▁▂▃▄▅▆▇█"),
        ([1.0, math.inf, 8.0], "▁█"),
    ],
)
def test_a_curve_has_a_character_for_each_value(values: list[float], drawn: str) -> None:
    assert screen.sparkline(values) == drawn


@pytest.mark.parametrize("count", [60, 61, 100, 5000])
def test_a_long_curve_is_averaged_to_the_width(count: int) -> None:
    drawn = screen.sparkline([float(count - index) for index in range(count)])
    assert len(drawn) == 60
    assert (drawn[0], drawn[-1]) == ("█", "▁")
    assert list(drawn) == sorted(drawn, reverse=True)


def test_the_curve_of_a_run_is_read_from_its_history(tmp_path: Path) -> None:
    history = tmp_path / "history.jsonl"
    assert screen.loss_curve(history) == ""
    history.write_text(json.dumps({"type": "phase"}) + "\n")
    assert screen.loss_curve(history) == ""
    history.write_text("".join(json.dumps({"type": "step", "loss": loss}) + "\n" for loss in (4.0, 3.0, 2.5)))
    assert screen.loss_curve(history) == "training loss █▃▁ 4.0000 → 2.5000"
