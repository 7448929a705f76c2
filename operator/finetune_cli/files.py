"""Parses FineTuneJob files to jobs, or to problems that name file, line, field, value and remedy.

It reads files but never writes one, and knows no cluster.
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

FieldPath = tuple[int | str, ...]


@dataclass(frozen=True)
class Problem:
    """Describes why a file is refused. `line` counts from 1; it is 0 if no line is to blame."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}" if self.line else f"{self.file}: {self.text}"


@dataclass(frozen=True)
class ParsedFile:
    """Holds the jobs of a file and its problems.

    `others` is the number of documents of other kinds, which are ignored.
    """

    jobs: tuple[FineTuneJob, ...]
    problems: tuple[Problem, ...]
    others: int = 0


class InvalidFile(Exception):
    """Reports that a file has problems, or doesn't have exactly one job."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems


def read(path: str) -> ParsedFile:
    """Reads all FineTuneJobs of a file; `-` is standard input. Never raises for a bad file."""
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "isn't UTF-8"
        return ParsedFile((), (Problem(path, 0, f"can't be read: {reason}"),))
    return read_text(text, path)


def read_text(text: str, name: str) -> ParsedFile:
    """Does the same as `read` for text. `name` is the file's name in messages."""
    try:
        documents = list(kubectl_yaml.load_all(text))
        nodes = [node for node in yaml.compose_all(text, Loader=yaml.SafeLoader) if not _is_empty(node)]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        message = getattr(error, "problem", None) or str(error)
        return ParsedFile((), (Problem(name, mark.line + 1 if mark else 0, f"isn't YAML: {message}"),))
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
            problems.append(
                Problem(
                    name,
                    node.start_mark.line + 1,
                    f"isn't a {KIND}; give a mapping with spec",
                )
            )
    if not jobs and not problems:
        problems.append(Problem(name, 0, f"contains no {KIND}"))
    return ParsedFile(tuple(jobs), tuple(problems), others)


def one_job(path: str) -> FineTuneJob:
    """Returns the only job of a file.

    Raises InvalidFile if the file has problems or several jobs.
    """
    file = read(path)
    if file.problems:
        raise InvalidFile(file.problems)
    if len(file.jobs) > 1:
        names = ", ".join(job.metadata.name for job in file.jobs)
        raise InvalidFile((Problem(path, 0, f"contains {len(file.jobs)} jobs ({names}); give a file with one job"),))
    return file.jobs[0]


def _refuse() -> FineTuneJob:
    raise TypeError


def _is_empty(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.value in ("", "~", "null", "Null", "NULL")


def _problems(error: ValidationError, node: yaml.Node, name: str) -> Iterator[Problem]:
    for detail, text in zip(error.errors(include_url=False), describe(error), strict=True):
        yield Problem(name, line_of(node, detail["loc"]), text)


def line_of(node: yaml.Node, path: FieldPath) -> int:
    """Returns the line of a field, or of its nearest ancestor that exists. Lines count from 1."""
    line: int = node.start_mark.line + 1
    for part in path:
        child = _child(node, part)
        if child is None:
            return line
        line, node = child
    return line


def _child(node: Any, part: int | str) -> tuple[int, yaml.Node] | None:
    """Returns the line and the node of an entry of a mapping or sequence."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == part:
                return key.start_mark.line + 1, value
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        child = node.value[part]
        return child.start_mark.line + 1, child
    return None
