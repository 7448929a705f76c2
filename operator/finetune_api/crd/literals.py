"""Writes literals of CEL, the language of the CRD's rules. It does no I/O."""

from __future__ import annotations


def cel_string(text: str) -> str:
    """Returns a text as a CEL string literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
