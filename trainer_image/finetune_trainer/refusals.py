"""Turns what libraries raise because of a file or a setting into a RunError with a remedy.

Such an error recurs in every attempt, so it must never cost a restart. What depends on the machine
(memory, disks, GPUs, connections) is raised unchanged.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from finetune_trainer.errors import RunError, is_deterministic, reason_in

_MISSING = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL)
_OF_DEVICES = ("CUDA", "cuDNN", "CUDNN", "CUBLAS", "NCCL", "gloo")
_LONGEST = 400


@contextmanager
def raising(reason: str, subject: str, remedy: str, settings: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Raises RunError(reason) with `subject`, what a library says, and `remedy`, for an error
    inside that the input causes.

    A library may quote only a wrong value; the message says which of `settings` has it.
    """
    try:
        yield
    except BaseException as error:
        if not is_caused_by_input(error):
            raise
        text = text_of(error)
        names = [name for name, value in _texts(settings or {}) if repr(value) in text]
        origin = f" (the value of {', '.join(names)})" if names else ""
        raise RunError(reason, f"{subject}: {text}{origin}; {remedy}") from error


def _texts(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _texts(value, f"{prefix}{name}.")
        elif isinstance(value, str):
            yield f"{prefix}{name}", value


def is_caused_by_input(error: BaseException) -> bool:
    """Returns whether an error is due to what a library was given, and not to the machine.

    Libraries in Rust report their bugs as exceptions that aren't of the type Exception.
    """
    if isinstance(error, RunError | MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return False
    if not isinstance(error, Exception):
        return type(error).__name__ == "PanicException"
    if isinstance(error, OSError):
        return error.errno in _MISSING
    if is_deterministic(error) or not isinstance(error, RuntimeError):
        return True
    text = str(error)
    of_device = type(error).__name__.startswith("Dist") or any(name in text for name in _OF_DEVICES)
    return not of_device and reason_in(text) is None


def text_of(error: BaseException) -> str:
    """Returns what an exception says in one line; with its type if that alone isn't a sentence."""
    text = " ".join(str(error).split())
    named = text if " " in text and not isinstance(error, KeyError) else f"{type(error).__name__} {text}".strip()
    return named if len(named) <= _LONGEST else f"{named[: _LONGEST - 1]}…"
