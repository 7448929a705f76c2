"""Runs one rank whose steps take half a second longer, so that a test can stop it between two."""

import sys
import time
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

from finetune_trainer.rank import main


def _wait(*_: Any) -> None:
    time.sleep(0.5)


if __name__ == "__main__":
    register_optimizer_step_post_hook(_wait)
    sys.exit(main())
