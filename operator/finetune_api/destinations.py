"""Decides whether a name or a URL is one that an administrator has listed. It does no I/O."""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import urlsplit

_PORTS = {"http": 80, "https": 443}


def is_listed(name: str, entries: Iterable[str]) -> bool:
    """Whether a name is an entry, or begins with one that ends with `*`."""
    return any(name == entry or (entry.endswith("*") and name.startswith(entry[:-1])) for entry in entries)


def is_listed_url(url: str, entries: Iterable[str]) -> bool:
    """Whether a URL has the scheme, host and port of an entry, and its path or one below it.

    A URL with a user name or a dot segment is never listed.
    """
    target = _parts(url)
    return target is not None and any(_contains(parts, target) for entry in entries if (parts := _parts(entry)))


def _contains(entry: tuple[str, tuple[str, ...]], target: tuple[str, tuple[str, ...]]) -> bool:
    return entry[0] == target[0] and target[1][: len(entry[1])] == entry[1]


def _parts(url: str) -> tuple[str, tuple[str, ...]] | None:
    """Returns the origin and the path's segments of an http(s) URL; None if it is anything else."""
    try:
        parts = urlsplit(url)
        port = parts.port or _PORTS.get(parts.scheme)
    except ValueError:
        return None
    segments = tuple(segment for segment in parts.path.split("/") if segment)
    if parts.scheme not in _PORTS or not parts.hostname or "@" in parts.netloc or "\\" in url:
        return None
    if any(segment.replace("%2e", ".").replace("%2E", ".") in (".", "..") for segment in segments):
        return None
    return f"{parts.scheme}://{parts.hostname.lower().rstrip('.')}:{port}", segments
