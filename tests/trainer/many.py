"""A rank that does several runs, one after the other, so that tests pay once for making its process group.

What it does for each is `story.tell`, as `finetune_trainer.rank` does. A run that fails ends all, unless its folder has
the file MAY_BE_REFUSED and all ranks refuse it alike.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

from finetune_api.run import parse
from finetune_trainer import story, world
from finetune_trainer.failure import Failed
from finetune_trainer.paths import Paths
from finetune_trainer.reporter import Reporter

MAY_BE_REFUSED = "may-be-refused"


def main(folders: list[str]) -> None:
    who = world.from_environment(os.environ, "cpu")
    world.join(who, expected=who.size, timeout=timedelta(seconds=120))
    for folder in folders:
        paths = Paths(Path(folder))
        run = parse(paths.run_config.read_bytes())
        _forget_accelerate()
        reporter = Reporter(paths.rank_events(who.rank), who.rank)
        try:
            story.tell(run, paths, who, reporter)
        except Failed as refusal:
            if not (Path(folder) / MAY_BE_REFUSED).exists():
                raise
            reporter.error(refusal, refusal)
    world.leave(who)


def _forget_accelerate() -> None:
    """Accelerate keeps its state for the life of a process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
