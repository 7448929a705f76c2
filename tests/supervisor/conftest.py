"""Leaves no supervisor behind, whatever a test has come to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from supervisor import world


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    yield
    while world.STARTED:
        process = world.STARTED.pop()
        if process.poll() is None:
            process.kill()
            process.wait()
