"""Opens a file that may be compressed as a stream of bytes, and stops endless expansion.

The first bytes of a file, not its name, decide what it is. Memory stays at a few hundred MiB for
any content.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from finetune_trainer.opened_file import Moved, opened_download

MAX_EXPANSION = 300  # texts shrink 3 to 20 times, a log of one repeated line up to 200 times
FREE_BYTES = 256 << 20  # a small file may always expand to this size
_XZ_MEMORY = 256 << 20
_MAGIC = ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh", "bz2"), (b"\xfd7zXZ\x00", "xz"))


class CorruptData(ValueError):
    """Reports that compressed data can't be unpacked, or expands without end."""


class Readable(Protocol):
    """Describes a stream of bytes."""

    def read(self, size: int = -1, /) -> bytes:
        """Return at most `size` bytes, and none only at the end."""


def kind(path: Path) -> str:
    """Return gzip, zstd, bz2 or xz, or an empty string for a file that isn't compressed."""
    with _opened_file(path) as file:
        return _kind(file)


@contextmanager
def _opened_file(path: Path) -> Iterator[BinaryIO]:
    try:
        with opened_download(path) as file:
            yield file
    except Moved:
        raise CorruptData("was replaced by a link after it was downloaded") from None


def _kind(file: BinaryIO) -> str:
    head = file.read(6)
    file.seek(0)
    return next((name for magic, name in _MAGIC if head.startswith(magic)), "")


@contextmanager
def opened(path: Path) -> Iterator[Readable]:
    """Open the uncompressed content of a file.

    Reading raises CorruptData if it can't be unpacked.
    """
    with _opened_file(path) as file:
        codec = _kind(file)
        if not codec:
            yield file
            return
        yield _ExpansionGuard(_unpacked(file, codec), codec, os.fstat(file.fileno()).st_size)


def _unpacked(file: BinaryIO, codec: str) -> Readable:
    if codec == "gzip":
        return gzip.GzipFile(fileobj=file)
    if codec == "bz2":
        return bz2.BZ2File(file)
    if codec == "xz":
        return _Xz(file)
    import pyarrow

    stream: Readable = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")
    return stream


class _Xz:
    """Like lzma.LZMAFile, except that it refuses a dictionary of more than _XZ_MEMORY bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder: Any = None

    def read(self, size: int = -1, /) -> bytes:
        """Return at most `size` bytes. Raises EOFError for data that is cut off."""
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


class _ExpansionGuard:
    """Raises CorruptData if too many bytes are unpacked for the size of the file."""

    def __init__(self, stream: Readable, codec: str, file_bytes: int) -> None:
        self._stream = stream
        self._codec = codec
        self._file_bytes = file_bytes
        self._limit = max(FREE_BYTES, MAX_EXPANSION * file_bytes)
        self._unpacked_bytes = 0

    def read(self, size: int = -1, /) -> bytes:
        """Return at most `size` bytes. Raises CorruptData."""
        try:
            data = bytes(self._stream.read(size))
        except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
            cause = error or type(error).__name__
            raise CorruptData(
                f"the {self._codec} data can't be unpacked ({cause}); if it was cut off, download it again"
            ) from None
        self._unpacked_bytes += len(data)
        if self._unpacked_bytes > self._limit:
            raise CorruptData(
                f"the {self._codec} data expands to more than {self._limit >> 20} MiB from "
                f"{self._file_bytes >> 10} KiB, which no text does; unpack the file and check its content"
            )
        return data
