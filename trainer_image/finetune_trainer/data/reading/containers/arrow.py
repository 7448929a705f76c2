"""Reads an Arrow file, as `datasets` saves them, as numbered records.

Both formats are read: streams, which `save_to_disk` writes, and files. One batch is held at a time,
and is validated before any of its values is used, because offsets may point anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune_trainer.data.reading import parquet
from finetune_trainer.data.reading.record import MAX_RECORD_BYTES, Record, Unreadable, too_long
from finetune_trainer.opened_file import opened_download

FILE_MAGIC = b"ARROW1"
STREAM_MAGIC = b"\xff\xff\xff\xff"


def records(path: Path) -> Iterator[Record]:
    """Yield the rows of an Arrow file.

    Raises Unreadable, which names the first row of the batch.
    """
    import pyarrow

    number = 0
    try:
        with opened_download(path) as source, pyarrow.PythonFile(source) as file:
            for batch in _batches(file):
                if batch.nbytes > parquet.MAX_COLUMN_BYTES:
                    size = f"{batch.nbytes >> 20} MiB"
                    raise Unreadable(number + 1, f"a batch has {size}; save it with smaller ones (writer_batch_size)")
                batch.validate(full=True)
                too_large = {} if batch.nbytes <= MAX_RECORD_BYTES else parquet.large_cells(batch)
                for index in range(batch.num_rows):
                    number += 1
                    name = too_large.get(index)
                    yield number, too_long(f"a cell of column {name}") if name else parquet.record(batch, index)
    except Unreadable:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
        raise Unreadable(number + 1, f"the Arrow file can't be read ({parquet.first_line(error)})") from None


def _batches(file: Any) -> Iterator[Any]:
    from pyarrow import ipc

    is_file = file.read(len(FILE_MAGIC)) == FILE_MAGIC
    file.seek(0)
    if not is_file:
        yield from ipc.open_stream(file)
        return
    reader = ipc.open_file(file)
    yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
