"""Recognizes files that hold no rows, by their first bytes and their names. The module is pure."""

from __future__ import annotations

_PAGES = (b"<!doctype html", b"<html")
_POINTER = b"version https://git-lfs"


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
