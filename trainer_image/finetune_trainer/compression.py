"""Opens a file that may be compressed as a stream of bytes, and stops what expands without end. Called by `containers`.

What a file is follows from its first bytes, not from its name. Memory stays at a few hundred MiB whatever it holds.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

MOST_EXPANSION = 300  # texts shrink 3 to 20 times, a log of one repeated line up to 200 times
FREE_BYTES = 256 << 20  # what a small file may always expand to
_XZ_MEMORY = 256 << 20
_MAGIC = ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh", "bz2"), (b"\xfd7zXZ\x00", "xz"))


class Broken(ValueError):
    """The bytes aren't what they begin as, or expand without end; the message says which."""


class Readable(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...


def kind(path: Path) -> str:
    """gzip, zstd, bz2, xz, or empty for what isn't compressed."""
    with path.open("rb") as file:
        head = file.read(6)
    return next((name for magic, name in _MAGIC if head.startswith(magic)), "")


@contextmanager
def opened(path: Path) -> Iterator[Readable]:
    """The content. Reading raises Broken where it can't be unpacked."""
    packed = kind(path)
    with path.open("rb") as file:
        if not packed:
            yield file
            return
        yield _Guarded(_unpacked(file, packed), packed, path.stat().st_size)


def _unpacked(file: io.BufferedReader, packed: str) -> Readable:
    if packed == "gzip":
        return gzip.GzipFile(fileobj=file)
    if packed == "bz2":
        return bz2.BZ2File(file)
    if packed == "xz":
        return _Xz(file)
    import pyarrow

    stream: Readable = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")
    return stream


class _Xz:
    """As lzma.LZMAFile, but refuses a dictionary larger than the memory that we give it."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self._decoder: Any = None

    def read(self, size: int = -1, /) -> bytes:
        while True:
            if self._decoder is None or self._decoder.eof:
                rest = self._decoder.unused_data if self._decoder else b""
                head = rest.lstrip(b"\x00") or self._file.read(1 << 16)
                if not head:
                    return b""
                self._decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
            elif self._decoder.needs_input:
                head = self._file.read(1 << 16)
                if not head:
                    raise EOFError("it ends too early")
            else:
                head = b""
            data: bytes = self._decoder.decompress(head, size)
            if data:
                return data


class _Guarded:
    """Counts what comes out."""

    def __init__(self, stream: Readable, packed: str, size: int) -> None:
        self._stream = stream
        self._packed = packed
        self._size = size
        self._most = max(FREE_BYTES, MOST_EXPANSION * size)
        self._read = 0

    def read(self, size: int = -1, /) -> bytes:
        try:
            data = bytes(self._stream.read(size))
        except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
            raise Broken(f"the {self._packed} data can't be unpacked ({error or type(error).__name__})") from None
        self._read += len(data)
        if self._read > self._most:
            raise Broken(
                f"the {self._packed} data expands to more than {self._most >> 20} MiB from {self._size >> 10} KiB, "
                "which no text does; unpack the file where it was made, and look at it"
            )
        return data
