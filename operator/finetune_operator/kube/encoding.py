"""Encodes a request body as JSON that is valid YAML too, as which server-side apply reads it."""

from __future__ import annotations

import json
import re
from typing import Any

_OUTSIDE_ASCII = re.compile("[\x7f-\uffff]")


def yaml_safe(body: Any) -> str:
    """Returns JSON in which characters above U+FFFF are themselves and all others are ASCII.

    JSON escapes those above U+FFFF as two surrogates, which YAML refuses. A lone surrogate, which
    is no character at all, is replaced.
    """
    return _OUTSIDE_ASCII.sub(_escaped, json.dumps(body, ensure_ascii=False, allow_nan=False))


def _escaped(match: re.Match[str]) -> str:
    code = ord(match.group())
    return "\\ufffd" if 0xD800 <= code <= 0xDFFF else f"\\u{code:04x}"
