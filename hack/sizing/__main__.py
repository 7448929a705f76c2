"""The command line: `python -m sizing` writes docs/sizing.md, and with --check only compares it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from sizing.page import page
from steps.generated import DOCS, write_or_check

PAGE = DOCS / "sizing.md"


def main(arguments: Sequence[str] | None = None, path: Path = PAGE) -> int:
    """Writes or checks the page. Returns 1 if --check detects that it is out of date, else 0."""
    return write_or_check("sizing", page, arguments, path)


if __name__ == "__main__":
    sys.exit(main())
