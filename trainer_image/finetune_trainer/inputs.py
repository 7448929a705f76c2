"""Which files of this node hold a split's rows, and how each is read. Called by preflight and `data`, after `fetch`.

Pure but for listing folders. The spec's places come in; `rows.Input` goes out.
"""

from __future__ import annotations

from pathlib import PurePosixPath

from finetune_api.data_report import SplitName
from finetune_api.run import DataConfig, DataSource
from finetune_trainer.failure import Failed
from finetune_trainer.paths import Paths
from finetune_trainer.rows import Input

SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
_FIELDS = {"train": "dataset.uri", "validation": "dataset.validation.uri", "test": "dataset.test.uri"}


def splits(data: DataConfig) -> tuple[SplitName, ...]:
    """Those that have files of their own."""
    return tuple(split for split in SPLITS if data.places(split))


def field(data: DataConfig, split: str) -> str:
    """What messages call a split."""
    return "dataset.sources" if split == "train" and data.sources else _FIELDS[split]


def is_several(source: DataSource) -> bool:
    """Whether a URI names a folder or a pattern instead of a file."""
    return source.location.uri.endswith("/") or "*" in source.location.uri


def of(data: DataConfig, paths: Paths, split: str) -> tuple[Input, ...]:
    """In a fixed order. Raises Failed DatasetNotFound where nothing was fetched."""
    found: list[Input] = []
    places = data.places(split)
    for index, source in enumerate(places):
        common = {
            "source": source.location.display,
            "format": source.format,
            "columns": source.columns.named() if source.columns else {},
            "labels": data.labels,
            "sure": data.min_label_probability,
            "weight": source.weight,
        }
        if len(places) == 1 and not is_several(source):
            name = PurePosixPath(source.location.display).name
            found.append(Input(paths.data(split), name, **common))  # type: ignore[arg-type]
            continue
        folder = paths.data_folder(split, index)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        prefix = f"sources[{index}]/" if len(places) > 1 else ""
        found += [Input(path, prefix + path.relative_to(folder).as_posix(), **common) for path in files]  # type: ignore[arg-type]
    if not found or not all(one.path.is_file() for one in found):
        raise Failed("DatasetNotFound", f"{field(data, split)}: no file was fetched; give the URI of a file of rows")
    return tuple(found)
