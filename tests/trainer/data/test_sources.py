"""Folders, patterns and mixtures of rows: which files are fetched, under which name a row is
reported, and what is reported if a file is missing."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from finetune_api.messages.run import DataConfig, DataSource, Location, RunConfig, S3Config
from finetune_api.resource import ColumnsSpec
from finetune_trainer.data import sources as inputs
from finetune_trainer.errors import RunError
from finetune_trainer.paths import Paths
from finetune_trainer.storage.schemes import Access
from finetune_trainer.supervisor import download
from finetune_trainer.supervisor.inspection import checks
from trainer.support.supervisor_process import JobSetup

_ROW = json.dumps({"prompt": "a", "completion": "b"}) + "\n"


def _location(folder: Path, end: str) -> Location:
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


def _fetched(tmp_path: Path, **data: Any) -> tuple[RunConfig, Paths, list[str], dict[str, download.DataFacts]]:
    run = JobSetup(tmp_path).write_inputs().run().model_copy(update={"data": DataConfig(**data)})
    paths, log_lines = Paths(tmp_path / "scratch"), []
    facts = download.data(run, paths, Access(S3Config(), {}), log_lines.append)
    return run, paths, log_lines, facts


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
def test_a_folder_or_a_pattern_selects_files(end: str, names: list[str], rows: Path, tmp_path: Path) -> None:
    run, paths, log_lines, facts = _fetched(tmp_path, train=_location(rows, end))
    assert [file.name for file in inputs.of(run.data, paths, "train")] == names
    assert facts["train"].digest.startswith("sha256:")
    assert ("1 other files are ignored" in log_lines[0]) == (end == "")


def test_a_mixture_is_checked_file_by_file_and_its_rows_are_reported_by_file(rows: Path, tmp_path: Path) -> None:
    (rows / "a.jsonl").write_text(_ROW + "{\n")
    sources = (
        DataSource(location=_location(rows, "*.jsonl*"), weight=2),
        DataSource(location=_location(rows, "deep/c.csv"), columns=ColumnsSpec(prompt="q", completion="a")),
    )
    run, paths, _, facts = _fetched(tmp_path, train=sources[0].location, sources=sources)
    assert facts["train"].uri == "pvc://claim/*.jsonl*, pvc://claim/deep/c.csv"
    with pytest.raises(
        RunError, match=r"dataset\.sources: 1 row can't be used: sources\[0\]/a\.jsonl row 2: isn't JSON"
    ):
        checks.check_rows(run, paths, checks.Progress(lambda _: None))
    dropping = run.model_copy(update={"data": run.data.model_copy(update={"on_invalid": "drop"})})
    log_lines: list[str] = []
    checks.check_rows(dropping, paths, checks.Progress(log_lines.append))
    assert log_lines == ["dataset.sources: 4 rows of prompt-completion, 1 unusable, 2 duplicates"]


@pytest.mark.parametrize(
    ("end", "reason", "message"),
    [
        ("*.parquet", "DatasetNotFound", "pvc://claim/*.parquet matches no file"),
        ("none/", "DatasetNotFound", "pvc://claim/none/ matches no file"),
        ("docs/", "DatasetNotFound", "none of its 1 files is named .jsonl"),
        ("deep", "DatasetNotFound", "is not a file; end the URI of a folder with /"),
        ("empty/", "DatasetInvalid", "pvc://claim/empty/: e.jsonl (train) is empty"),
    ],
)
def test_missing_files_are_reported_by_their_location(
    end: str, reason: str, message: str, rows: Path, tmp_path: Path
) -> None:
    for name in ("docs/x.md", "empty/e.jsonl"):
        (rows / name).parent.mkdir()
        (rows / name).write_text("x" if name.startswith("docs") else "")
    with pytest.raises(RunError) as error:
        _fetched(tmp_path, train=_location(rows, end))
    assert error.value.reason == reason
    assert message in error.value.message


def test_hidden_files_of_a_folder_are_passed_over(rows: Path, tmp_path: Path) -> None:
    for name in (".ipynb_checkpoints/a-checkpoint.jsonl", "deep/._c.csv"):
        (rows / name).parent.mkdir(exist_ok=True)
        (rows / name).write_text(_ROW)
    run, paths, log_lines, _ = _fetched(tmp_path, train=_location(rows, ""))
    names = [file.name for file in inputs.of(run.data, paths, "train")]
    assert names == ["a.jsonl", "b.jsonl.gz", "deep/c.csv"]
    assert "3 other files are ignored" in log_lines[0]
