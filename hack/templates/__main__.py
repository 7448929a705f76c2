"""The command line: `python -m templates` writes docs/templates.md, or compares it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from templates.page import page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "templates.md"


def main(arguments: Sequence[str] | None = None, path: Path = PAGE) -> int:
    """Writes or checks the page. Returns 1 if --check detects that it is out of date, else 0."""
    parser = argparse.ArgumentParser(prog="templates", description="Writes docs/templates.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is out of date")
    options = parser.parse_args(arguments)
    text = page()
    if path.is_file() and path.read_text("utf-8") == text:
        return 0
    if options.check:
        print(f"{path} is out of date; run make templates", file=sys.stderr)
        return 1
    path.write_text(text, "utf-8")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
