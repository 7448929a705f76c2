"""What `finetune plan` says of usual jobs on usual GPUs, which are the files in examples/gpus.

Each file has the command in a comment, and that command is run, on a folder that has the shapes of
the published model.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from finetune_cli.main import main
from sizing import folders
from sizing.models import MODELS

ROOT = Path(__file__).resolve().parents[2]
JOBS = ROOT / "examples" / "gpus"
SHOWN = "full-8b-8h100"
"""The job whose output is shown as a whole."""

_COMMAND = re.compile(r"^# +(finetune plan .*)$", re.MULTILINE)
_CHOSEN = re.compile(r"^  chosen: (.*?) \((.*)\); micro-batches of (\d+) tokens$", re.MULTILINE)
_ABOUT = re.compile(r"\A# (.*?)\.?\n")


@dataclass(frozen=True)
class PlannedJob:
    """A job, the command that shows what is chosen for it, and what the command printed."""

    name: str
    about: str
    command: str
    output: str

    @property
    def chosen(self) -> str:
        """How the job is trained."""
        return self._choice[0]

    @property
    def reason(self) -> str:
        """Why nothing faster was chosen."""
        return self._choice[1]

    @property
    def tokens(self) -> int:
        """How many tokens are computed at a time."""
        return int(self._choice[2])

    @property
    def row(self) -> str:
        """A row of the table."""
        file = f"[{self.name}](../examples/gpus/{self.name}.yaml)"
        free = self.command.rpartition(" ")[2]
        return f"| {file} | {self.about} | {free} | {self.chosen} | {self.tokens:,} | {self.reason} |"

    @property
    def _choice(self) -> tuple[str, ...]:
        match = _CHOSEN.search(self.output)
        if match is None:
            raise ValueError(f"{self.command} chose nothing:\n{self.output}")
        return match.groups()


def planned_jobs() -> list[PlannedJob]:
    """Runs the command of every job, in the order of the files' names."""
    with TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("examples").symlink_to(JOBS.parent)
        for model in MODELS:
            folders.write(model, Path(model.name))
        return [_planned(path) for path in sorted(JOBS.glob("*.yaml"))]


def section(jobs: Sequence[PlannedJob]) -> list[str]:
    """Returns the lines of the section on docs/gpu.md. Pure."""
    shown = next(job for job in jobs if job.name == SHOWN)
    return [
        "## What auto chooses",
        "",
        "These are the answers of `finetune plan` for the jobs in [examples/gpus](../examples/gpus). Each",
        "file has its command, whose `--gpu-memory` is what is free on such a GPU once a process has",
        "started. Only the headers of the model's files are read, so neither a GPU nor the weights are",
        "needed. [sizing.md](sizing.md) has more models. Several MIG slices in a pod are refused, and a",
        "driver older than 580 is reported as GpuUnavailable.",
        "",
        "| job | | free | chosen | tokens at a time | why nothing faster |",
        "| --- | --- | --- | --- | --- | --- |",
        *(job.row for job in jobs),
        "",
        "The whole output for one of them:",
        "",
        f"    {shown.command}",
        *(f"    {line}".rstrip() for line in shown.output.splitlines()),
        "",
    ]


def _planned(path: Path) -> PlannedJob:
    text = path.read_text()
    about, command = _ABOUT.search(text), _COMMAND.search(text)
    if about is None or command is None:
        raise ValueError(f"{path} must begin with a comment that says what it is, and have a command")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = main(shlex.split(command[1])[1:])
    if code != 0:
        raise ValueError(f"{command[1]} ended with {code}:\n{printed.getvalue()}")
    return PlannedJob(path.stem, about[1], command[1], printed.getvalue())
