"""Arrays that grow on disk: .npy files, written from front to back and mapped when whole. Called by `examples`.

What is written leaves memory at once, so a split may be larger than that. Knows nothing of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

Column = tuple[type[np.generic], tuple[int, ...]]
"""Type of an entry, and its shape where it isn't a number."""


class Spool:
    """`folder`/<name>.npy for each column. Use as a context manager; `arrays` only after it."""

    def __init__(self, folder: Path, columns: Mapping[str, Column]) -> None:
        self._folder = folder
        self._columns = columns
        self._counts = dict.fromkeys(columns, 0)
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> Spool:
        for name in self._columns:
            self._files[name] = (self._folder / f"{name}.npy").open("wb", buffering=1 << 18)
            self._head(name)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for name, file in self._files.items():
            with file:
                if kind is None:
                    file.seek(0)
                    self._head(name)

    def add(self, name: str, values: ArrayLike) -> None:
        dtype, shape = self._columns[name]
        more = np.ascontiguousarray(values, dtype).reshape(-1, *shape)
        self._files[name].write(more.data)
        self._counts[name] += len(more)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All columns, mapped into memory read-only."""
        return {
            name: np.load(self._folder / f"{name}.npy", mmap_mode="r" if count else None)
            for name, count in self._counts.items()
        }

    def _head(self, name: str) -> None:
        """numpy leaves room in it for the count to grow, so that it is as long at the end as at first."""
        dtype, shape = self._columns[name]
        about = {
            "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
            "fortran_order": False,
            "shape": (self._counts[name], *shape),
        }
        np.lib.format.write_array_header_1_0(self._files[name], about)
