"""Reads a parquet file as numbered records, a few rows at a time.

The footer of the file lists the sizes of the columns, so data that wouldn't fit in memory is
refused before it is unpacked. Columns of text stay dictionaries, so one giant value that many rows
refer to isn't copied. This is the only importer of pyarrow.parquet.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune_trainer.data.reading.record import MAX_RECORD_BYTES, Record, Unreadable, too_long
from finetune_trainer.opened_file import opened_download

MAX_COLUMN_BYTES = 512 << 20  # of one row group, uncompressed
_BATCH_ROWS = 64
_OPTIONS: dict[str, Any] = {"pre_buffer": False, "buffer_size": 1 << 20}
_MAX_UNPACKED_BYTES = 4 << 30  # for rows that are refused anyway


def records(path: Path) -> Iterator[Record]:
    """Yield the rows of a parquet file.

    Raises Unreadable, which names the row group if the row isn't known.
    """
    import pyarrow
    from pyarrow import parquet

    number = unpacked = 0
    try:
        with opened_download(path) as source, parquet.ParquetFile(source, **_OPTIONS) as file:
            _check_sizes(file.metadata)
            texts = [field.name for field in file.schema_arrow if field.type in (pyarrow.string(), pyarrow.binary())]
        with (
            opened_download(path) as source,
            parquet.ParquetFile(source, read_dictionary=texts, **_OPTIONS) as file,
        ):
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, use_threads=False):
                too_large = {} if batch.nbytes <= MAX_RECORD_BYTES else large_cells(batch)
                unpacked += batch.nbytes if too_large else 0
                if unpacked > _MAX_UNPACKED_BYTES:  # each batch unpacks the column's largest values again
                    raise Unreadable(number + 1, "too many cells of the parquet file are too large; split them")
                for index in range(batch.num_rows):
                    number += 1
                    name = too_large.get(index)
                    yield number, too_long(f"a cell of column {name}") if name else record(batch, index)
    except Unreadable:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
        raise Unreadable(number + 1, f"the parquet file can't be read ({first_line(error)})") from None


def _check_sizes(metadata: Any) -> None:
    first_row = 1
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        last_row = first_row + row_group.num_rows - 1
        for index in range(row_group.num_columns):
            column = row_group.column(index)
            size, values = column.total_uncompressed_size, max(1, column.num_values)
            name = f"row group {group + 1} (rows {first_row} to {last_row}), column {column.path_in_schema}"
            if size / values > MAX_RECORD_BYTES:
                raise Unreadable(first_row, f"{name}: {too_long('a cell')}")
            if size > MAX_COLUMN_BYTES:
                raise Unreadable(
                    first_row,
                    f"{name} has {size >> 20} MiB; write the file with smaller row groups (row_group_size=10000)",
                )
        first_row = last_row + 1


def large_cells(batch: Any) -> dict[int, str]:
    """Return the rows of a batch that have too large a cell, each with the name of its column."""
    from pyarrow import compute

    large: dict[int, str] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if hasattr(column, "dictionary"):
            lengths = compute.take(compute.binary_length(column.dictionary), column.indices).to_pylist()
        else:
            lengths = [column.slice(index, 1).nbytes for index in range(batch.num_rows)]
        large |= {index: name for index, length in enumerate(lengths) if (length or 0) > MAX_RECORD_BYTES}
    return large


def record(batch: Any, index: int) -> dict[str, Any] | str:
    """Return a row of a batch, or why it can't be used."""
    values: dict[str, Any] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            value = column[index].as_py()
        except UnicodeDecodeError:
            return f"column {name} isn't UTF-8"
        values[name] = _as_stored(value, column) if type(value) is float else _without_nulls(value)
    return values


def _as_stored(value: float, column: Any) -> float:
    """Return a number with the digits that its format holds: 0.1 of 32 bits isn't
    0.10000000149011612."""
    import numpy as np

    return float(str(np.float32(value))) if column.type.bit_width == 32 else value


def _without_nulls(value: Any) -> Any:
    """Drop null entries.

    A struct has the keys of all rows, and a null means that this row had no such key.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
