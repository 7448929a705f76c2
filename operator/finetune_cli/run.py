"""`finetune run FILE`: trains on this machine, with the same file and trainer as in a cluster."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_api.reasons import REASONS
from finetune_cli import files, session
from finetune_cli.local import (
    CannotRunHere,
    LocalRun,
    Machine,
    Overrides,
    Workspace,
    azure_config,
    gcs_config,
    local_run,
    s3_config,
)
from finetune_cli.receiver import Receiver
from finetune_operator.core.plan import PlanError

if TYPE_CHECKING:
    from rich.console import Console

USAGE_ERROR = 2
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "obstore", "rich")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `finetune run`."""
    parser.add_argument("file", metavar="FILE", help="YAML file with one FineTuneJob; - is standard input")
    inputs = parser.add_argument_group("locations (a path on this machine, or a URI) that replace those of the file")
    inputs.add_argument("--model", metavar="PATH", help="folder of the base model")
    inputs.add_argument("--dataset", metavar="PATH", help="training rows")
    inputs.add_argument("--validation", metavar="PATH", help="validation rows")
    inputs.add_argument("--test", metavar="PATH", help="test rows")
    inputs.add_argument(
        "--output", metavar="PATH", help="folder for the result; default ./NAME-output, after the job's name"
    )
    machine = parser.add_argument_group("this machine")
    machine.add_argument(
        "--processes",
        type=_positive,
        metavar="N",
        help="number of ranks; default the job's, but at most one per GPU or CPU core",
    )
    machine.add_argument(
        "--s3-endpoint", metavar="URL", help="endpoint of an S3 server; default AWS_ENDPOINT_URL, else AWS"
    )
    machine.add_argument("--scratch", metavar="PATH", help="working folder; default in the user's cache folder")
    machine.add_argument("-v", "--verbose", action="store_true", help="also show the trainer's log")


def run(options: argparse.Namespace) -> int:
    """Trains. Returns 0, 2 if the file or an option is invalid, else the trainer's exit code.

    Raises ModuleNotFoundError if the trainer isn't installed.
    """
    _require_packages()
    from rich.console import Console

    console = Console(soft_wrap=True)
    try:
        job = files.one_job(options.file)
    except files.InvalidFile as error:
        return _usage_error(str(error))
    overrides = Overrides(
        options.model, options.dataset, options.validation, options.test, options.output, options.processes
    )
    scratch_root = Path(options.scratch).resolve() if options.scratch else _cache_folder()
    with Receiver(scratch_root / f"token-{os.getpid()}") as receiver:
        workspace = Workspace(
            Path.cwd(),
            scratch_root,
            receiver.config,
            s3_config(os.environ, options.s3_endpoint),
            gcs_config(os.environ),
            azure_config(os.environ),
        )
        try:
            planned = local_run(job, overrides, _machine(), workspace)
        except (CannotRunHere, PlanError) as error:
            return _usage_error(str(error))
        for note in planned.notes:
            console.print(f"[dim]note:[/dim] {note}", highlight=False)
        return _follow(planned, receiver, console, verbose=options.verbose)


def _require_packages() -> None:
    """Raises ModuleNotFoundError, as an import would, that names all packages that are missing."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"not installed: {', '.join(missing)}", name=", ".join(missing))


def _follow(planned: LocalRun, receiver: Receiver, console: Console, *, verbose: bool) -> int:
    """Runs the supervisor and shows its progress. Returns the exit code."""
    from finetune_cli import screen

    config = planned.config
    scratch = Path(config.scratch)
    log = scratch / "supervisor.log"
    shown_bytes = log.stat().st_size if log.exists() else 0
    with screen.Bar(console) as bar:

        def tick() -> None:
            """Shows new log lines and the latest progress."""
            nonlocal shown_bytes
            if verbose:
                lines, shown_bytes = session.new_lines(log, shown_bytes)
                if lines:
                    console.print(lines.rstrip("\n"), markup=False, highlight=False)
            if receiver.latest is not None:
                bar.show(receiver.latest)

        def interrupted(times: int) -> None:
            """Shows what the interruption number `times` does."""
            first = "saving a checkpoint; press Ctrl-C again to stop immediately"
            console.print(f"[yellow]{first if times == 1 else 'stopping immediately'}[/yellow]")

        ended = session.follow(
            config,
            environment=session.child_environment(),
            log=log,
            tick=tick,
            interrupted=interrupted,
        )
        tick()
    return _show_end(ended, config.output.display, config.model.location.display, scratch, console)


def _show_end(ended: session.Ended, output: str, model: str, scratch: Path, console: Console) -> int:
    """Shows how the run ended. Returns the exit code."""
    from finetune_cli import screen

    result = ended.result
    log = scratch / "supervisor.log"
    if result is None:
        console.print(f"[red]the trainer died with exit code {ended.code}[/red]; its log is {log}")
        return ended.code if ended.code > 0 else 1
    if result.outcome == "succeeded":
        if "://" in output:
            console.print(f"[green]done[/green]: {output}")
        else:
            screen.summary(console, Path(output), model)
        shutil.rmtree(scratch, ignore_errors=True)
    elif result.outcome == "preempted":
        resume = "Run the same command again to resume."
        console.print(f"[yellow]stopped[/yellow]: {result.message}. {resume}", highlight=False)
    else:
        console.print(f"[red]{result.reason}[/red]: ", end="")
        console.print(result.message, markup=False, highlight=False)
        console.print(f"hint: {REASONS[result.reason].hint}" if result.reason in REASONS else "", highlight=False)
        if result.log_tail:
            console.print(result.log_tail, markup=False, highlight=False, style="dim")
        console.print(f"the full log is {log}", highlight=False)
    return ended.code


def _machine() -> Machine:
    from finetune_trainer.reporting.gpus.watch import Gpus

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    today = datetime.now(UTC).date().isoformat()
    return Machine(cores=len(os.sched_getaffinity(0)), gpus=len(Gpus().sample()), free_port=port, today=today)


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "finetune-operator" / "runs"


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 1")
    return int(text)


def _usage_error(message: str) -> int:
    print(f"finetune run: {message}", file=sys.stderr)
    return USAGE_ERROR
