"""Encodes what ranks tell each other, besides tensors, as JSON of a declared type.

PyTorch's object collectives unpickle what arrives, so that whoever reaches a rank could run code in
it. Here, the worst that a wrong message can do is to end the attempt. The module uses no network.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, NoReturn

import torch
from pydantic import TypeAdapter, ValidationError
from torch.distributed import distributed_c10d

from finetune_trainer.errors import RunError

MAX_BYTES = 1 << 30
"""The size of a message; the longest ones have one number for each row of a split."""

TensorFormat = tuple[tuple[int, ...], str]
"""The shape and the dtype of a tensor, as `format_of` returns them."""


def encode(value: Any, kind: Any) -> bytes:
    """Returns the message for a value of the type `kind`, which pydantic must be able to
    validate."""
    return json.dumps(_adapter(kind).dump_python(value, mode="json", by_alias=True)).encode()


def decode(message: bytes, kind: Any) -> Any:
    """Returns the value in a message. Raises RunError PeerLost if it isn't one of the type
    `kind`."""
    try:
        return _adapter(kind).validate_json(message, strict=True)
    except ValidationError as error:
        raise RunError("PeerLost", f"another rank sent a message of the wrong form: {error}"[:600]) from None


def check_size(size: int) -> None:
    """Raises RunError PeerLost for the size of a message that no rank would send."""
    if not 0 <= size <= MAX_BYTES:
        raise RunError("PeerLost", f"another rank announced a message of {size} bytes, more than {MAX_BYTES}")


def format_of(tensor: torch.Tensor) -> TensorFormat:
    """Returns a tensor's shape and dtype."""
    return tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")


def empty(tensor_format: TensorFormat, device: torch.device | str) -> torch.Tensor:
    """Returns an uninitialized tensor of this format. Raises RunError PeerLost for an unknown
    dtype."""
    shape, name = tensor_format
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise RunError("PeerLost", f"another rank sent a tensor of the unknown dtype {name!r}")
    return torch.empty(shape, dtype=dtype, device=device)


def refuse_pickles() -> None:
    """Makes PyTorch's object collectives fail in this process, whichever library calls them."""
    distributed_c10d._object_to_tensor = _refuse
    distributed_c10d._tensor_to_object = _refuse


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError("object collectives are switched off, since they unpickle what other processes send")


@lru_cache(maxsize=64)
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
