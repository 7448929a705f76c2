"""The modules that `make test-fast` leaves out exist."""

from __future__ import annotations

from pathlib import Path

import pytest

import conftest


@pytest.mark.parametrize("name", conftest._SLOW)
def test_a_module_that_is_marked_slow_exists(name: str) -> None:
    assert (Path(__file__).parent / name).is_file()
