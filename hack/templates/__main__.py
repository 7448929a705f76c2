"""The command line: `python -m templates` writes docs/templates.md; --check only compares it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from steps.generated import DOCS, write_or_check
from templates.page import page

PAGE = DOCS / "templates.md"


def main(arguments: Sequence[str] | None = None, path: Path = PAGE) -> int:
    """Writes or checks the page. Returns 1 if --check detects that it is out of date, else 0."""
    return write_or_check("templates", page, arguments, path)


if __name__ == "__main__":
    sys.exit(main())
