"""A rank: `python -m finetune_trainer.rank`, started by the supervisor with torchrun's environment.

Reads run.json, the model and the rows from the node's scratch disk; says everything through its events file. Top to
bottom: model → data → loop → save. Fetches nothing, uploads nothing, serves nothing.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import traceback
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType

from finetune_api.names import SCRATCH_ROOT
from finetune_api.reasons import REASONS
from finetune_api.run import RunConfig, parse
from finetune_trainer import lean
from finetune_trainer.diagnosis import failed_from
from finetune_trainer.paths import Paths
from finetune_trainer.reporter import Reporter

_LONGEST_WAIT = timedelta(minutes=60)  # for another rank in a collective; the supervisor's stall watchdog is shorter


def main() -> int:
    """0 after the result or an agreed stop; else the exit code of the reason that the error event tells."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches a whole terminal; stopping is agreed by the flag file
    signal.signal(signal.SIGTERM, _flag)
    paths = _paths()
    reporter = Reporter(paths.rank_events(int(os.environ.get("RANK", "0"))), int(os.environ.get("RANK", "0")))
    try:
        run = parse(paths.run_config.read_bytes())
        _quieten()
        _tell(run, paths, reporter)
    except Exception as error:
        failed = failed_from(error)
        traceback.print_exc()
        reporter.error(failed, error)
        _end(REASONS[failed.reason].exit_code or 1)
    return 0


def _tell(run: RunConfig, paths: Paths, reporter: Reporter) -> None:
    """Importing torch and its friends takes seconds, so it comes after the run configuration was read."""
    from finetune_trainer import story, world

    who = world.from_environment(os.environ, run.world.device)
    world.join(who, expected=run.world.size, timeout=_LONGEST_WAIT)
    story.tell(run, paths, who, reporter)
    world.leave(who)


def _paths() -> Paths:
    return Paths(Path(os.environ.get("FINETUNE_SCRATCH", SCRATCH_ROOT)))


def _flag(number: int, frame: FrameType | None) -> None:
    """A rank that is asked to leave asks all of them: they agree after the step, and save the same one."""
    with suppress(OSError):
        _paths().stop.touch()


def _quieten() -> None:
    """No network, no advice, no progress bars: the log is read by people who look for an error."""
    lean.without_trackers()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def _end(code: int) -> None:
    """At once: peers notice by their connections, and a collective that hangs can't hold us."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
