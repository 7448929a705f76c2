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

MAX_COLUMN_BYTES = 512 << 20  # of one row group, uncompressed
_BATCH_ROWS = 64


def records(path: Path) -> Iterator[Record]:
    """Yield the rows of a parquet file.

    Raises Unreadable, which names the row group if the row isn't known.
    """
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            _check_sizes(file.metadata)
            texts = [field.name for field in file.schema_arrow if field.type in (pyarrow.string(), pyarrow.binary())]
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20, read_dictionary=texts) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, use_threads=False):
                is_small = batch.nbytes <= MAX_RECORD_BYTES
                for index in range(batch.num_rows):
                    number += 1
                    yield number, record(batch, index, checked=is_small)
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


def record(batch: Any, index: int, *, checked: bool) -> dict[str, Any] | str:
    """Return a row of a batch, or why it can't be used.

    `checked` is whether all of its cells are small.
    """
    values: dict[str, Any] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if not checked and _cell_bytes(column, index) > MAX_RECORD_BYTES:
            return too_long(f"a cell of column {name}")
        try:
            value = column[index].as_py()
        except UnicodeDecodeError:
            return f"column {name} isn't UTF-8"
        if value is not None:
            values[name] = _without_nulls(value)
    return values


def _cell_bytes(column: Any, index: int) -> int:
    if hasattr(column, "dictionary"):
        value = column[index].value  # the dictionary's entry
        return value.as_buffer().size if value is not None and value.is_valid else 0
    return int(column.slice(index, 1).nbytes)


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
