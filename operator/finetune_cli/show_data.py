"""`finetune validate --data`: shows the data report of files on this machine.

The files are read as the trainer reads them, so its Python packages are needed, but no GPU. With a
model's folder, its configuration, the headers of its weights and the method are checked too.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from finetune_api.messages.data_report import DataReport, SplitName
from finetune_api.messages.run import DataConfig, DataSource, Location, RunConfig
from finetune_api.resource import FineTuneJob
from finetune_operator.core.plan import plan
from finetune_operator.settings import Settings
from finetune_trainer import model_folder
from finetune_trainer.data.reading.rows import InputFile
from finetune_trainer.model.check import process
from finetune_trainer.paths import Paths

if TYPE_CHECKING:
    from finetune_trainer.data.pipeline import PreparedRows  # imports packages that may be missing

_SECONDS_BETWEEN_LINES = 5.0


class CannotRead(ValueError):
    """Reports an option that doesn't fit the files or this machine; the message names it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `finetune validate` that are about rows."""
    data = parser.add_argument_group("the data report (of files on this machine instead of the job's)")
    data.add_argument(
        "--data", metavar="PATH", nargs="+", help="training rows: files or folders; one for each of dataset.sources"
    )
    data.add_argument("--validation", metavar="PATH", help="validation rows")
    data.add_argument("--test", metavar="PATH", help="test rows")
    data.add_argument(
        "--model",
        metavar="DIR",
        help="the model's folder; shows lengths in tokens, and rendered rows, and checks the model and the method as "
        "the preflight does (with the tokenizer alone, only the rows are checked)",
    )
    data.add_argument(
        "-o", "--output", choices=("text", "json"), default="text", help="format of the report; default text"
    )


def show(job: FineTuneJob, options: argparse.Namespace) -> int:
    """Prints the report. Returns 0, or 1 if the run would be refused.

    Raises CannotRead, RunError for rows that can't be read, or a model or method that the run would
    refuse, PlanError for a spec that can't be run, or ModuleNotFoundError if a package is missing.
    """
    planned = plan(job, Settings())
    run = planned.model_copy(update={"data": _dated(planned.data)})
    config, model = run.data, Path(options.model) if options.model else None
    inputs = _files_of_splits(config, options)
    if model is not None and not model.is_dir():
        raise CannotRead(f"--model {model}: there is no such folder; give the folder of a Transformers model")
    if model is not None and model_folder.holds_weights(_names(model)):
        model_folder.check_files(_names(model), str(model))
    with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
        prepared = _prepared(run, inputs, model, Path(folder))
        report = prepared.report()
        _print(report, options)
        dropped = sum(split.dropped - split.unlabelled for split in report.splits)
        if dropped and config.on_invalid == "fail":
            if options.output == "text":
                subject = "1 row" if dropped == 1 else f"{dropped} rows"
                print(f"refused: {subject} can't be used; fix them, or set dataset.onInvalid: drop")
            return 1
        prepared.check_objective(run.training.objective)
        if model is not None:
            _check_model(run, model, prepared, Path(folder))
    return 0


def _check_model(run: RunConfig, model: Path, rows: PreparedRows, scratch: Path) -> None:
    """Checks the model, the method, and whether the rows fit them, with files in `scratch`.

    A folder with the tokenizer alone isn't checked, and nothing is without torch. Raises RunError.
    """
    if importlib.util.find_spec("torch") is None:
        print("torch isn't installed, so the model and the method aren't checked", file=sys.stderr)
        return
    if not model_folder.holds_weights(_names(model)):
        print(f"{model} has no weights, so the model and the method aren't checked", file=sys.stderr)
        return
    paths = Paths(scratch)
    paths.model.symlink_to(model.resolve())
    capacity = process.check(run, paths, lambda line: print(line, file=sys.stderr))
    for needs in rows.needs():
        model_folder.check_rows(capacity, needs)


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.is_file()]


def _print(report: DataReport, options: argparse.Namespace) -> None:
    from finetune_trainer.data import quality_report_text

    if options.output == "json":
        print(report.model_dump_json(by_alias=True, exclude_none=True, indent=1))
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print("\n".join(quality_report_text.lines(report, width=width)))


def _dated(config: DataConfig) -> DataConfig:
    """Returns the configuration with today's date, as a job would have that was created now."""
    date = config.rendering.date or datetime.now(UTC).date().isoformat()
    return config.model_copy(update={"rendering": config.rendering.model_copy(update={"date": date})})


def _files_of_splits(config: DataConfig, options: argparse.Namespace) -> dict[SplitName, tuple[InputFile, ...]]:
    from finetune_trainer.data.sources import input_file

    locations = config.sources_of("train")
    if config.sources and len(options.data) != len(locations):
        raise CannotRead(
            f"--data: {len(options.data)} paths, but dataset.sources has {len(locations)} entries; give one for each"
        )
    train: list[InputFile] = []
    for index, path in enumerate(options.data):
        source = locations[index] if config.sources else locations[0]
        train += [input_file(file.resolve(), str(file), source, config) for file in _files("--data", path)]
    files: dict[SplitName, tuple[InputFile, ...]] = {"train": tuple(train)}
    own_files: tuple[tuple[SplitName, str | None], ...] = (("validation", options.validation), ("test", options.test))
    for name, path in own_files:
        if path:
            location = Location(uri=path, display=path)
            source = DataSource(location=location, format=config.format, columns=config.columns)
            files[name] = tuple(
                input_file(file.resolve(), str(file), source, config) for file in _files(f"--{name}", path)
            )
    return files


def _files(option: str, value: str) -> Sequence[Path]:
    from finetune_trainer.data.reading.records import SUFFIXES, is_named_as_data

    path = Path(value)
    if path.is_dir():
        files = sorted(
            file for file in path.rglob("*") if file.is_file() and is_named_as_data(file.relative_to(path).as_posix())
        )
        if not files:
            raise CannotRead(f"{option} {value}: this folder has no file whose name ends with {', '.join(SUFFIXES)}")
        return files
    if not path.is_file():
        raise CannotRead(f"{option} {value}: there is no such file or folder")
    return (path,)


def _prepared(
    run: RunConfig, files: dict[SplitName, tuple[InputFile, ...]], model: Path | None, folder: Path
) -> PreparedRows:
    """Returns the rows. Every unusable one is counted, even if dataset.onInvalid is fail."""
    from finetune_trainer.data import pipeline

    config = run.data.model_copy(update={"on_invalid": "drop"})
    renderer = pipeline.load_renderer(model, config, run.added_tokens) if model else None
    options = {name: "--data" if name == "train" else f"--{name}" for name in files}
    inputs = pipeline.Inputs(config, files, options, folder, {name: name for name in files})
    return pipeline.prepare(inputs, renderer, heartbeat=Progress(sys.stderr, time.monotonic))


class Progress:
    """Reports on long files: how many rows were read, every few seconds."""

    def __init__(self, out: TextIO, clock: Callable[[], float]) -> None:
        self._out = out
        self._clock = clock
        self._rows = 0
        self._next = clock() + _SECONDS_BETWEEN_LINES

    def __call__(self) -> None:
        """Counts a row."""
        self._rows += 1
        if self._clock() >= self._next:
            print(f"{self._rows} rows read", file=self._out, flush=True)
            self._next = self._clock() + _SECONDS_BETWEEN_LINES
