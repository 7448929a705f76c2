"""Proves to both ends of a connection that the other one knows the secret of the attempt.

Each end sends a random number, and then a digest of both numbers that only somebody with the secret
can compute. The secret itself is never sent, and what was sent is of no use for another connection.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from asyncio import StreamReader, StreamWriter

_GREETING = b"finetune-rendezvous/1\n"
_NUMBER_BYTES = 32
_ACCEPTED = b"\x01"


class Rejected(Exception):
    """Reports that the other end doesn't know the secret, or speaks another protocol."""


async def check_peer(reader: StreamReader, writer: StreamWriter, secret: bytes) -> None:
    """Runs the end that was connected to. Raises Rejected, EOFError or OSError."""
    if await reader.readexactly(len(_GREETING)) != _GREETING:
        raise Rejected
    theirs, ours = await reader.readexactly(_NUMBER_BYTES), os.urandom(_NUMBER_BYTES)
    writer.write(ours + _digest(secret, b"accepting", theirs, ours))
    await writer.drain()
    answer = await reader.readexactly(hashlib.sha256().digest_size)
    if not hmac.compare_digest(answer, _digest(secret, b"connecting", theirs, ours)):
        raise Rejected
    writer.write(_ACCEPTED)
    await writer.drain()


async def introduce(reader: StreamReader, writer: StreamWriter, secret: bytes) -> None:
    """Runs the end that has connected. Raises Rejected, EOFError or OSError."""
    ours = os.urandom(_NUMBER_BYTES)
    writer.write(_GREETING + ours)
    await writer.drain()
    theirs = await reader.readexactly(_NUMBER_BYTES)
    answer = await reader.readexactly(hashlib.sha256().digest_size)
    if not hmac.compare_digest(answer, _digest(secret, b"accepting", ours, theirs)):
        raise Rejected
    writer.write(_digest(secret, b"connecting", ours, theirs))
    await writer.drain()
    if await reader.readexactly(len(_ACCEPTED)) != _ACCEPTED:
        raise Rejected


def _digest(secret: bytes, role: bytes, connecting: bytes, accepting: bytes) -> bytes:
    return hmac.digest(secret, b"|".join((_GREETING, role, connecting, accepting)), "sha256")
