"""The loss history of a job over all its attempts, stored with checkpoints and with the result.

It consists of rank 0's step, eval and skipped events, and of what the run started from. A resumed
attempt starts with the lines up to the step from which it resumes.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from finetune_api import names
from finetune_api.messages import events
from finetune_api.messages.evaluation import Evaluation
from finetune_trainer.storage.base import Storage

Line = events.StepEvent | events.EvalEvent | events.SkippedEvent | events.OriginEvent


class History:
    """Collects the lines of the history, about one per step; `text` is the content of the file."""

    def __init__(self, lines: tuple[Line, ...] = ()) -> None:
        self._lines = list(lines)

    def add(self, event: events.Event) -> None:
        """Appends an event of the loss history; ignores all other events."""
        if isinstance(event, Line):
            self._lines.append(event)

    @property
    def lines(self) -> tuple[Line, ...]:
        """All lines, oldest first."""
        return tuple(self._lines)

    def until(self, step: int) -> tuple[Line, ...]:
        """Returns the lines up to and including `step`."""
        return tuple(line for line in self._lines if line.step <= step)

    def text(self, until: int | None = None) -> str:
        """Returns one JSON object per line, up to and including step `until` if it is set."""
        lines = self._lines if until is None else self.until(until)
        return "".join(f"{events.encode(line)}\n" for line in lines)


def write_result_files(
    export: Path,
    history: str,
    samples: tuple[events.SampleEvent, ...],
    evaluation: Evaluation | None,
    data_report: Path | None = None,
) -> None:
    """Writes the files of the result's finetune folder.

    These are history.jsonl and, if they are known, samples.jsonl, evaluation.json and
    data-report.json.
    """
    target = export / names.HISTORY_PATH
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(history)
    if data_report is not None and data_report.is_file():
        (export / names.DATA_REPORT_PATH).write_bytes(data_report.read_bytes())
    if samples:
        lines = (events.encode(sample) for sample in sorted(samples, key=lambda sample: sample.index))
        (export / names.SAMPLES_PATH).write_text("".join(f"{line}\n" for line in lines))
    if evaluation is not None:
        (export / names.EVALUATION_PATH).write_text(evaluation.model_dump_json(by_alias=True, indent=1) + "\n")


def read_scores(storage: Storage) -> Evaluation | None:
    """Reads evaluation.json of a finished result. None if it is missing or can't be read."""
    data = storage.read(names.EVALUATION_PATH)
    try:
        return Evaluation.model_validate_json(data) if data is not None else None
    except ValidationError:
        return None


def parse(text: str, until: int | None = None) -> tuple[Line, ...]:
    """Returns the lines of history.jsonl, up to and including step `until` if it is set.

    Lines that can't be read are left out: a damaged history is no reason to train again.
    """
    decoded = (events.decode(line) for line in text.splitlines() if line.strip())
    return tuple(event for event in decoded if isinstance(event, Line) and (until is None or event.step <= until))
