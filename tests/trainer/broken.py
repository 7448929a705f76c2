"""Puts the bugs of docs/correctness.md (`bugs`) back, one by one, and sees their tests fail: `make broken`.

Each is put into a copy of the sources; the tests must then fail in their own bodies: an error in a fixture won't do.

    python -m trainer.broken [NUMBER…]
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from trainer.bugs import ALL, Broken

_ROOT = Path(__file__).parents[2]
_TRAINER = "trainer_image/finetune_trainer/"
_TESTS = "tests/trainer/"


# Fewer of the ways that a fixture runs, so that a bug costs seconds.
_FEWER = (
    ("test_killed_everywhere.py", "@dataclass(frozen=True)\nclass Killed", ("ddp, 1 rank", "by length, padded")),
    (
        "test_averages.py", "_SHARDED: dict[str",
        ("llama, 1 x 4", "llama, 2 x 2", "t5, 1 x 4, padded", "t5, 2 x 2, padded"),
    ),
    (
        "test_training.py", "_HALF: dict[str",
        ("1 rank", "2 ranks", "2 ranks, zero3", "1 rank, accumulation", "2 ranks, accumulation"),
    ),
)  # fmt: skip


def main(chosen: list[str]) -> int:
    missed = 0
    for broken in ALL:
        if chosen and str(broken.number) not in chosen:
            continue
        for test, verdict in _tried(broken):
            missed += verdict != "fails"
            print(f"{verdict:8} {broken.number:2} {broken.what}: {test}", flush=True)
    return 1 if missed else 0


def _tried(broken: Broken) -> list[tuple[str, str]]:
    """(test, verdict) of each."""
    with tempfile.TemporaryDirectory(prefix="broken-") as folder:
        root = Path(folder)
        for name in ("operator", "trainer_image", "tests", "hack"):
            shutil.copytree(_ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "docs", "examples", "crds"):
            (root / name).symlink_to(_ROOT / name)
        for file, says, would in broken.edits:
            path = root / _TRAINER / file
            text = path.read_text()
            if says not in text:
                return [(test, "stale") for test in broken.tests]
            path.write_text(text.replace(says, would))
        for file, before, ways in _FEWER:
            path = root / _TESTS / file
            text = path.read_text()
            path.write_text(text.replace(before, f"_WAYS = {{way: _WAYS[way] for way in {ways}}}\n{before}", 1))
        return [(test, _verdict(root, test)) for test in broken.tests]


def _verdict(root: Path, test: str) -> str:
    """fails, passes, or in how many seconds, errors, if it isn't the test's own body that fails."""
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", f"{_TESTS}{test}"],
            cwd=root, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "hangs"
    if ended.returncode == 0:
        return "passes"
    own = "\nFAILED " in ended.stdout and "\nERROR " not in ended.stdout
    if not own:
        print(ended.stdout[-3000:], file=sys.stderr)
    return "fails" if own else "errors"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
