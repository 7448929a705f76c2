"""A test that skips itself proves nothing, so no test does for lack of a package or of a processor
feature."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
_SKIPS = re.compile(r"pytest\.(?:mark\.)?(?:skip|skipif|xfail|importorskip)\b")


def test_only_what_needs_root_is_skipped() -> None:
    lines = {
        f"{path.relative_to(HERE)}: {line.strip()}"
        for path in HERE.rglob("*.py")
        if path != Path(__file__)
        for before, line in zip(["", *path.read_text().splitlines()], path.read_text().splitlines(), strict=False)
        if _SKIPS.search(line) and "geteuid" not in before + line
    }
    assert lines == set()
