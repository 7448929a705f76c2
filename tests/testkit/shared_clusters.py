"""Clusters that the processes of pytest-xdist share.

The first process that needs one starts it. The process that started the others removes all when
the tests have ended, even if they were interrupted.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from demo import clusters

_FOLDER = "FINETUNE_TEST_CLUSTERS"  # variable that names the folder with a file NAME.json for each cluster


def begin() -> None:
    """Makes clusters of this process and of those that it starts known to each other."""
    os.environ[_FOLDER] = tempfile.mkdtemp(prefix="finetune-clusters-")


def end() -> None:
    """Removes the clusters."""
    folder = Path(os.environ.pop(_FOLDER))
    for file in folder.glob("*.json"):
        clusters.remove(file.stem)
    shutil.rmtree(folder)


def shared(name: str, start: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns the description of the cluster of that name, which `start` returns.

    `start` is called if no process has done so. A second process waits until it has returned, and
    raises an error if it failed.
    """
    file = Path(os.environ[_FOLDER]) / f"{name}.json"
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            file.touch()  # if it fails to start, it is removed all the same
            file.write_text(json.dumps(start()))
        text = file.read_text()
    assert text, f"cluster {name} didn't start; the first test that needs it shows why"
    description: dict[str, Any] = json.loads(text)
    return description
