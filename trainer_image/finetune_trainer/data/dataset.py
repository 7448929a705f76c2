"""Reads the rows of a run as splits of tokens.

Rows are rendered once per node and mapped into memory by all of its ranks. Rank 0 writes the data
report before anything is trained.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

from finetune_api.messages import events
from finetune_api.messages.data_report import SplitName
from finetune_api.messages.run import RunConfig
from finetune_trainer import limits
from finetune_trainer.data import pipeline, preparation, quality_report, sources
from finetune_trainer.data.chat_rendering import Renderer
from finetune_trainer.data.pipeline import Group, Inputs
from finetune_trainer.data.reading.row import Row
from finetune_trainer.data.splits import Split
from finetune_trainer.data.token_cache import Tokens
from finetune_trainer.errors import RunError
from finetune_trainer.model_folder import RowNeeds
from finetune_trainer.paths import Paths
from finetune_trainer.reporting.event_writer import EventWriter


@dataclass(frozen=True)
class Data:
    """Holds the splits of a run.

    `samples` are the test rows that the models answer. `key` identifies the content of the train
    and validation rows. `dropped` counts unusable train rows.
    """

    train: Split
    validation: Split | None
    test: Split | None
    samples: tuple[Row, ...]
    renderer: Renderer
    key: str
    dropped: int

    def splits(self) -> dict[SplitName, Split]:
        """Return the splits that the run has, by name."""
        splits: tuple[tuple[SplitName, Split | None], ...] = (
            ("train", self.train),
            ("validation", self.validation),
            ("test", self.test),
        )
        return {name: split for name, split in splits if split is not None}

    def with_splits(self, splits: Mapping[SplitName, Split]) -> Data:
        """Return the same data with these splits instead."""
        return replace(self, train=splits["train"], validation=splits.get("validation"), test=splits.get("test"))

    @property
    def longest(self) -> int:
        """The number of tokens in the longest row of any split."""
        return max(int(split.lengths.max()) for split in self.splits().values())

    @property
    def needs(self) -> RowNeeds:
        """What the rows need of the model."""
        parts = [pipeline.needs(split.tokens, self.renderer, "dataset") for split in self.splits().values()]
        return RowNeeds(
            max(part.highest for part in parts),
            max(part.longest_source for part in parts),
            max(part.longest_rest for part in parts),
        )


def read(run: RunConfig, paths: Paths, group: Group, reporter: EventWriter) -> Data:
    """Read a run's rows. All ranks call it together; those of a node wait for the first one of the
    node.

    Raises RunError DatasetInvalid with the numbers of unusable rows, and for splits that would be
    empty.
    """
    renderer = pipeline.load_renderer(paths.model, run.data, run.added_tokens)
    reporter.decision("rendering", *renderer.rule)
    if renderer.template.date is not None:
        reason = "the chat template writes today's date, which stays that of the job's creation"
        reporter.decision("templateDate", renderer.template.date, reason)
    inputs = Inputs.of_run(run, paths)
    prepared = _prepared(inputs, renderer, group, reporter)
    tokens = {name: rows.tokens for name, rows in prepared.rows.items() if rows.tokens is not None}
    _report_rows(tokens["train"], inputs.fields["train"], reporter)
    splits = {name: Split(tokens.get(name, tokens["train"]), part.index) for name, part in prepared.splits.items()}
    if group.is_first:
        report = prepared.report()
        paths.data_report.write_text(report.model_dump_json(by_alias=True, exclude_none=True))
        reporter.report(events.DataEvent, path=str(paths.data_report), data=quality_report.summary(report))
    names = "/".join(inputs.cache_names[name] for name in ("train", "validation") if name in inputs.files)
    return Data(
        train=splits["train"],
        validation=splits.get("validation"),
        test=splits.get("test"),
        samples=_samples(run, inputs, splits.get("test")),
        renderer=renderer,
        key=hashlib.sha256(names.encode()).hexdigest()[:32],
        dropped=tokens["train"].facts.dropped,
    )


def _prepared(inputs: Inputs, renderer: Renderer, group: Group, reporter: EventWriter) -> pipeline.PreparedRows:
    """Read the rows with a limit of memory, so that hostile ones cost this rank and not the pod."""
    size = sum(file.path.stat().st_size for files in inputs.files.values() for file in files)
    reading = "the rows"

    def opened(file: str) -> None:
        """Remember what is read."""
        nonlocal reading
        reading = file

    with limits.more_memory_at_most(limits.memory_for(size)):
        try:
            return pipeline.prepare(inputs, renderer, group, reporter.heartbeat, opened)
        except MemoryError:
            raise RunError("DatasetInvalid", f"{reading} needs too much memory to be read; check its content") from None


def _samples(run: RunConfig, inputs: Inputs, test: Split | None) -> tuple[Row, ...]:
    """Return test rows for the models to answer, spread evenly because a file may be sorted.

    A row that is only a text has no prompt and isn't answered.
    """
    count = min(run.evaluation.max_answered_rows, len(test)) if test is not None else 0
    if count == 0 or test is None:
        return ()
    name: SplitName = "test" if "test" in inputs.files else "train"
    indices = [int(test.index[number * len(test) // count]) for number in range(count)]
    origins = {(int(test.tokens.file_index[index]), int(test.tokens.line_numbers[index])) for index in indices}
    rows = preparation.rows_at(inputs.files[name], sources.field(run.data, name), origins)
    return tuple(row for row in rows if not row.is_text)


def _report_rows(train: Tokens, field: str, reporter: EventWriter) -> None:
    facts = train.facts
    rows = len(train) - int(train.earlier.sum())
    counts = [f"{rows} row{'' if rows == 1 else 's'} of format {facts.format}"]
    counts += [f"{len(train)} examples"] if len(train) != rows else []
    for count, label in ((facts.dropped, "dropped"), (facts.duplicates, "duplicates"), (facts.truncated, "truncated")):
        if count:
            counts.append(f"{count} {label}")
    reporter.decision("rows", ", ".join(counts), f"read from {field}")


def of_objective(data: Data, objective: str) -> Data:
    """Return the data with examples as the objective needs them: preference pairs for dpo.

    Raises RunError DatasetInvalid if the format of the rows doesn't fit the objective.
    """
    splits = data.splits()
    files = (file for split in splits.values() for file in split.tokens.facts.files)
    pipeline.check_objective({file.format for file in files if file.format}, objective)
    if objective == "supervised":
        return data
    return data.with_splits({name: replace(split, pairs=True) for name, split in splits.items()})
