"""What an interrupted benchmark has measured already. Used by `__main__`."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from images.cache import cache_root


class Kept:
    """What an interrupted run measured, by everything that it depends on. Used with --keep-going only.

    A peer's figures don't depend on our trainer, and stay when that changes.
    """

    def __init__(self, root: Path, options: argparse.Namespace) -> None:
        chosen = ("seconds", "search_seconds", "quick", "threads", "device", "model")
        asked = repr([getattr(options, name) for name in chosen])
        here = Path(__file__).parent
        theirs = [
            here / f"{name}.py" for name in ("data", "dictd", "texts", "peers", "recorder", "search", "processes")
        ]
        theirs += [here / "run_trl.py", here / "run_llamafactory.py", *here.glob("requirements/*.txt")]
        ours = (path for kind in ("*.py", "*.cpp") for path in (root / "trainer_image").rglob(kind))
        every = [*ours, *here.glob("*.py")]
        self._folders = {peer: _folder(asked, sources) for peer, sources in ((True, theirs), (False, every))}
        self._wanted = options.keep_going

    def get(self, name: str, measure: Callable[[], Any], *, peer: bool = False) -> Any:
        file = self._folders[peer] / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"
        if self._wanted and file.is_file():
            return json.loads(file.read_text())
        value = measure()
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps(value))
        aside.replace(file)
        return value


def _folder(asked: str, sources: list[Path]) -> Path:
    digest = hashlib.sha256(asked.encode())
    for source in sorted(sources):
        digest.update(source.read_bytes())
    return cache_root() / "bench-trainer" / digest.hexdigest()[:12]
