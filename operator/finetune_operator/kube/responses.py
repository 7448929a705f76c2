"""Reads responses of the API server, whose objects others may have made as large as they can.

It raises nothing of its own except ValueError.
"""

from __future__ import annotations

import json
from typing import Any

MAX_BYTES = 32 << 20
"""Of one response. The operator has memory for a few of them; a page of usual objects has 1 MiB."""


async def read(response: Any, limit: int = MAX_BYTES) -> bytes | None:
    """Returns the body of a response of the client library; None if it has more than `limit` bytes,
    of which the rest isn't read."""
    raw = response.response
    parts, size = [], 0
    async for part in raw.content.iter_any():
        parts.append(part)
        size += len(part)
        if size > limit:
            raw.close()
            return None
    return b"".join(parts)


def parsed(content: bytes) -> dict[str, Any]:
    """Returns the object in a response. Raises ValueError if a proxy answered with something
    else."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the response isn't JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError("the response isn't an object")
    return value
