"""A rank that does several runs in sequence, so that tests set up its process group only once.

Each run is `job.run_job`, as in `finetune_trainer.rank`. A run that fails ends the sequence, unless
its folder has the file MAY_BE_REFUSED and every rank rejects it in the same way.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

from finetune_api.messages.run import parse
from finetune_trainer.errors import RunError
from finetune_trainer.parallel import world
from finetune_trainer.paths import Paths
from finetune_trainer.reporting.event_writer import EventWriter
from finetune_trainer.training import job
from finetune_trainer.training.context import RankContext

MAY_BE_REFUSED = "may-be-refused"


def main(folders: list[str]) -> None:
    own_world = world.from_environment(os.environ, "cpu")
    world.join(own_world, expected=own_world.size, timeout=timedelta(seconds=120))
    for folder in folders:
        paths = Paths(Path(folder))
        os.environ["FINETUNE_SCRATCH"] = folder
        run = parse(paths.run_config.read_bytes())
        _reset_accelerate()
        writer = EventWriter(paths.rank_events(own_world.rank), own_world.rank)
        try:
            job.run_job(RankContext(run, paths, own_world, writer))
        except RunError as error:
            if not (Path(folder) / MAY_BE_REFUSED).exists():
                raise
            writer.error(error, error)
    world.leave(own_world)


def _reset_accelerate() -> None:
    """Discards the state that Accelerate keeps for the life of a process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
