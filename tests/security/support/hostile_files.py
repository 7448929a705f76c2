"""Files that cost far more than their size: they are written by tests, and no person would."""

from __future__ import annotations

from pathlib import Path

import pyarrow
from pyarrow import parquet


def list_of_one_value(path: Path, repeats: int, size: int = 1 << 20) -> None:
    """Writes a row whose list has one value many times. The file has it once."""
    values = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * repeats, pyarrow.int32()), ["x" * size])
    lists = pyarrow.ListArray.from_arrays(pyarrow.array([0, repeats], pyarrow.int32()), values)
    parquet.write_table(pyarrow.table({"prompt": ["p"], "completion": lists}), path, compression="zstd")


def rows_of_one_value(path: Path, rows: int, size: int = 20 << 20) -> None:
    """Writes rows that all have the same large cell. The file has it once."""
    indices = pyarrow.array([0] * rows, pyarrow.int32())
    column = pyarrow.DictionaryArray.from_arrays(indices, ["x" * size])
    parquet.write_table(pyarrow.table({"prompt": ["p"] * rows, "completion": column}), path, compression="zstd")
