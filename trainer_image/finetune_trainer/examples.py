"""A split's file → examples ready for the plan: read, render, refuse or drop. No torch.

Called by preflight (to find bad rows before hardware is taken) and, through `tokens`, by local rank 0 of a node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from finetune_trainer import rows
from finetune_trainer.failure import Failed
from finetune_trainer.render import Example, Renderer


@dataclass(frozen=True)
class Examples:
    """Usable rows in the file's order, and what was found on the way."""

    examples: tuple[Example, ...]
    dropped: int
    duplicates: int
    truncated: int
    format: rows.Format

    @property
    def tokens(self) -> int:
        return sum(len(example.ids) for example in self.examples)

    @property
    def label_tokens(self) -> int:
        return sum(sum(example.learnt) for example in self.examples)


def prepare(
    path: Path,
    field: str,
    *,
    format: str,
    on_invalid: str,
    renderer: Renderer,
    alive: Callable[[], None] = lambda: None,
) -> Examples:
    """Raises Failed DatasetInvalid that numbers the rows; `field` (dataset.uri, …) says which file it is.

    `alive` is called for each row.
    """
    if not path.is_file():
        raise Failed("DatasetNotFound", f"{field}: no file was fetched; give the URI of one JSON-lines file")
    read = rows.read(path, format)
    examples: list[Example] = []
    problems = list(read.problems)
    for row in read.rows:
        alive()
        rendered = renderer.render(row)
        if isinstance(rendered, Example):
            examples.append(rendered)
        else:
            problems.append(rendered)
    if problems and on_invalid == "fail":
        raise Failed("DatasetInvalid", _refusal(field, problems, len(examples)))
    if not examples or read.format is None:
        raise Failed(
            "DatasetInvalid",
            f"{field}: no usable row" + (f" ({rows.listing(problems)})" if problems else "; the file is empty"),
        )
    truncated = sum(len(example.ids) == renderer.max_length for example in examples)
    return Examples(tuple(examples), len(problems), read.duplicates, truncated, read.format)


def _refusal(field: str, problems: Iterable[rows.Problem], usable: int) -> str:
    listed = tuple(problems)
    what = "1 row" if len(listed) == 1 else f"{len(listed)} rows"
    none = "" if usable else ", and no other row is left"
    return f"{field}: {what} can't be used{none}: {rows.listing(listed)}. Mend them, or set dataset.onInvalid: drop"
