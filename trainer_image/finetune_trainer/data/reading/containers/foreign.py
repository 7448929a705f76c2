"""Recognizes files that hold no rows, by their first bytes and their names. The module is pure."""

from __future__ import annotations

_PAGES = (b"<!doctype html", b"<html")
_POINTER = b"version https://git-lfs"
_UNPACK = "unpack it, or compress it with gzip, zstd, bz2 or xz"
_EXPORT = "export its rows as JSON lines, CSV or parquet"
_KINDS: tuple[tuple[bytes, str, str], ...] = (
    (b"\x04\x22\x4d\x18", "is compressed with lz4", _UNPACK),
    (b"\x5d\x00\x00", "is compressed with lzma", _UNPACK),
    (b"\xff\x06\x00\x00sNaPpY", "is compressed with snappy", _UNPACK),
    (b"\x1f\x9d", "is compressed with compress", _UNPACK),
    (b"\x89LZO", "is compressed with lzop", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "is a 7-Zip archive", "unpack it, and give a folder or a single file"),
    (b"Rar!\x1a\x07", "is a RAR archive", "unpack it, and give a folder or a single file"),
    (b"%PDF-", "is a PDF document", _EXPORT),
    (b"\xd0\xcf\x11\xe0", "is a document of an older Microsoft Office", "save it as CSV (UTF-8)"),
    (b"\x93NUMPY", "is an array of NumPy", _EXPORT),
    (b"\x89HDF\r\n", "is an HDF5 file", _EXPORT),
    (b"Obj\x01", "is an Avro file", _EXPORT),
    (b"ORC", "is an ORC file", _EXPORT),
    (b"\x89PNG", "is an image", "give the rows that refer to it; only text can be trained on"),
    (b"\xff\xd8\xff", "is an image", "give the rows that refer to it; only text can be trained on"),
    (b"<?xml", "is XML", _EXPORT),
    (b"{\\rtf", "is a Rich Text document", _EXPORT),
)
"""(the first bytes, what the file is, the remedy)"""
_PACKED = (b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ\x00")
_TEXT_CONTROLS = frozenset(b"\t\n\r\f\x1b\x1e")
_MANY_CONTROLS = 0.1


def refusal(head: bytes, name: str) -> str:
    """Return why a file can't be read, with the remedy; empty if it may hold rows.

    `head` are its first bytes, unpacked.
    """
    if head.startswith(b"PK\x03\x04"):
        if name.lower().endswith((".xlsx", ".xlsm")) or b"xl/" in head or b"[Content_Types].xml" in head:
            return "is an Excel workbook; save it as CSV (UTF-8)"
        return "is an archive of several files; unpack it, and give a folder or a single file"
    if head[257:262] == b"ustar":
        return "is an archive of several files; unpack it, and give a folder or a single file"
    if head.startswith(b"FEA1"):
        return "is Feather version 1; save it as Feather version 2, or as parquet"
    if head.startswith(_POINTER):
        return "is a Git LFS pointer and not the file; run `git lfs pull` and copy the file again"
    if head.lstrip().lower().startswith(_PAGES):
        return "is a web page, perhaps one that asks to log in; download the file itself"
    if head.startswith(_PACKED):
        return "is compressed twice; unpack it once"
    if (head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")) or head.startswith(b"ccopy_reg"):
        return f"is a pickle, which is never loaded because it may run any code; {_EXPORT}"
    kind = next((kind for kind in _KINDS if head.startswith(kind[0])), None)
    if kind is not None:
        return f"{kind[1]}; {kind[2]}"
    if head.startswith(b"SQLite format 3"):
        return "is an SQLite database; export its rows as JSON lines or CSV"
    return ""


def no_rows(line: bytes) -> str:
    """Return the message about a file whose first line belongs to no format."""
    text = line.decode(errors="replace").strip()
    shown = text if len(text) <= 40 else f"{text[:39]}…"
    return (
        f"begins with {shown!r}, which is neither JSON, CSV, parquet nor Arrow; write one JSON object a line, such as "
        '{"text": "..."}'
    )


BINARY = f"is a binary file of an unknown kind; {_EXPORT}"
"""The message about a file that `is_binary`."""


def is_binary(head: bytes) -> bool:
    """Whether the first bytes of a file, which aren't those of another encoding, are no text."""
    controls = sum(byte < 32 and byte not in _TEXT_CONTROLS for byte in head)
    return controls > _MANY_CONTROLS * len(head)
