"""Encodes TensorBoard's event file without TensorFlow, TensorBoard or torch.

The module is pure. A file depends on the history only, so a resumed run has one curve instead of
overlapping ones. The file consists of records (length, its checksum, a protocol buffer, its
checksum) as defined by tensorflow/core/lib/io/record_writer.h and tensorflow/core/util/event.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from finetune_api.messages import events
from finetune_trainer.reporting.trackers.scalars import points

_DOUBLE, _VARINT, _BYTES, _FLOAT = 1, 0, 2, 5  # wire types: 1 is 64-bit and 5 is 32-bit


def file_name(started: float, job: str) -> str:
    """Returns a name that TensorBoard recognizes. `started` is in seconds since the epoch."""
    return f"events.out.tfevents.{int(started)}.{job}"


def content(history: Iterable[events.Event]) -> bytes:
    """Returns the content of the file."""
    plotted = [point for event in history for point in points(event)]
    started = plotted[0].time if plotted else 0.0
    records = [_record(_field(1, _DOUBLE, struct.pack("<d", started)) + _field(3, _BYTES, b"brain.Event:2"))]
    for point in plotted:
        summary = b"".join(_field(1, _BYTES, _value(name, value)) for name, value in point.values.items())
        time, step = _field(1, _DOUBLE, struct.pack("<d", point.time)), _field(2, _VARINT, _varint(point.step))
        records.append(_record(time + step + _field(5, _BYTES, summary)))
    return b"".join(records)


def _value(name: str, value: float) -> bytes:
    return _field(1, _BYTES, name.encode()) + _field(2, _FLOAT, struct.pack("<f", value))


def _field(number: int, kind: int, payload: bytes) -> bytes:
    length = _varint(len(payload)) if kind == _BYTES else b""
    return _varint(number << 3 | kind) + length + payload


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


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
    """Returns the lookup table of CRC-32C: Castagnoli's polynomial, reflected."""
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return tuple(table)


_TABLE = _table()
