"""TensorBoard's event file, written without TensorFlow, TensorBoard or torch: the supervisor imports none of them.

A file is a function of the history, so a resumed run has one curve and no overlapping ones. The format: records of
(length, its checksum, a protocol buffer, its checksum); tensorflow/core/lib/io/record_writer.h, core/util/event.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from finetune_api import events
from finetune_trainer.scalars import points

_DOUBLE, _VARINT, _BYTES, _FLOAT = 1, 0, 2, 5  # wire types, 1 being 64 bits and 5 being 32


def file_name(started: float, job: str) -> str:
    """As TensorBoard looks for it."""
    return f"events.out.tfevents.{int(started)}.{job}"


def content(history: Iterable[events.Event]) -> bytes:
    """The whole file."""
    plotted = [found for event in history for found in points(event)]
    started = plotted[0].time if plotted else 0.0
    records = [_record(_field(1, _DOUBLE, struct.pack("<d", started)) + _field(3, _BYTES, b"brain.Event:2"))]
    for at in plotted:
        summary = b"".join(_field(1, _BYTES, _value(name, value)) for name, value in at.values.items())
        time, step = _field(1, _DOUBLE, struct.pack("<d", at.time)), _field(2, _VARINT, _varint(at.step))
        records.append(_record(time + step + _field(5, _BYTES, summary)))
    return b"".join(records)


def _value(name: str, value: float) -> bytes:
    return _field(1, _BYTES, name.encode()) + _field(2, _FLOAT, struct.pack("<f", value))


def _field(number: int, kind: int, payload: bytes) -> bytes:
    length = _varint(len(payload)) if kind == _BYTES else b""
    return _varint(number << 3 | kind) + length + payload


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", _masked(length)) + data + struct.pack("<I", _masked(data))


def _masked(data: bytes) -> int:
    crc = _crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _table() -> tuple[int, ...]:
    """Castagnoli's polynomial, reflected."""
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return tuple(table)


_TABLE = _table()
