"""`finetune validate FILE...`: what the API server would refuse, and what a run would find in the data; no cluster."""

from __future__ import annotations

import argparse
import sys

from finetune_api.resource import FineTuneJob
from finetune_cli import files, show_data
from finetune_operator.plan import PlanError, plan
from finetune_operator.settings import Settings
from finetune_trainer.failure import Failed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", metavar="FILE", nargs="+", help="YAML files; - is standard input")
    show_data.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """0 when every job of every file is valid (and its rows can be used, where --data names them), else 1."""
    if options.data:
        return _data(options)
    failed = False
    for name in options.files:
        found = files.read(name)
        problems = [*found.problems, *(p for job in found.jobs for p in _plan_problems(name, job))]
        for problem in problems:
            print(problem, file=sys.stderr)
        failed |= bool(problems)
        if not problems:
            jobs = ", ".join(job.metadata.name for job in found.jobs)
            print(f"{name}: {jobs} {'is' if len(found.jobs) == 1 else 'are'} valid")
    return 1 if failed else 0


def _data(options: argparse.Namespace) -> int:
    if len(options.files) != 1:
        print("finetune validate: --data goes with one FILE; put -- or another option before it", file=sys.stderr)
        return 1
    try:
        return show_data.show(files.one_job(options.files[0]), options)
    except (files.InvalidFile, PlanError, Failed, show_data.CannotRead) as error:
        print(f"finetune validate: {error}", file=sys.stderr)
        return 1


def _plan_problems(name: str, job: FineTuneJob) -> list[files.Problem]:
    """What passes the schema and still can't be carried out."""
    try:
        plan(job, Settings())
    except PlanError as error:
        return [files.Problem(name, 0, str(error))]
    return []
