"""FineTuneJob files: text → jobs, or problems that name file, line, field, value and remedy.

Used by every subcommand that takes a file. Reads files, never writes one, and knows no cluster.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from finetune_api import KIND
from finetune_api import yaml as kubectl_yaml
from finetune_api.errors import describe
from finetune_api.resource import FineTuneJob, parse

Place = tuple[int | str, ...]


@dataclass(frozen=True)
class Problem:
    """`line` counts from 1; 0 where there is none to point at."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}" if self.line else f"{self.file}: {self.text}"


@dataclass(frozen=True)
class Read:
    """What a file holds; documents of other kinds are counted and left alone."""

    jobs: tuple[FineTuneJob, ...]
    problems: tuple[Problem, ...]
    others: int = 0


class InvalidFile(Exception):
    """A file that can't be gone on with."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems


def read(path: str) -> Read:
    """All FineTuneJobs of a file; `-` is standard input."""
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "isn't UTF-8"
        return Read((), (Problem(path, 0, f"can't be read: {reason}"),))
    return read_text(text, path)


def read_text(text: str, name: str) -> Read:
    """As `read`, from text."""
    try:
        documents = list(kubectl_yaml.load_all(text))
        nodes = [node for node in yaml.compose_all(text, Loader=yaml.SafeLoader) if _holds_something(node)]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or str(error)
        return Read((), (Problem(name, mark.line + 1 if mark else 0, f"isn't YAML: {what}"),))
    jobs: list[FineTuneJob] = []
    problems: list[Problem] = []
    others = 0
    for document, node in zip(documents, nodes, strict=False):
        if isinstance(document, dict) and document.get("kind") not in (None, KIND):
            others += 1
            continue
        try:
            jobs.append(parse(document) if isinstance(document, dict) else _refuse())
        except ValidationError as error:
            problems += _problems(error, node, name)
        except TypeError:
            problems.append(Problem(name, node.start_mark.line + 1, f"isn't a {KIND}; give a mapping with spec"))
    if not jobs and not problems:
        problems.append(Problem(name, 0, f"holds no {KIND}"))
    return Read(tuple(jobs), tuple(problems), others)


def one_job(path: str) -> FineTuneJob:
    """The only job of a file. Raises InvalidFile."""
    found = read(path)
    if found.problems:
        raise InvalidFile(found.problems)
    if len(found.jobs) > 1:
        names = ", ".join(job.metadata.name for job in found.jobs)
        raise InvalidFile((Problem(path, 0, f"holds {len(found.jobs)} jobs ({names}); give a file with one"),))
    return found.jobs[0]


def _refuse() -> FineTuneJob:
    raise TypeError


def _holds_something(node: yaml.Node) -> bool:
    return not (isinstance(node, yaml.ScalarNode) and node.value in ("", "~", "null", "Null", "NULL"))


def _problems(error: ValidationError, node: yaml.Node, name: str) -> Iterator[Problem]:
    for detail, text in zip(error.errors(include_url=False), describe(error), strict=True):
        yield Problem(name, line_of(node, detail["loc"]), text)


def line_of(node: yaml.Node, place: Place) -> int:
    """The line of the field, or of the nearest thing above it that is there."""
    line: int = node.start_mark.line + 1
    for part in place:
        found = _child(node, part)
        if found is None:
            return line
        line, node = found
    return line


def _child(node: Any, part: int | str) -> tuple[int, yaml.Node] | None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == part:
                return key.start_mark.line + 1, value
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        child = node.value[part]
        return child.start_mark.line + 1, child
    return None
