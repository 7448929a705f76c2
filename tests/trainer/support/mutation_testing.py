"""Mutation testing: puts the bugs of docs/correctness.md (`mutants`) back, one by one, and checks
that their tests fail (`make broken`).

Each bug is put into a copy of the sources. The tests must then fail in their own bodies: an error
in a fixture doesn't count.

    python -m trainer.support.mutation_testing [NUMBER…]
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from trainer.support.mutants import ALL, Mutant

_ROOT = Path(__file__).parents[3]
_TRAINER = "trainer_image/finetune_trainer/"
_TESTS = "tests/trainer/"

# Fixtures run only some of their variants, so that a bug costs seconds.
_FEWER = (
    ("checkpoint/test_kill_anywhere.py", "@dataclass(frozen=True)\nclass Killed", ("ddp, 1 rank", "by length, padded")),
    (
        "training/test_averages.py", "_SHARDED: dict[str",
        ("llama, 1 x 4", "llama, 2 x 2", "t5, 1 x 4, padded", "t5, 2 x 2, padded"),
    ),
    (
        "training/test_invariance.py", "_HALF: dict[str",
        ("1 rank", "2 ranks", "2 ranks, zero3", "1 rank, accumulation", "2 ranks, accumulation"),
    ),
)  # fmt: skip


def main(chosen: list[str]) -> int:
    missed = 0
    for mutant in ALL:
        if chosen and str(mutant.number) not in chosen:
            continue
        for test, verdict in _verdicts(mutant):
            missed += verdict != "fails"
            print(f"{verdict:8} {mutant.number:2} {mutant.what}: {test}", flush=True)
    return 1 if missed else 0


def _verdicts(mutant: Mutant) -> list[tuple[str, str]]:
    """Puts the bug into a copy of the sources, runs its tests, and returns (test, verdict) for
    each."""
    with tempfile.TemporaryDirectory(prefix="broken-") as folder:
        root = Path(folder)
        for name in ("operator", "trainer_image", "tests", "hack"):
            shutil.copytree(_ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "docs", "examples", "crds"):
            (root / name).symlink_to(_ROOT / name)
        for file, original, replacement in mutant.edits:
            path = root / _TRAINER / file
            text = path.read_text()
            if original not in text:
                return [(test, "stale") for test in mutant.tests]
            path.write_text(text.replace(original, replacement))
        for file, anchor, ways in _FEWER:
            path = root / _TESTS / file
            text = path.read_text()
            path.write_text(text.replace(anchor, f"_WAYS = {{way: _WAYS[way] for way in {ways}}}\n{anchor}", 1))
        return [(test, _verdict(root, test)) for test in mutant.tests]


def _verdict(root: Path, test: str) -> str:
    """Returns "fails", "passes", "hangs" after 300 s, or "errors" if something else than the test's
    own body fails."""
    try:
        result = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", f"{_TESTS}{test}"],
            cwd=root, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "hangs"
    if result.returncode == 0:
        return "passes"
    in_own_body = "\nFAILED " in result.stdout and "\nERROR " not in result.stdout
    if not in_own_body:
        print(result.stdout[-3000:], file=sys.stderr)
    return "fails" if in_own_body else "errors"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
