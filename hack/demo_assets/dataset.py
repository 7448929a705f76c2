"""Dictionary definitions as JSONL, from Debian's WordNet.

`folder()` is the entry point. The folder contains train.jsonl, test.jsonl, LICENSE and README.md,
with the same bytes every time.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from demo_assets import wordnet
from demo_assets.package import debian_files, write_once
from demo_assets.wordnet import Definition

PACKAGE = "wordnet-base"


@dataclass(frozen=True)
class Selection:
    """The number of rows of each file, and how many words a definition has at most."""

    sizes: Mapping[str, int]
    longest: int


SELECTIONS = {
    "wordnet": Selection({"train": 1200, "test": 120}, wordnet.LONGEST),
    "definitions": Selection({"train": 1600, "validation": 100, "test": 200}, 16),
}
NOTE = """# Definitions from WordNet 3.0

Prompt/completion pairs for a small fine-tuning job: {sizes}. Every pair
asks for the definition of a noun ("Define the noun: lighthouse") and answers as WordNet does, in a phrase.
No word and no definition occurs twice, within a file or across files. Made from Debian's package wordnet-base.

WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved; use, copying, modification and
distribution for any purpose and without fee are granted on the terms in LICENSE.
"""


def folder(name: str = "wordnet") -> Path:
    """Returns the cached folder of a selection, created in a few seconds on first use.

    Raises AssetError if the package can't be downloaded.
    """
    source = Path(wordnet.__file__).read_bytes() + Path(__file__).read_bytes()
    return write_once(f"{name}-{hashlib.sha256(source).hexdigest()[:12]}", partial(_make, SELECTIONS[name]))


def copy_to(target: Path) -> Path:
    """Copies the demo's data into the folder `target`."""
    shutil.copytree(folder(), target, dirs_exist_ok=True)
    return target


def lines(definitions: Iterable[Definition]) -> str:
    """Returns JSONL with one prompt/completion pair per line."""
    return "".join(json.dumps({"prompt": noun.prompt, "completion": noun.gloss}) + "\n" for noun in definitions)


def _make(selection: Selection, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        share = debian_files(PACKAGE, Path(scratch)) / "usr/share"
        dictionary = share / "wordnet"
        with (dictionary / "index.noun").open() as index, (dictionary / "data.noun").open() as data:
            nouns = wordnet.definitions(index, data, selection.longest)
        parts = wordnet.split(nouns, selection.sizes)
        shutil.copy(share / "doc" / PACKAGE / "copyright", target / "LICENSE")
    for name, definitions in parts.items():
        (target / f"{name}.jsonl").write_text(lines(definitions))
    sizes = ", ".join(f"{size:,} in {name}.jsonl" for name, size in selection.sizes.items())
    (target / "README.md").write_text(NOTE.format(sizes=sizes))
