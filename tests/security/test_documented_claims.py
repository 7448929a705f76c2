"""Each defense in docs/security.md, and each claim of the README about security, names tests that
exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import ROOT

_HERE = Path(__file__).parent
_PAGE = (ROOT / "docs" / "security.md").read_text()
_THREATS = {f"T{n}" for n in range(1, 31)} - {"T7", "T28"}
_FOOTHOLDS = {f"P{n}" for n in range(1, 32)} - {"P11", "P14", "P15", "P19", "P23", "P26"}
_OPEN = {"P28"}  # what the page says is not defended


def _rows() -> Iterator[tuple[str, str]]:
    """Yields the first and the last cell of each row of the table of defenses."""
    for line in _PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if re.fullmatch(r"[HPT]\d+(, [HPT]\d+)*", cells[0]):
            yield cells[0], cells[-1]


@pytest.mark.parametrize(("threat", "tests"), tuple(_rows()), ids=lambda text: text.split(",")[0].split(":")[0])
def test_a_defense_names_tests_that_exist(threat: str, tests: str) -> None:
    cited = 0
    for part in tests.split(";"):
        folder = re.search(r"`(tests/[a-z0-9_/]+)`", part)
        place = ROOT / folder[1] if folder else _HERE
        files = [place / name for name in re.findall(r"`(test_\w+\.py)`", part)]
        assert all(file.is_file() for file in files), f"{threat}: {part}"
        sources = files or sorted(place.rglob("test_*.py"))
        text = "\n".join(file.read_text() for file in sources)
        names = re.findall(r"`(test_\w+)(…?)`", part)
        for name, shortened in names:
            pattern = rf"def {name}" + (r"\w*\(" if shortened else r"\(")
            assert re.search(pattern, text), f"{threat}: {name} is in none of {[file.name for file in sources]}"
        cited += len(files) + len(names)
    assert cited, f"{threat} names no test"


def test_every_attack_of_the_review_is_defended_or_named_as_open() -> None:
    defended = {threat for cell, _ in _rows() for threat in cell.split(", ")}
    undefended = _PAGE.split("## What is not defended", 1)[1]
    assert defended | _OPEN >= _THREATS | _FOOTHOLDS
    assert all(f"**{name}**" in undefended for name in _OPEN)


def test_the_proofs_of_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text()
    claims = text.split("- **It is safe by default.**", 1)[1].split("\n## ", 1)[0]
    links = re.findall(r"\[[^\]]+\]\(([^)#]+)\)", claims)
    assert len([link for link in links if link.startswith("tests/")]) >= 5
    missing = [link for link in links if not (ROOT / link).exists()]
    assert missing == []
