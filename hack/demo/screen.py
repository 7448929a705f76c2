"""Draws a terminal's screen as an SVG file.

tmux capture-pane -ep -S - | python -m demo.screen docs/try.svg "make try"
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

_COLUMNS = 120


def save(console: Console, picture: Path, title: str) -> None:
    """Writes what a recording console has printed; the file loads no web fonts."""
    svg = console.export_svg(title=title)
    picture.write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL))


def recorded(text: str) -> Console:
    """Returns a console that has printed a colored screen, without its last empty lines."""
    lines = text.rstrip().splitlines()
    console = Console(record=True, file=io.StringIO(), width=_COLUMNS, force_terminal=True)
    for line in lines:
        console.print(Text.from_ansi(line), soft_wrap=True)
    return console


def main() -> None:
    """Draws standard input."""
    parser = argparse.ArgumentParser(prog="python -m demo.screen", description=__doc__)
    parser.add_argument("picture", type=Path, metavar="SVG")
    parser.add_argument("title")
    options = parser.parse_args()
    save(recorded(sys.stdin.read()), options.picture, options.title)


if __name__ == "__main__":
    main()
