"""Runs one rank: `python -m finetune_trainer.rank`, with torchrun's environment variables.

A rank reads run.json, the model and the rows from the node's scratch disk, and reports everything
through its events file. It downloads nothing, uploads nothing and serves nothing.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from types import FrameType

from finetune_api.messages.run import RunConfig, parse
from finetune_api.names import SCRATCH_ROOT
from finetune_api.reasons import REASONS
from finetune_trainer import libraries
from finetune_trainer.errors import run_error_from
from finetune_trainer.paths import Paths
from finetune_trainer.reporting.event_writer import EventWriter


def main() -> int:
    """Returns 0 after the result or an agreed stop. After a failure it doesn't return: the process
    exits with the code of the reason that its error event reports."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; stopping is agreed by the flag
    signal.signal(signal.SIGTERM, _set_stop_flag)
    paths = _paths()
    reporter = EventWriter(paths.rank_events(int(os.environ.get("RANK", "0"))), int(os.environ.get("RANK", "0")))
    try:
        run = parse(paths.run_config.read_bytes())
        libraries.quiet()
        _run_job(run, paths, reporter)
    except BaseException as error:  # libraries in Rust raise some that aren't of the type Exception
        run_error = run_error_from(error)
        traceback.print_exc()
        reporter.error(run_error, error)
        _exit(REASONS[run_error.reason].exit_code or 1)
    return 0


def _run_job(run: RunConfig, paths: Paths, reporter: EventWriter) -> None:
    """Joins the other ranks and trains. Importing torch takes seconds, so it happens only here,
    after the run configuration was read."""
    from finetune_trainer.parallel import world
    from finetune_trainer.parallel.network import flight_recorder
    from finetune_trainer.training import job
    from finetune_trainer.training.context import RankContext

    group = world.from_environment(os.environ, run.world.device)
    world.join(group, expected=run.world.size, timeout=world.COLLECTIVE_TIMEOUT)
    flight_recorder.answer_requests(paths.flight_request, paths.flight_record(group.rank))
    job.run_job(RankContext(run, paths, group, reporter))
    world.leave(group)


def _paths() -> Paths:
    return Paths(Path(os.environ.get("FINETUNE_SCRATCH", SCRATCH_ROOT)))


def _set_stop_flag(number: int, frame: FrameType | None) -> None:
    """Asks all ranks to stop, because this one was asked. They agree after a step and save it."""
    with suppress(OSError):
        _paths().stop.touch()


def _exit(code: int) -> None:
    """Exits immediately: peers notice lost connections, and a hanging collective can't block it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
