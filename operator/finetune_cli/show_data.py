"""`finetune validate --data`: shows the data report of files on this machine.

The files are read as the trainer reads them, so its Python packages are needed, but no GPU.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from finetune_api.messages.data_report import DataReport, SplitName
from finetune_api.messages.run import DataConfig, DataSource, Location
from finetune_api.resource import FineTuneJob
from finetune_operator.core.plan import plan
from finetune_operator.settings import Settings
from finetune_trainer.data.reading.rows import InputFile


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
        help="the model's folder (its tokenizer is enough); shows lengths in tokens, and rendered rows",
    )
    data.add_argument(
        "-o", "--output", choices=("text", "json"), default="text", help="format of the report; default text"
    )


def show(job: FineTuneJob, options: argparse.Namespace) -> int:
    """Prints the report. Returns 0, or 1 if the run would be refused.

    Raises CannotRead, RunError for rows that can't be read, PlanError for a spec that can't be run,
    or ModuleNotFoundError if a package is missing.
    """
    from finetune_trainer.data import quality_report_text

    config = plan(job, Settings()).data
    report = _report(config, _files_of_splits(config, options), Path(options.model) if options.model else None)
    if options.output == "json":
        print(report.model_dump_json(by_alias=True, exclude_none=True, indent=1))
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print("\n".join(quality_report_text.lines(report, width=width)))
    dropped = sum(split.dropped - split.unlabelled for split in report.splits)
    if dropped and config.on_invalid == "fail":
        if options.output == "text":
            print(f"refused: {dropped} rows can't be used; fix them, or set dataset.onInvalid: drop")
        return 1
    return 0


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


def _report(config: DataConfig, files: dict[SplitName, tuple[InputFile, ...]], model: Path | None) -> DataReport:
    """Returns the data report. Every unusable row is counted, even if dataset.onInvalid is fail."""
    from finetune_trainer.data import pipeline
    from finetune_trainer.data.chat_rendering import Renderer

    config = config.model_copy(update={"on_invalid": "drop"})
    renderer = Renderer.load(model, config.max_sequence_length, config.chat_template) if model else None
    options = {name: "--data" if name == "train" else f"--{name}" for name in files}
    with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
        inputs = pipeline.Inputs(config, files, options, Path(folder), {name: name for name in files})
        return pipeline.prepare(inputs, renderer).report()
