"""Turns the answers of the API server into objects, or into one of a few exceptions."""

from __future__ import annotations

import json
from typing import Any

from finetune_api.untrusted import line
from finetune_operator.kube import responses

_TOO_LARGE = ("request is too large", "Request entity too large", "exceeds")  # etcd's limit, as a 500 or 413


class ApiError(Exception):
    """Is raised if the API server rejects a request; `message` is its own."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(f"{code} {reason}: {message}")
        self.code = code
        self.reason = reason
        self.message = message


class NotFound(ApiError):
    """Is raised for code 404: the object, or its namespace, is gone."""


class AlreadyExists(ApiError):
    """Is raised for code 409 if the name is taken."""


class Conflict(ApiError):
    """Is raised for code 409 if the request is based on an outdated version."""


class Refused(ApiError):
    """Is raised for another 4xx: the same request fails again unless something else changes."""


class TooLarge(Refused):
    """Is raised if the object is too large for the server, whatever code it answers with."""


class Unavailable(ApiError):
    """Is raised if the server doesn't respond or is overloaded; the request may succeed later."""


class LargePage(Unavailable):
    """Is raised if a response has more bytes than the operator has memory for."""


def object_in(content: bytes) -> dict[str, Any]:
    """Parses a response. Raises Unavailable if a proxy answered with something else."""
    try:
        return responses.parsed(content)
    except ValueError as error:
        raise Unavailable(0, "InvalidResponse", str(error)) from error


def error_of(code: int, content: bytes) -> ApiError:
    """Returns the exception for an answer that isn't a success."""
    try:
        status = json.loads(content)
        reason, message = line(str(status.get("reason", "")), 128), line(str(status.get("message", "")))
    except (ValueError, AttributeError, RecursionError):
        reason, message = "", line(content[:500].decode(errors="replace"))
    if code == 413 or (code == 500 and any(text in message for text in _TOO_LARGE)):
        return TooLarge(code, reason, message)
    if code == 404:
        return NotFound(code, reason, message)
    if code == 409:
        return (AlreadyExists if reason == "AlreadyExists" else Conflict)(code, reason, message)
    if code == 429 or code >= 500:
        return Unavailable(code, reason, message)
    return Refused(code, reason, message)
