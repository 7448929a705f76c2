"""A rank that hangs, for tests. It is `finetune_trainer.rank`, except that rank 1 sleeps in the
forward pass of its third step.

Until then, every rank touches its heartbeat file, however long its start takes.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

from finetune_trainer import rank
from finetune_trainer.paths import Paths

_HANGING_STEP = 3


def main() -> int:
    started = threading.Event()
    threading.Thread(target=_send_heartbeats, args=(started,), daemon=True).start()
    from torch.nn import Embedding, Module
    from torch.nn.modules.module import register_module_forward_pre_hook

    steps = 0

    def hang_forever(module: Module, inputs: Any) -> None:
        nonlocal steps
        steps += isinstance(module, Embedding) and module.training
        if steps == _HANGING_STEP:
            started.set()
            if os.environ["RANK"] == "1":
                time.sleep(3600)

    register_module_forward_pre_hook(hang_forever)
    return rank.main()


def _send_heartbeats(started: threading.Event) -> None:
    heartbeat = Paths(Path(os.environ["FINETUNE_SCRATCH"])).rank_heartbeat(int(os.environ["RANK"]))
    while not started.wait(0.2):
        heartbeat.parent.mkdir(exist_ok=True)
        heartbeat.touch()


if __name__ == "__main__":
    main()
