"""The time that is left is shown as kubectl shows ages."""

from __future__ import annotations

import pytest

from finetune_operator.core.progress_status import duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (119, "119s"),
        (120, "2m"),
        (330, "5m30s"),
        (600, "10m"),
        (10_799, "179m"),
        (10_800, "3h"),
        (12_000, "3h20m"),
        (100_000, "27h"),
        (180_000, "2d2h"),
        (172_800, "2d"),
        (864_000, "10d"),
    ],
)
def test_a_duration_has_at_most_two_units(seconds: int, text: str) -> None:
    assert duration(seconds) == text
