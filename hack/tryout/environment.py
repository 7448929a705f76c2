"""Creates the Python environment .venv with only what one command needs.

`make venv` adds everything else to the same environment.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from images.cache import cache_root, uv_program
from steps import Steps

UV = "uv==0.13.9"
_GPU = Path("/dev/nvidiactl")


@dataclass(frozen=True)
class Environment:
    """The environment of a checkout in the folder `root`.

    `parts` are uv's options that select extras and groups; `marker` is a file that says that they
    are installed.
    """

    root: Path
    marker: str
    parts: tuple[str, ...]

    @classmethod
    def for_training(cls, root: Path) -> Environment:
        """Returns the environment of training on this machine and of the command line."""
        return cls(root, ".try-ready", ("--extra", "trainer", "--extra", "cli", "--group", "assets"))

    @classmethod
    def for_demo(cls, root: Path) -> Environment:
        """Returns the environment that shows a job on a cluster; it has no PyTorch."""
        return cls(root, ".demo-ready", ("--extra", "cli", "--group", "demo"))

    @property
    def python(self) -> Path:
        return self.root / ".venv" / "bin" / "python"

    @property
    def finetune(self) -> Path:
        return self.root / ".venv" / "bin" / "finetune"

    def is_ready(self) -> bool:
        """Whether the environment exists and is at least as new as the lock file."""
        locked = (self.root / "uv.lock").stat().st_mtime
        markers = [self.root / ".venv" / name for name in (".ready", self.marker)]
        return any(marker.exists() and marker.stat().st_mtime >= locked for marker in markers)

    def make(self, steps: Steps) -> None:
        """Installs what is missing, in the versions of uv.lock. Raises StepFailed."""
        if self.is_ready():
            return
        uv = str(uv_program() or _own_uv(steps))
        options = [*self.parts, "--no-dev", "--inexact", *left_out(_GPU.exists())]
        steps.call([uv, "sync", "--frozen", *options], folder=self.root)
        (self.root / ".venv" / self.marker).touch()


def left_out(has_gpu: bool) -> list[str]:
    """Returns options of uv that leave out Triton, 0.7 GB, which only compiles for GPUs."""
    return [] if has_gpu else ["--no-install-package", "triton"]


def _own_uv(steps: Steps) -> Path:
    """Installs uv into the cache, where `make venv` looks for it, too."""
    folder = cache_root() / "uv"
    steps.call([sys.executable, "-m", "venv", str(folder)])
    steps.call([str(folder / "bin" / "pip"), "install", "--quiet", UV])
    return folder / "bin" / "uv"
