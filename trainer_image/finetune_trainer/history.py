"""History: the loss history of a job over all its attempts, as it is kept beside checkpoints and the result.

Filled by the supervisor from rank 0's step, eval and skipped events; a resumed attempt begins with the lines up to its
step.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from finetune_api import events, names
from finetune_api.evaluation import Evaluation
from finetune_trainer.place import Place

Line = events.StepEvent | events.EvalEvent | events.SkippedEvent


class History:
    """Grows by one line a step; `text` is the file's content."""

    def __init__(self, lines: tuple[Line, ...] = ()) -> None:
        self._lines = list(lines)

    def add(self, event: events.Event) -> None:
        if isinstance(event, Line):
            self._lines.append(event)

    @property
    def lines(self) -> tuple[Line, ...]:
        return tuple(self._lines)

    def until(self, step: int) -> tuple[Line, ...]:
        return tuple(line for line in self._lines if line.step <= step)

    def text(self, until: int | None = None) -> str:
        lines = self._lines if until is None else self.until(until)
        return "".join(f"{events.encode(line)}\n" for line in lines)


def write_beside(
    export: Path,
    history: str,
    samples: tuple[events.SampleEvent, ...],
    scored: Evaluation | None,
    data_report: Path | None = None,
) -> None:
    """history.jsonl, samples.jsonl, evaluation.json and data-report.json into the result's finetune folder."""
    target = export / names.HISTORY_PATH
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(history)
    if data_report is not None and data_report.is_file():
        (export / names.DATA_REPORT_PATH).write_bytes(data_report.read_bytes())
    if samples:
        lines = (events.encode(sample) for sample in sorted(samples, key=lambda sample: sample.index))
        (export / names.SAMPLES_PATH).write_text("".join(f"{line}\n" for line in lines))
    if scored is not None:
        (export / names.EVALUATION_PATH).write_text(scored.model_dump_json(by_alias=True, indent=1) + "\n")


def read_scores(place: Place) -> Evaluation | None:
    """evaluation.json of a finished result."""
    data = place.read(names.EVALUATION_PATH)
    try:
        return Evaluation.model_validate_json(data) if data is not None else None
    except ValidationError:
        return None


def parse(text: str, until: int) -> tuple[Line, ...]:
    """The lines up to a step. What can't be read is left out: a torn history is no reason to train again."""
    found = (events.decode(line) for line in text.splitlines() if line.strip())
    return tuple(event for event in found if isinstance(event, Line) and event.step <= until)
