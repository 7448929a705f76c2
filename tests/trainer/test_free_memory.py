"""What the C library keeps for a rank's next step is given back where something else needs it."""

from __future__ import annotations

import os
import subprocess
import sys

from finetune_trainer import allocator

_PROGRAM = """
import numpy as np
from pathlib import Path
from finetune_trainer.free_memory import give_back

def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

parts = [np.ones(2**17) for _ in range(200)]  # 1 MiB each
rest = np.ones(2**10)  # keeps the heap's end in use
del parts
kept = held()
give_back()
print(kept - held(), rest[0])
"""


def test_memory_that_was_freed_goes_back_to_the_kernel() -> None:
    kept = allocator.environment("cpu", {})
    assert kept
    out = subprocess.run(
        [sys.executable, "-c", _PROGRAM], env={**os.environ, **kept}, capture_output=True, text=True, check=True
    )
    assert float(out.stdout.split()[0]) > 150
