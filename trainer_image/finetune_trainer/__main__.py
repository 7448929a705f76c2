"""The door of a trainer pod: `python -m finetune_trainer` supervises one node, `… preflight` only checks.

Reads environment, arguments and files once, writes the termination message, and returns the exit code that
finetune_api.reasons gives. Decides nothing else.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from finetune_api import __version__, names, result
from finetune_api.reasons import REASONS
from finetune_trainer import node as nodes
from finetune_trainer.failure import Failed
from finetune_trainer.log import Log
from finetune_trainer.node import Node
from finetune_trainer.stopping import StopRequest

_EPILOG = f"""environment:
  {names.ENV_RUN_CONFIG}     file with the RunConfig (JSON); default {names.RUN_CONFIG_PATH}
  {names.ENV_NODE_RANK}     this node's rank, from 0; default 0
  {names.ENV_TERMINATION_LOG}  where the result is written; default {names.TERMINATION_LOG_PATH}
  FINETUNE_LOG_FORMAT     json (default) or text
  FINETUNE_TRACKING_PATIENCE  seconds that trackers get at the end; default 30
  AWS_*, HF_*             credentials and endpoints where the RunConfig names no Secret

exit codes:
  0 done; {REASONS["Preempted"].exit_code} asked to leave (with a checkpoint where there was something to save);
  else by reason:
  {", ".join(f"{r.exit_code} {r.name}" for r in REASONS.values() if r.exit_code and r.name != "Preempted")}
"""


def main(arguments: list[str] | None = None) -> int:
    """The exit code of the pod."""
    parser = argparse.ArgumentParser(
        prog="python -m finetune_trainer",
        description="Trains one FineTuneJob's part of one node: fetches model and data, starts the ranks, watches "
        "them, serves metrics, uploads checkpoints and the result.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument(
        "command",
        nargs="?",
        choices=("supervise", "preflight"),
        default="supervise",
        help="supervise (default): train. preflight: only check destination, model and data, without a GPU.",
    )
    parser.add_argument(
        "--rank-command",
        metavar="PROGRAM",
        help="another program for the ranks, split at blanks; for tests",
    )
    options = parser.parse_args(arguments)
    environment = dict(os.environ)
    log = Log(text=environment.get("FINETUNE_LOG_FORMAT") == "text")
    try:
        node = nodes.parse(environment)
    except Failed as failed:
        log.error(failed.message, reason=failed.reason)
        return _end(result.Result(outcome="failed", reason=failed.reason, message=failed.message),
                    nodes.termination_log(environment), log)  # fmt: skip
    if options.rank_command:
        node = replace(node, rank_command=tuple(options.rank_command.split()))
    if options.command == "preflight":
        return _end(_preflight(node, log), node.termination_log, log)
    return _supervise(node, log)


def _supervise(node: Node, log: Log) -> int:
    from finetune_trainer.ranks import become_subreaper
    from finetune_trainer.supervisor import Supervisor

    stop = StopRequest(max(1.0, node.run.grace_seconds - node.timing.grace_margin))
    stop.install()
    become_subreaper()
    code = _end(Supervisor(node, stop, log).run(), node.termination_log, log)
    deadline = time.monotonic() + (node.run.metrics_linger_seconds if node.run.metrics_port else 0)
    while time.monotonic() < deadline and not stop.asked:
        time.sleep(0.1)
    return code


def _preflight(node: Node, log: Log) -> result.Result:
    from finetune_trainer import preflight

    # As PID 1 we have no default action for signals: without this, a deleted pod would stay its grace period.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(REASONS["Preempted"].exit_code))
    # In a thread, since a signal is heard by the main one only, and only between two steps of Python.
    checks = ThreadPoolExecutor(1).submit(preflight.check, node.run, node.paths, node.access, log.info)
    try:
        while True:
            try:
                return checks.result(timeout=0.1)
            except TimeoutError:
                if checks.done():
                    raise
    except Failed as failed:
        log.error(failed.message, reason=failed.reason)
        return result.Result(outcome="failed", reason=failed.reason, message=failed.message)
    finally:
        shutil.rmtree(node.paths.model, ignore_errors=True)


def _end(ended: result.Result, termination_log: Path, log: Log) -> int:
    """Leaves the last word and returns the exit code."""
    text = result.encode(ended)
    try:
        termination_log.write_text(text)
    except OSError as error:
        log.warning("no termination message can be written", file=str(termination_log), detail=str(error))
    log.info(f"ended: {ended.outcome}", reason=ended.reason or None, detail=ended.message or None)
    if ended.outcome == "succeeded":
        return 0
    return REASONS[ended.reason].exit_code


def _leave(code: int) -> None:
    """Ends the process even while a thread still waits for a store."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _leave(main())
