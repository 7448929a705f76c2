"""Where things that cost time to make are kept, outside the checkout. Used by cli and by demo_assets.

The same rule as localcluster.paths has; kept apart so that building an image needs no cluster code.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """$FINETUNE_CACHE, else $XDG_CACHE_HOME/finetune-operator, else ~/.cache/finetune-operator."""
    if explicit := os.environ.get("FINETUNE_CACHE"):
        return Path(explicit).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().resolve() / "finetune-operator"
