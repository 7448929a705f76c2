"""Checks the output, the model and the data before hardware is allocated.

`python -m finetune_trainer preflight` runs all of them in a pod without a GPU. The supervisor runs
the cheap ones again before it starts the ranks. None of them loads the model's weights.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from finetune_api.amounts import FEW_CORES
from finetune_api.messages.result import Result
from finetune_api.messages.run import RunConfig
from finetune_api.status import DataStatus
from finetune_trainer import model_folder
from finetune_trainer.data import sources
from finetune_trainer.data.reading import rows
from finetune_trainer.data.reading.row import Problem
from finetune_trainer.destination import output_check, predecessor, token_store
from finetune_trainer.destination.output_check import Destination, Role
from finetune_trainer.destination.signing import Trust
from finetune_trainer.errors import RunError
from finetune_trainer.model.check import process as model_check
from finetune_trainer.model_folder import Capacity
from finetune_trainer.paths import Paths
from finetune_trainer.storage.base import Storage
from finetune_trainer.storage.schemes import Access, open_folder
from finetune_trainer.supervisor import download
from finetune_trainer.supervisor.download import ModelFacts, Report
from finetune_trainer.supervisor.inspection.parent import Inspection
from finetune_trainer.supervisor.start import origin


@dataclass(frozen=True)
class Progress:
    """Receives what the checks of rows are doing.

    `report` gets sentences for the log. `reading(reason, subject)` is called before something is
    read, with the reason that stands for it. `beat` is called for each row.
    """

    report: Report
    reading: Callable[[str, str], None] = lambda reason, subject: None
    beat: Callable[[], None] = lambda: None


def check(run: RunConfig, paths: Paths, access: Access, report: Report) -> Result:
    """Runs all checks. `report` receives lines of progress for the log.

    Raises RunError with the field, the value and the remedy.
    """
    report(f"checking the output {run.output.display}")
    storage, destination = check_destination(run, access, Role("preflight"))
    if destination.finished is not None and Trust(run.signers).believes(destination.finished[0]):
        return Result(outcome="succeeded", message="the output already holds this job's result")
    try:
        return _check_inputs(run, paths, access, storage, report)
    except RunError:
        with suppress(RunError):
            predecessor.release_if_empty(storage, run.job)
        raise


def give_back(run: RunConfig, access: Access) -> None:
    """Releases the claim of a check that is stopped, if nothing is stored there."""
    with suppress(RunError):
        predecessor.release_if_empty(open_folder(run.output, "output", access), run.job)


def _check_inputs(run: RunConfig, paths: Paths, access: Access, storage: Storage, report: Report) -> Result:
    model = download.model(run, paths, access, report, weights=False)
    origin.find(run, access, None, report)
    data_files = download.data(run, paths, access, report)
    check_room(run, model, sum(facts.bytes for facts in data_files.values()))
    if run.world.device == "cuda" and run.world.threads_per_process < FEW_CORES:
        report(
            f"resources.cpu: {run.world.threads_per_process} cores for each GPU are few, so that the GPUs may wait for "
            f"the CPU; use at least {FEW_CORES}, or auto"
        )
    capacity = model_check.check(run, paths, report)
    counts, data = Inspection(run, paths, access.environment, report).tokens(capacity)
    for folder in _token_folders(run, paths):
        token_store.upload(storage, folder, run.job.uid, report)
    return Result(outcome="succeeded", message=counts, model=model.status(complete=False), data=data)


def fetch_tokens(run: RunConfig, paths: Paths, storage: Storage, report: Report) -> None:
    """Downloads the tokens that a preflight has stored. It needs the rows and the tokenizer."""
    if run.world.device == "cuda" and storage.list(token_store.FOLDER):
        for folder in _token_folders(run, paths):
            token_store.download(storage, folder, run.job.uid, report)


def _token_folders(run: RunConfig, paths: Paths) -> list[Path]:
    """Returns the folders of the tokens of all splits, whether they exist or not."""
    from finetune_trainer.data import pipeline

    inputs = pipeline.Inputs.of_run(run, paths)
    return [inputs.cache / name for name in dict.fromkeys(inputs.cache_names.values())]


def check_room(run: RunConfig, model: ModelFacts, data_bytes: int) -> None:
    """Checks that the model, the rows and the result fit on the scratch disk, and the model into
    memory.

    Only what every run needs is counted. If resources.scratch or resources.memory is auto, the
    operator raises it once the size of the model is known. Raises RunError InvalidConfig.
    """
    copies = (1 if model.on_scratch else 0) + (1 if run.merge or run.method == "full" else 0)
    needed = copies * model.total_bytes + data_bytes
    if run.scratch_bytes is not None and not run.auto_scratch and needed > run.scratch_bytes:
        raise RunError(
            "InvalidConfig",
            f"resources.scratch is {_gib(run.scratch_bytes)}, but the model, the rows and the result need "
            f"{_gib(needed)} of it; raise it, and add room for checkpoints, or use auto",
        )
    # A base whose files are in float32 is loaded in half of that, and a quantized one in less.
    least = model.total_bytes // 2
    loads_all = run.world.device == "cuda" and run.model.quantization == "none"
    if loads_all and run.memory_bytes is not None and not run.auto_memory and least > run.memory_bytes:
        raise RunError(
            "InvalidConfig",
            f"resources.memory is {_gib(run.memory_bytes)}, but loading the model takes at least {_gib(least)} of it; "
            "raise it, or use auto",
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def check_destination(run: RunConfig, access: Access, role: Role) -> tuple[Storage, Destination]:
    """Claims the output for this job and, unless the pod follows node 0, checks that it can be
    written.

    Raises RunError for an output of another job, or one that can't be reached.
    """
    storage = open_folder(run.output, "output", access)
    destination = output_check.take(storage, run, role)
    if role.kind != "follows" and destination.finished is None:
        output_check.probe(storage, run.job)
    return storage, destination


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
