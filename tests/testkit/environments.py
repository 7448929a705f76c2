"""Python packages that tests need and nothing else: in environments of their own, made once and kept.

They would weigh on the lock file (a server, a cloud's client) or can't live beside what we run on.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

_CACHE = Path(os.environ.get("FINETUNE_CACHE") or Path.home() / ".cache" / "finetune-operator")


def environment(name: str, *packages: str, alone: tuple[str, ...] = ()) -> Path:
    """A virtual environment's folder. `alone` are installed without what they depend on."""
    folder = _CACHE / "environments" / name
    if not (folder / "ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        uv = shutil.which("uv") or str(_CACHE / "uv" / "bin" / "uv")
        subprocess.run([uv, "venv", "-q", "--python", sys.executable, str(folder)], check=True)
        install = [uv, "pip", "install", "-q", "--python", str(folder / "bin" / "python")]
        if packages:
            subprocess.run([*install, *packages], check=True)
        if alone:
            subprocess.run([*install, "--no-deps", *alone], check=True)
        (folder / "ready").touch()
    return folder
