"""Writes arrays that grow on disk: .npy files, which are mapped into memory once complete.

They are written front to back. Values leave memory immediately, so a split may be larger than
memory. The writer knows nothing about rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

Column = tuple[type[np.generic], tuple[int, ...]]
"""The type of an entry of a column, and the shape of an entry, which is empty for a number."""


class NpyWriter:
    """Writes `folder`/<name>.npy for each column.

    It is a context manager; `arrays` may be called only after it has exited.
    """

    def __init__(self, folder: Path, columns: Mapping[str, Column]) -> None:
        self._folder = folder
        self._columns = columns
        self._counts = dict.fromkeys(columns, 0)
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> NpyWriter:
        for name in self._columns:
            self._files[name] = (self._folder / f"{name}.npy").open("wb", buffering=1 << 18)
            self._write_header(name)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for name, file in self._files.items():
            with file:
                if kind is None:
                    file.seek(0)
                    self._write_header(name)

    def add(self, name: str, values: ArrayLike) -> None:
        """Append entries to a column."""
        dtype, shape = self._columns[name]
        entries = np.ascontiguousarray(values, dtype).reshape(-1, *shape)
        self._files[name].write(entries.data)
        self._counts[name] += len(entries)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return all columns, mapped into memory read-only."""
        return {
            name: np.load(self._folder / f"{name}.npy", mmap_mode="r" if count else None)
            for name, count in self._counts.items()
        }

    def _write_header(self, name: str) -> None:
        """Write the header.

        NumPy pads it so that the count may grow, so its length stays the same at the end.
        """
        dtype, shape = self._columns[name]
        header = {
            "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
            "fortran_order": False,
            "shape": (self._counts[name], *shape),
        }
        np.lib.format.write_array_header_1_0(self._files[name], header)
