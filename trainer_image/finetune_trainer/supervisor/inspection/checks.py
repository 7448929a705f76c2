"""Reads rows, tokenizers and templates, and refuses what can't be trained on.

It runs in a process of its own, which may be killed by what it reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from finetune_api.messages.run import RunConfig
from finetune_api.status import DataStatus
from finetune_trainer import model_folder
from finetune_trainer.data import sources
from finetune_trainer.data.reading import rows
from finetune_trainer.data.reading.row import Problem
from finetune_trainer.errors import RunError
from finetune_trainer.model_folder import Capacity
from finetune_trainer.paths import Paths
from finetune_trainer.supervisor.download import Report


@dataclass(frozen=True)
class Progress:
    """Receives what the checks of rows are doing.

    `report` gets sentences for the log. `reading(reason, subject)` is called before something is
    read, with the reason that stands for it. `beat` is called for each row.
    """

    report: Report
    reading: Callable[[str, str], None] = lambda reason, subject: None
    beat: Callable[[], None] = lambda: None


def check_rows(run: RunConfig, paths: Paths, progress: Progress) -> None:
    """Checks without a tokenizer that the format of every row is known, and that one is usable.

    Raises RunError DatasetInvalid with the numbers of unusable rows if dataset.onInvalid is fail.
    """
    for split in sources.splits(run.data):
        field, files = sources.field(run.data, split), sources.of(run.data, paths, split)
        counts = _count_rows(files, field, progress)
        progress.report(f"{field}: {counts}")
        if not counts.rows or (counts.unusable and run.data.on_invalid == "fail"):
            raise RunError("DatasetInvalid", _refusal(field, counts, on_invalid=run.data.on_invalid))


@dataclass
class _RowCounts:
    """Counts rows. `problems` are the first unusable rows, without those that lack a label."""

    rows: int = 0
    unusable: int = 0
    unlabelled: int = 0
    duplicates: int = 0
    formats: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def __str__(self) -> str:
        unlabelled = f", {self.unlabelled} without a confident label" if self.unlabelled else ""
        formats = ", ".join(dict.fromkeys(self.formats))
        return f"{_counted(self.rows)} of {formats}, {self.unusable} unusable{unlabelled}, {self.duplicates} duplicates"


def _count_rows(files: tuple[rows.InputFile, ...], name: str, progress: Progress) -> _RowCounts:
    import numpy as np

    from finetune_trainer.data import dedup, preparation

    counts = _RowCounts()
    digests = bytearray()
    for index, file in enumerate(files):
        progress.reading("DatasetInvalid", f"{name}: {file.name}")
        stream, _ = rows.stream(file, name, file_index=index, named=len(files) > 1)
        for row in stream:
            progress.beat()
            if not isinstance(row, Problem):
                counts.rows += 1
                digests += rows.digest(row)
            elif row.unlabelled:
                counts.unlabelled += 1
            else:
                counts.unusable += 1
                counts.problems += [row] if counts.unusable <= preparation.MAX_PROBLEMS else []
        counts.formats.append(stream.format or "no readable row")
    first = dedup.first_occurrence(np.frombuffer(bytes(digests), np.uint8).reshape(-1, 16))
    counts.duplicates = int((first != np.arange(counts.rows)).sum())
    return counts


def _counted(rows: int) -> str:
    return f"{rows} row{'' if rows == 1 else 's'}"


def _refusal(name: str, counts: _RowCounts, *, on_invalid: str) -> str:
    unlabelled = f"{counts.unlabelled} have no confident label" if counts.unlabelled else "it is empty"
    reasons = rows.listing(counts.problems) or unlabelled
    remedy = "" if on_invalid == "drop" else "; fix them, or set dataset.onInvalid: drop"
    none_left = "" if counts.rows else ", and no usable one is left"
    return f"{name}: {_counted(counts.unusable)} can't be used{none_left}: {reasons}{remedy}"


def check_tokens(run: RunConfig, paths: Paths, capacity: Capacity, progress: Progress) -> tuple[str, DataStatus]:
    """Checks the rows as tokens, writes the data report, and reports its lines. `capacity` is that
    of the model.

    Returns what was counted, as a sentence and for the status. Raises RunError DatasetInvalid for
    unusable rows, and for rows that don't fit the objective, InvalidConfig for a row that is longer
    than the model has positions, and ModelInvalid for a token without an embedding.
    """
    from finetune_trainer.data import pipeline, quality_report, quality_report_text

    inputs = pipeline.Inputs.of_run(run, paths)
    progress.reading("ModelInvalid", "model.uri: the tokenizer or its chat template")
    renderer = pipeline.load_renderer(paths.model, run.data, run.added_tokens)
    if run.data.chat_template is not None:
        progress.reading("InvalidConfig", "dataset.chatTemplate")

    def opened(file: str) -> None:
        """Reports which file is read."""
        progress.reading("DatasetInvalid", file)

    prepared = pipeline.prepare(inputs, renderer, heartbeat=progress.beat, opened=opened)
    for needs in prepared.needs():
        model_folder.check_rows(capacity, needs)
    prepared.check_objective(run.training.objective)
    data_report = prepared.report()
    for line in quality_report_text.lines(data_report):
        progress.report(line)
    paths.data_report.write_text(data_report.model_dump_json(by_alias=True, exclude_none=True))
    counts = "; ".join(
        f"{split.split}: {_counted(split.rows)}, {split.tokens} tokens of which {split.label_tokens} are trained on, "
        f"{split.dropped} dropped, {split.truncated.rows} truncated, {split.duplicates.rows} duplicates"
        for split in data_report.splits
    )
    return counts, quality_report.summary(data_report)
