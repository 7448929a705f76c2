"""Stores measurements, so that an interrupted benchmark can resume."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from images.cache import cache_root


class MeasurementCache:
    """Measurements by everything that they depend on; only --keep-going reads them.

    A peer's figures don't depend on our trainer, so they stay valid when it changes.
    """

    def __init__(self, root: Path, options: argparse.Namespace) -> None:
        option_names = ("seconds", "search_seconds", "quick", "threads", "device", "model")
        selection = repr([getattr(options, name) for name in option_names])
        here = Path(__file__).parent
        peer_sources = [
            here / f"{name}.py" for name in ("data", "dictd", "texts", "peers", "recorder", "search", "processes")
        ]
        peer_sources += [here / "run_trl.py", here / "run_llamafactory.py", *here.glob("requirements/*.txt")]
        trainer_sources = (path for kind in ("*.py", "*.cpp") for path in (root / "trainer_image").rglob(kind))
        all_sources = [*trainer_sources, *here.glob("*.py")]
        self._folders = {
            peer: _folder(selection, sources) for peer, sources in ((True, peer_sources), (False, all_sources))
        }
        self._enabled = options.keep_going

    def get(self, name: str, measure: Callable[[], Any], *, peer: bool = False) -> Any:
        """Returns the stored measurement, or measures and stores it."""
        file = self._folders[peer] / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"
        if self._enabled and file.is_file():
            return json.loads(file.read_text())
        value = measure()
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(value))
        partial.replace(file)
        return value


def _folder(selection: str, sources: list[Path]) -> Path:
    digest = hashlib.sha256(selection.encode())
    for source in sorted(sources):
        digest.update(source.read_bytes())
    return cache_root() / "bench-trainer" / digest.hexdigest()[:12]
