"""The cache folder, outside the checkout, of what takes long to make, and uv, which may be in it.

The rule is the same as in localcluster.paths, repeated here so that building an image needs no
cluster code.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def cache_root() -> Path:
    """Returns the cache folder.

    It is $FINETUNE_CACHE, else $XDG_CACHE_HOME/finetune-operator, else ~/.cache/finetune-operator.
    """
    if explicit := os.environ.get("FINETUNE_CACHE"):
        return Path(explicit).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().resolve() / "finetune-operator"


def uv_program() -> Path | None:
    """Returns the uv on PATH, else the one that `make venv` installed; None if there is neither."""
    if on_path := shutil.which("uv"):
        return Path(on_path)
    installed = cache_root() / "uv" / "bin" / "uv"
    return installed if installed.exists() else None
