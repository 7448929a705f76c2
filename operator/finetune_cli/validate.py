"""`finetune validate FILE...`: checks files and rows without a cluster."""

from __future__ import annotations

import argparse
import sys

from finetune_api.resource import FineTuneJob
from finetune_cli import files, show_data
from finetune_operator.core.plan import PlanError, plan
from finetune_operator.settings import Settings
from finetune_trainer.errors import RunError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `finetune validate`."""
    parser.add_argument("files", metavar="FILE", nargs="+", help="YAML files; - is standard input")
    show_data.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Checks the files. Returns 0 if all jobs of all files, and the rows of --data, are valid, else
    1."""
    if options.data:
        return _check_data(options)
    failed = False
    for name in options.files:
        file = files.read(name)
        problems = [*file.problems, *(p for job in file.jobs for p in _plan_problems(name, job))]
        for problem in problems:
            print(problem, file=sys.stderr)
        failed |= bool(problems)
        if not problems:
            jobs = ", ".join(job.metadata.name for job in file.jobs)
            print(f"{name}: {jobs} {'is' if len(file.jobs) == 1 else 'are'} valid")
    return 1 if failed else 0


def _check_data(options: argparse.Namespace) -> int:
    if len(options.files) != 1:
        print(
            "finetune validate: --data needs exactly one FILE; give it before --data",
            file=sys.stderr,
        )
        return 1
    try:
        return show_data.show(files.one_job(options.files[0]), options)
    except (files.InvalidFile, PlanError, RunError, show_data.CannotRead) as error:
        print(f"finetune validate: {error}", file=sys.stderr)
        return 1


def _plan_problems(name: str, job: FineTuneJob) -> list[files.Problem]:
    """Returns the problems of a job that the schema accepts but that can't be planned."""
    try:
        plan(job, Settings())
    except PlanError as error:
        return [files.Problem(name, 0, str(error))]
    return []
