"""`finetune run FILE`: the same file and the same trainer as in a cluster, on this machine."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import socket
import sys
from pathlib import Path

from rich.console import Console

from finetune_api.reasons import REASONS
from finetune_api.run import S3Config
from finetune_cli import files, screen, session
from finetune_cli.local import CannotRunHere, LocalRun, Machine, Overrides, local_run
from finetune_cli.receiver import Receiver
from finetune_operator.plan import PlanError

USAGE_ERROR = 2
_TRAINER = ("torch", "transformers", "peft", "accelerate", "obstore")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="YAML file with one FineTuneJob; - is standard input")
    inputs = parser.add_argument_group("places (a path of this machine, or a URI), instead of the file's")
    inputs.add_argument("--model", metavar="PATH", help="base model's folder")
    inputs.add_argument("--dataset", metavar="PATH", help="training rows")
    inputs.add_argument("--validation", metavar="PATH", help="validation rows")
    inputs.add_argument("--test", metavar="PATH", help="test rows")
    inputs.add_argument("--output", metavar="PATH", help="folder for the result; default ./NAME-output")
    machine = parser.add_argument_group("this machine")
    machine.add_argument(
        "--processes", type=_positive, metavar="N", help="ranks; default: the job's, at most one a GPU or core"
    )
    machine.add_argument("--s3-endpoint", metavar="URL", help="of an S3 server; default AWS_ENDPOINT_URL, else AWS")
    machine.add_argument("--scratch", metavar="PATH", help="working folder; default in the user's cache")
    machine.add_argument("-v", "--verbose", action="store_true", help="show the trainer's log too")


def run(options: argparse.Namespace) -> int:
    console = Console(soft_wrap=True)
    missing = [name for name in _TRAINER if importlib.util.find_spec(name) is None]
    if missing:
        return _refuse(f"the trainer isn't installed ({', '.join(missing)}); install finetune-operator[trainer,cli]")
    try:
        job = files.one_job(options.file)
    except files.InvalidFile as invalid:
        return _refuse(str(invalid))
    overrides = Overrides(
        options.model, options.dataset, options.validation, options.test, options.output, options.processes
    )
    scratch_root = Path(options.scratch).resolve() if options.scratch else _cache()
    with Receiver(scratch_root / f"token-{os.getpid()}") as receiver:
        try:
            planned = local_run(
                job,
                overrides,
                _machine(),
                folder=Path.cwd(),
                scratch_root=scratch_root,
                progress=receiver.config,
                s3=_s3(options.s3_endpoint),
            )
        except (CannotRunHere, PlanError) as error:
            return _refuse(str(error))
        for note in planned.notes:
            console.print(f"[dim]note:[/dim] {note}", highlight=False)
        return _follow(planned, receiver, console, verbose=options.verbose)


def _follow(planned: LocalRun, receiver: Receiver, console: Console, *, verbose: bool) -> int:
    config = planned.config
    scratch = Path(config.scratch)
    log = scratch / "supervisor.log"
    shown = log.stat().st_size if log.exists() else 0
    with screen.Bar(console) as bar:

        def tick() -> None:
            nonlocal shown
            if verbose:
                lines, shown = session.new_lines(log, shown)
                if lines:
                    console.print(lines.rstrip("\n"), markup=False, highlight=False)
            if receiver.latest is not None:
                bar.show(receiver.latest)

        def interrupted(times: int) -> None:
            what = "saving a checkpoint; Ctrl-C again ends at once" if times == 1 else "ending at once"
            console.print(f"[yellow]{what}[/yellow]")

        ended = session.follow(
            config,
            environment=session.child_environment(),
            log=log,
            tick=tick,
            interrupted=interrupted,
        )
        tick()
    return _end(ended, config.output.display, config.model.location.display, scratch, console)


def _end(ended: session.Ended, output: str, model: str, scratch: Path, console: Console) -> int:
    last = ended.result
    log = scratch / "supervisor.log"
    if last is None:
        console.print(f"[red]the trainer died with exit code {ended.code}[/red]; its log is {log}")
        return ended.code if ended.code > 0 else 1
    if last.outcome == "succeeded":
        if "://" in output:
            console.print(f"[green]done[/green]: {output}")
        else:
            screen.summary(console, Path(output), model)
        shutil.rmtree(scratch, ignore_errors=True)
    elif last.outcome == "preempted":
        console.print(f"[yellow]stopped[/yellow]: {last.message}. The same command goes on.", highlight=False)
    else:
        console.print(f"[red]{last.reason}[/red]: ", end="")
        console.print(last.message, markup=False, highlight=False)
        console.print(f"hint: {REASONS[last.reason].hint}" if last.reason in REASONS else "", highlight=False)
        if last.log_tail:
            console.print(last.log_tail, markup=False, highlight=False, style="dim")
        console.print(f"the whole log is {log}", highlight=False)
    return ended.code


def _machine() -> Machine:
    from finetune_trainer.gpu import Gpus

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    return Machine(cores=len(os.sched_getaffinity(0)), gpus=len(Gpus().sample()), free_port=port)


def _s3(endpoint: str | None) -> S3Config:
    endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL")
    return S3Config(
        endpoint=endpoint,
        region=os.environ.get("AWS_REGION", "us-east-1"),
        allow_http=bool(endpoint and endpoint.startswith("http://")),
    )


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "finetune-operator" / "runs"


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def _refuse(message: str) -> int:
    print(f"finetune run: {message}", file=sys.stderr)
    return USAGE_ERROR
