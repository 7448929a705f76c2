"""Finds the files on this node that hold the rows of a split, and how each of them is read.

The module is pure, except that it lists folders.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from finetune_api.messages.data_report import DataWarning, SplitName, SplitReport
from finetune_api.messages.run import DataConfig, DataSource
from finetune_trainer.data.reading.rows import InputFile
from finetune_trainer.errors import RunError
from finetune_trainer.paths import Paths

SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
_FIELDS = {"train": "dataset.uri", "validation": "dataset.validation.uri", "test": "dataset.test.uri"}
_HELD_OUT = re.compile(r"(^|/)(test|validation|valid|val|dev|eval)([-_.0-9][^/]*|/.*)$", re.IGNORECASE)


def splits(data: DataConfig) -> tuple[SplitName, ...]:
    """Return the splits that have files of their own."""
    return tuple(split for split in SPLITS if data.sources_of(split))


def field(data: DataConfig, split: str) -> str:
    """Return the field of the job that names the files of a split, for messages."""
    return "dataset.sources" if split == "train" and data.sources else _FIELDS[split]


def is_folder_or_pattern(source: DataSource) -> bool:
    """Whether a URI names a folder or a pattern instead of a single file."""
    return source.location.uri.endswith("/") or "*" in source.location.uri


def input_file(path: Path, name: str, source: DataSource, data: DataConfig) -> InputFile:
    """Return a file of a source, to be read as the job describes. `name` is for messages."""
    return InputFile(
        path,
        name,
        source=source.location.display,
        format=source.format,
        columns=source.columns.named() if source.columns else {},
        labels=data.labels,
        min_label_probability=data.min_label_probability,
        weight=source.weight,
        rendering=data.rendering,
    )


def of(data: DataConfig, paths: Paths, split: str) -> tuple[InputFile, ...]:
    """Return the downloaded files of a split in a fixed order.

    Raises RunError DatasetNotFound if nothing was downloaded.
    """
    files: list[InputFile] = []
    sources = data.sources_of(split)
    for index, source in enumerate(sources):
        if len(sources) == 1 and not is_folder_or_pattern(source):
            files.append(input_file(paths.data(split), PurePosixPath(source.location.display).name, source, data))
            continue
        folder = paths.data_folder(split, index)
        members = sorted(path for path in folder.rglob("*") if path.is_file())
        prefix = f"sources[{index}]/" if len(sources) > 1 else ""
        files += [input_file(path, prefix + path.relative_to(folder).as_posix(), source, data) for path in members]
    if not files or not all(file.path.is_file() for file in files):
        raise RunError("DatasetNotFound", f"{field(data, split)}: no file was fetched; give the URI of a file of rows")
    return tuple(files)


def held_out_files(train: SplitReport) -> Iterator[DataWarning]:
    """Yield a warning if files among others are named as rows that must not be trained on."""
    if train.split != "train" or len(train.files) < 2:
        return
    common = posixpath.commonprefix([posixpath.dirname(file.name) + "/" for file in train.files]).rfind("/") + 1
    names = [file.name for file in train.files if _HELD_OUT.search("/" + file.name[common:])]
    if 0 < len(names) < len(train.files):
        listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        verb = "is" if len(names) == 1 else "are"
        remedy = "name the training files by a pattern in dataset.uri, such as data/train-*.parquet"
        yield DataWarning(reason="HeldOutFiles", message=f"{listed} {verb} trained on; {remedy}")
