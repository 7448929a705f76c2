"""Parquet → numbered records, a few rows at a time. Called by `containers`; the one importer of pyarrow.parquet.

A column's sizes stand in the file's footer, so that what wouldn't fit in memory is refused before it is unpacked;
columns of text stay dictionaries, so that one giant value that many rows name isn't copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune_trainer.containers import MOST_BYTES, Record, Unreadable

MOST_CHUNK = 512 << 20
_ROWS = 64


def records(path: Path) -> Iterator[Record]:
    """Raises Unreadable, which names the row group where it can't name a row."""
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            _check_sizes(file.metadata)
            texts = [field.name for field in file.schema_arrow if field.type in (pyarrow.string(), pyarrow.binary())]
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20, read_dictionary=texts) as file:
            for batch in file.iter_batches(batch_size=_ROWS, use_threads=False):
                big = batch.nbytes > MOST_BYTES
                for index in range(batch.num_rows):
                    number += 1
                    yield number, _record(batch, index, checked=not big)
    except Unreadable:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
        raise Unreadable(number + 1, f"the parquet file can't be read ({_first_line(error)})") from None


def _check_sizes(metadata: Any) -> None:
    begin = 1
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group)
        for index in range(rows.num_columns):
            column = rows.column(index)
            size, values = column.total_uncompressed_size, max(1, column.num_values)
            where = (
                f"row group {group + 1} (rows {begin} to {begin + rows.num_rows - 1}), column {column.path_in_schema}"
            )
            if size / values > MOST_BYTES:
                raise Unreadable(
                    begin, f"{where}: a cell has more than {MOST_BYTES >> 20} MiB; a row is one example: split it"
                )
            if size > MOST_CHUNK:
                raise Unreadable(
                    begin,
                    f"{where} has {size >> 20} MiB; write the file with smaller row groups (row_group_size=10000)",
                )
        begin += rows.num_rows


def _record(batch: Any, index: int, *, checked: bool) -> dict[str, Any] | str:
    found: dict[str, Any] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if not checked and _size(column, index) > MOST_BYTES:
            return f"column {name} has a cell of more than {MOST_BYTES >> 20} MiB; a row is one example: split it"
        try:
            value = column[index].as_py()
        except UnicodeDecodeError:
            return f"column {name} isn't UTF-8"
        if value is not None:
            found[name] = _without_nulls(value)
    return found


def _size(column: Any, index: int) -> int:
    """Bytes of a cell."""
    if hasattr(column, "dictionary"):
        value = column[index].value  # the dictionary's entry
        return value.as_buffer().size if value is not None and value.is_valid else 0
    return int(column.slice(index, 1).nbytes)


def _without_nulls(value: Any) -> Any:
    """A struct has all the keys that any row's has; what is null wasn't there."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
