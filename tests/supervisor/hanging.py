"""A rank that hangs, for tests: `finetune_trainer.rank`, but rank 1 sleeps in its third step's forward pass.

Until then every rank of this file says that it is alive, however long its start takes.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

from finetune_trainer import rank
from finetune_trainer.paths import Paths

_STEP = 3


def main() -> int:
    started = threading.Event()
    threading.Thread(target=_live, args=(started,), daemon=True).start()
    from torch.nn import Embedding, Module
    from torch.nn.modules.module import register_module_forward_pre_hook

    seen = 0

    def hang_for_ever(module: Module, inputs: Any) -> None:
        nonlocal seen
        seen += isinstance(module, Embedding) and module.training
        if seen == _STEP:
            started.set()
            if os.environ["RANK"] == "1":
                time.sleep(3600)

    register_module_forward_pre_hook(hang_for_ever)
    return rank.main()


def _live(started: threading.Event) -> None:
    beat = Paths(Path(os.environ["FINETUNE_SCRATCH"])).rank_alive(int(os.environ["RANK"]))
    while not started.wait(0.2):
        beat.parent.mkdir(exist_ok=True)
        beat.touch()


if __name__ == "__main__":
    main()
