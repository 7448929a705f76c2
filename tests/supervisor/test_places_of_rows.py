"""Folders, patterns and mixtures of rows: what is fetched, under which name a row is told, and what isn't there."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from finetune_api.resource import ColumnsSpec
from finetune_api.run import DataConfig, DataSource, Location, RunConfig, S3Config
from finetune_trainer import fetch, inputs, preflight
from finetune_trainer.failure import Failed
from finetune_trainer.paths import Paths
from finetune_trainer.store import Access

from .world import Setup

_ROW = json.dumps({"prompt": "a", "completion": "b"}) + "\n"


def _place(folder: Path, end: str) -> Location:
    return Location(uri=f"file://{folder}/{end}", display=f"pvc://claim/{end}")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    folder = tmp_path / "rows"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.jsonl").write_text(_ROW)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(_ROW.encode() * 2))
    (folder / "deep" / "c.csv").write_text("q,a\nx,y\n")
    (folder / "README.md").write_text("about")
    return folder


def _fetched(tmp_path: Path, **data: Any) -> tuple[RunConfig, Paths, list[str], dict[str, fetch.DataFacts]]:
    run = Setup(tmp_path).write_inputs().run().model_copy(update={"data": DataConfig(**data)})
    paths, told = Paths(tmp_path / "scratch"), []
    facts = fetch.data(run, paths, Access(S3Config(), {}), told.append)
    return run, paths, told, facts


@pytest.mark.parametrize(
    ("end", "names"),
    [
        ("", ["a.jsonl", "b.jsonl.gz", "deep/c.csv"]),
        ("*.jsonl*", ["a.jsonl", "b.jsonl.gz"]),
        ("**/*.csv", ["deep/c.csv"]),
        ("d*p/c.csv", ["deep/c.csv"]),
        ("README*", ["README.md"]),
    ],
)
def test_a_folder_or_a_pattern_names_files(end: str, names: list[str], rows: Path, tmp_path: Path) -> None:
    run, paths, told, facts = _fetched(tmp_path, train=_place(rows, end))
    assert [file.name for file in inputs.of(run.data, paths, "train")] == names
    assert facts["train"].digest.startswith("sha256:")
    assert ("1 other files are left alone" in told[0]) == (end == "")


def test_a_mixture_is_checked_file_by_file_and_its_rows_are_told_by_file(rows: Path, tmp_path: Path) -> None:
    (rows / "a.jsonl").write_text(_ROW + "{\n")
    sources = (
        DataSource(location=_place(rows, "*.jsonl*"), weight=2),
        DataSource(location=_place(rows, "deep/c.csv"), columns=ColumnsSpec(prompt="q", completion="a")),
    )
    run, paths, _, facts = _fetched(tmp_path, train=sources[0].location, sources=sources)
    assert facts["train"].uri == "pvc://claim/*.jsonl*, pvc://claim/deep/c.csv"
    with pytest.raises(
        Failed, match=r"dataset\.sources: 1 rows can't be used: sources\[0\]/a\.jsonl row 2: isn't JSON"
    ):
        preflight.check_rows(run, paths, lambda _: None)
    dropping = run.model_copy(update={"data": run.data.model_copy(update={"on_invalid": "drop"})})
    told: list[str] = []
    preflight.check_rows(dropping, paths, told.append)
    assert told == ["dataset.sources: 4 rows of prompt-completion, 1 unusable, 2 duplicates"]


@pytest.mark.parametrize(
    ("end", "reason", "message"),
    [
        ("*.parquet", "DatasetNotFound", "pvc://claim/*.parquet: no file is there that this names"),
        ("none/", "DatasetNotFound", "pvc://claim/none/: no file is there"),
        ("docs/", "DatasetNotFound", "none of its 1 files is named .jsonl"),
        ("deep", "DatasetNotFound", "is no file (a folder has / at its end)"),
        ("empty/", "DatasetInvalid", "pvc://claim/empty/: e.jsonl (train) is empty"),
    ],
)
def test_what_isnt_there_is_told_by_its_place(end: str, reason: str, message: str, rows: Path, tmp_path: Path) -> None:
    for name in ("docs/x.md", "empty/e.jsonl"):
        (rows / name).parent.mkdir()
        (rows / name).write_text("x" if name.startswith("docs") else "")
    with pytest.raises(Failed) as refused:
        _fetched(tmp_path, train=_place(rows, end))
    assert refused.value.reason == reason
    assert message in refused.value.message
