"""The command line of a program that writes a page of docs/, or compares it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def write_or_check(name: str, page: Callable[[], str], arguments: Sequence[str] | None, path: Path) -> int:
    """Writes or checks the page that `make NAME` writes. Returns 1 if --check detects that it is
    out of date, else 0."""
    parser = argparse.ArgumentParser(prog=name, description=f"Writes docs/{path.name}.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is out of date")
    options = parser.parse_args(arguments)
    text = page()
    if path.is_file() and path.read_text("utf-8") == text:
        return 0
    if options.check:
        print(f"{path} is out of date; run make {name}", file=sys.stderr)
        return 1
    path.write_text(text, "utf-8")
    print(f"wrote {path}")
    return 0
