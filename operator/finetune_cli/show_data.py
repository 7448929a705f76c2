"""The data report of files on this machine, for `finetune validate --data`: read as the trainer reads.

Prints, and says whether the run would be refused. Needs the trainer's Python packages, and no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from finetune_api.data_report import DataReport, SplitName
from finetune_api.resource import FineTuneJob
from finetune_api.run import DataConfig
from finetune_operator.plan import plan
from finetune_operator.settings import Settings
from finetune_trainer.rows import Input

_NEEDED = ("numpy", "pyarrow", "transformers")


class CannotRead(ValueError):
    """An option that doesn't fit the file or this machine; the message names it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("the data report (reads files of this machine instead of the job's)")
    data.add_argument(
        "--data", metavar="PATH", nargs="+", help="training rows: files or folders; one for each of dataset.sources"
    )
    data.add_argument("--validation", metavar="PATH", help="validation rows")
    data.add_argument("--test", metavar="PATH", help="test rows")
    data.add_argument(
        "--model", metavar="DIR", help="the model's folder (its tokenizer is enough): lengths in tokens, rendered rows"
    )
    data.add_argument("-o", "--output", choices=("text", "json"), default="text", help="of the report")


def show(job: FineTuneJob, options: argparse.Namespace) -> int:
    """Prints the report. 0, or 1 where the run would be refused. Raises CannotRead, Failed or plan's PlanError."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise CannotRead(f"--data needs {', '.join(missing)}; install finetune-operator[trainer]")
    from finetune_trainer import survey_text

    config = plan(job, Settings()).data
    report = _report(config, _inputs(config, options), Path(options.model) if options.model else None)
    if options.output == "json":
        print(report.model_dump_json(by_alias=True, exclude_none=True, indent=1))
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print("\n".join(survey_text.lines(report, width=width)))
    dropped = sum(split.dropped - split.unlabelled for split in report.splits)
    if dropped and config.on_invalid == "fail":
        if options.output == "text":
            print(f"refused: {dropped} rows can't be used; mend them, or set dataset.onInvalid: drop")
        return 1
    return 0


def _inputs(config: DataConfig, options: argparse.Namespace) -> dict[SplitName, tuple[Input, ...]]:
    places = config.places("train")
    if config.sources and len(options.data) != len(places):
        raise CannotRead(f"--data: {len(options.data)} paths, and dataset.sources has {len(places)}; give one for each")
    found: dict[SplitName, tuple[Input, ...]] = {}
    train: list[Input] = []
    for index, path in enumerate(options.data):
        place = places[index] if config.sources else places[0]
        train += [
            Input(
                file,
                str(file),
                place.location.display,
                place.format,
                place.columns.named() if place.columns else {},
                config.labels,
                config.min_label_probability,
                place.weight,
            )
            for file in _files("--data", path)
        ]
    found["train"] = tuple(train)
    own: tuple[tuple[SplitName, str | None], ...] = (("validation", options.validation), ("test", options.test))
    for name, path in own:
        if path:
            columns = config.columns.named() if config.columns else {}
            found[name] = tuple(
                Input(file, str(file), path, config.format, columns, config.labels, config.min_label_probability)
                for file in _files(f"--{name}", path)
            )
    return found


def _files(option: str, given: str) -> Sequence[Path]:
    from finetune_trainer.containers import SUFFIXES, is_named_as_data

    path = Path(given)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and is_named_as_data(file.name))
        if not files:
            raise CannotRead(f"{option} {given}: no file is named {', '.join(SUFFIXES)}")
        return files
    if not path.is_file():
        raise CannotRead(f"{option} {given}: isn't there")
    return (path,)


def _report(config: DataConfig, files: dict[SplitName, tuple[Input, ...]], model: Path | None) -> DataReport:
    """Every row that can't be used is counted, whatever onInvalid says."""
    from finetune_trainer import certify, examples, survey, tokens
    from finetune_trainer.render import Renderer

    renderer = Renderer.load(model, config.max_sequence_length, config.chat_template) if model else None
    checks = certify.certify(renderer, own=config.chat_template is None) if renderer else ()
    measured: dict[SplitName, survey.Measured] = {}
    with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
        for name, some in files.items():
            where = {"train": "--data"}.get(name, f"--{name}")
            if renderer:
                cache = tokens.build(Path(folder), name, some, where, on_invalid="drop", renderer=renderer)
                measured[name] = survey.Measured.of_tokens(cache)
            else:
                measured[name] = survey.Measured.of_examples(
                    examples.prepare(some, where, on_invalid="drop", renderer=None)
                )
        found = survey.parts_of(measured, config.validation_fraction, config.test_fraction)
        return survey.report(found, longest=config.max_sequence_length, renderer=renderer, checks=checks)
