"""Starts a trainer pod. `python -m finetune_trainer` supervises a node; `… preflight` only checks,
and `… cleanup` deletes what a deleted job leaves.

It reads the environment, arguments and files once, writes the termination message, and returns the
exit code that finetune_api.reasons gives. It decides nothing else.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from finetune_api import __version__, names
from finetune_api.messages import result
from finetune_api.reasons import REASONS
from finetune_trainer.errors import RunError
from finetune_trainer.log import Log
from finetune_trainer.supervisor import node as node_module
from finetune_trainer.supervisor.node import Node
from finetune_trainer.supervisor.signals import StopRequest, in_thread

_STOP_SECONDS = 3.0  # for giving the output back after a signal
_TICK_SECONDS = 0.1  # between two looks at signals, which Python handles in the main thread only

_EPILOG = f"""environment:
  {names.ENV_RUN_CONFIG}     file with the RunConfig (JSON); default {names.RUN_CONFIG_PATH}
  {names.ENV_NODE_RANK}     this node's rank, from 0; default 0
  {names.ENV_TERMINATION_LOG}  file to which the result is written; default {names.TERMINATION_LOG_PATH}
  FINETUNE_LOG_FORMAT     json (default) or text
  FINETUNE_TRACKING_PATIENCE  seconds to wait for trackers at the end; default 30
  AWS_*, GOOGLE_*, AZURE_*, HF_*
                          credentials and endpoints if the RunConfig names no Secret

exit codes:
  0 succeeded; {REASONS["Preempted"].exit_code} asked to stop (a checkpoint was saved if there was something to save);
  otherwise by reason:
  {", ".join(f"{r.exit_code} {r.name}" for r in REASONS.values() if r.exit_code and r.name != "Preempted")}
"""


class _Stopped(Exception):
    """A signal asked the process to end."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit code of the pod."""
    parser = argparse.ArgumentParser(
        prog="python -m finetune_trainer",
        description="Runs one node's part of a FineTuneJob: downloads the model and the data, starts and watches "
        "the ranks, serves metrics, and uploads checkpoints and the result.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument(
        "command",
        nargs="?",
        choices=("supervise", "preflight", "cleanup"),
        default="supervise",
        help="supervise (default): train. preflight: only check the output, the model and the data, without a GPU. "
        "cleanup: delete what a deleted job leaves in its output.",
    )
    parser.add_argument(
        "--rank-command",
        metavar="PROGRAM",
        help="another program to run as the ranks, split at spaces; for tests",
    )
    options = parser.parse_args(arguments)
    environment = dict(os.environ)
    log = Log(text=environment.get("FINETUNE_LOG_FORMAT") == "text")
    try:
        node = node_module.parse(environment)
    except RunError as error:
        return _finish(_failed(error, log), node_module.termination_log(environment), log)
    if options.rank_command:
        node = replace(node, rank_command=tuple(options.rank_command.split()))
    if options.command == "preflight":
        return _finish(_preflight(node, log), node.termination_log, log)
    if options.command == "cleanup":
        return _finish(_cleanup(node, log), node.termination_log, log)
    return _supervise(node, log)


def _supervise(node: Node, log: Log) -> int:
    from finetune_trainer.supervisor.processes import become_subreaper, hide_from_ranks
    from finetune_trainer.supervisor.supervisor import Supervisor

    stop = StopRequest(max(1.0, node.run.grace_seconds - node.timing.grace_margin))
    stop.install()
    become_subreaper()
    hide_from_ranks()
    code = _finish(Supervisor(node, stop, log).run(), node.termination_log, log)
    deadline = time.monotonic() + (node.run.metrics_linger_seconds if node.run.metrics_port else 0)
    while time.monotonic() < deadline and not stop.requested:
        time.sleep(0.1)
    return code


def _preflight(node: Node, log: Log) -> result.Result:
    from finetune_trainer.supervisor import preflight
    from finetune_trainer.supervisor.processes import hide_from_ranks

    hide_from_ranks()
    try:
        return _interruptible(
            lambda waiting: preflight.check_in_time(node.run, node.paths, node.access, log.info, waiting),
            log,
            on_stop=lambda: preflight.give_back(node.run, node.access, _STOP_SECONDS),
        )
    finally:
        shutil.rmtree(node.paths.model, ignore_errors=True)


def _cleanup(node: Node, log: Log) -> result.Result:
    from finetune_trainer.destination import cleanup
    from finetune_trainer.storage.schemes import open_folder

    def clean() -> result.Result:
        storage = open_folder(node.run.output, "output", node.access)
        return result.Result(outcome="succeeded", message=cleanup.clean(storage, node.run, log.info))

    return _interruptible(lambda waiting: in_thread(clean, waiting, _TICK_SECONDS), log)


def _interruptible(
    work: Callable[[Callable[[], None]], result.Result], log: Log, on_stop: Callable[[], None] = lambda: None
) -> result.Result:
    """Returns the result of `work`, which calls its argument ten times a second.

    After a signal, this call raises; then `on_stop` runs, and the process ends.
    """
    from finetune_trainer.supervisor import outcomes

    # PID 1 has no default action for signals: without this, a deleted pod would last for its grace
    # period.
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())

    def waiting() -> None:
        if stopped.is_set():
            raise _Stopped

    try:
        return work(waiting)
    except _Stopped:
        on_stop()
        _exit(REASONS["Preempted"].exit_code)
    except RunError as error:
        return _failed(error, log)
    except Exception as error:
        return _failed(outcomes.unexpected(error, log), log)


def _failed(error: RunError, log: Log) -> result.Result:
    log.error(error.message, reason=error.reason)
    return result.Result(outcome="failed", reason=error.reason, message=error.message)


def _finish(outcome: result.Result, termination_log: Path, log: Log) -> int:
    """Writes the termination message and returns the exit code."""
    try:
        termination_log.write_text(result.encode(outcome))
    except OSError as error:
        log.warning("can't write the termination message", file=str(termination_log), detail=str(error))
    log.info(f"ended: {outcome.outcome}", reason=outcome.reason or None, detail=outcome.message or None)
    if outcome.outcome == "succeeded":
        return 0
    return REASONS[outcome.reason].exit_code


def _exit(code: int) -> NoReturn:
    """Ends the process even if a thread still waits for a storage."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _exit(main())
