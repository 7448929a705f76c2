"""Records the kernels that a step launches: what each one computes, reads and writes. Pure.

Bytes are those of the inputs and outputs of an operation, as if a kernel read and wrote each of
them once and nothing were in a cache. An operation of a library of our own, such as a fused kernel,
counts as one kernel, too; `OWN_OPERATIONS` lists those that the rule doesn't describe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Kind = Literal["matmul", "adapters", "attention", "head", "quantization", "elementwise"]

WIDEST_ADAPTER = 64
"""A matrix product with a side that isn't longer belongs to an adapter."""

_WORK = {"aten.mm": (0, 1), "aten.addmm": (1, 2), "aten.bmm": (0, 1)}  # the factors among the arguments
_ATTENTION = "finetune.attend_flash"
_FREE = frozenset(
    ["aten.empty", "aten.empty_like", "aten.empty_strided", "aten.new_empty", "aten.new_empty_strided",
     "aten._unsafe_view", "aten.sym_size", "aten.set_", "aten.resize_"]
)  # fmt: skip
_COLLECTIVE = ("c10d", "_c10d_functional", "fsdp.all_gather", "fsdp.split")


@dataclass(frozen=True)
class Kernel:
    """What a kernel does. `widest` is the number format of its products' factors or of its first
    output."""

    name: str
    kind: Kind
    flops: float
    bytes: float
    dtype: torch.dtype
    backward: bool = False

    @property
    def is_product(self) -> bool:
        """Whether matrix products limit it if bandwidth doesn't."""
        return self.flops > 0


Measure = Callable[[tuple[Any, ...], Mapping[str, Any], Any], tuple[float, float]]
"""Returns (FLOPs, bytes) of an operation from its arguments and its result."""


def _gathered(_: tuple[Any, ...], __: Mapping[str, Any], out: Any) -> tuple[float, float]:
    """Rows are read, and written: the rest of the table isn't touched."""
    return 0.0, 2.0 * _size(out)


def _copied(args: tuple[Any, ...], _: Mapping[str, Any], __: Any) -> tuple[float, float]:
    return 0.0, _size(args[0]) + _size(args[1])


def _filled(args: tuple[Any, ...], _: Mapping[str, Any], __: Any) -> tuple[float, float]:
    return 0.0, _size(args[0])


def _scattered(args: tuple[Any, ...], _: Mapping[str, Any], __: Any) -> tuple[float, float]:
    """Entries are read and written at the places that the indices name."""
    indices = [index for index in args[1] if index is not None]
    entries = max(index.numel() for index in indices) * args[0].element_size()
    return 0.0, 2.0 * entries + sum(map(_size, indices))


def _multiplied_4bit(args: tuple[Any, ...], _: Mapping[str, Any], out: Any) -> tuple[float, float]:
    """The weight is dequantized to the input's format, written, read, and multiplied."""
    inputs, packed, shape = args[0], args[1], args[2]
    weight = shape[0] * shape[1]
    dequantized = weight * inputs.element_size()
    return 2.0 * inputs.numel() * shape[0], _size(inputs) + _size(packed) + 2 * dequantized + _size(out)


def _softmax(args: tuple[Any, ...], _: Mapping[str, Any], __: Any) -> tuple[float, float]:
    """Logits are read for their sum and, if they are replaced, read again and written."""
    return 0.0, _size(args[0]) * (3 if args[2] else 1)


OWN_OPERATIONS: dict[str, Measure] = {
    "aten.copy_": _copied,
    "aten.zero_": _filled,
    "aten.fill_": _filled,
    "aten.index_select": _gathered,
    "aten.index": _gathered,
    "aten.embedding": _gathered,
    "aten.gather": _gathered,
    "aten.index_put_": _scattered,
    "bitsandbytes.gemm_4bit": _multiplied_4bit,
    "finetune.softmax_gradient_": _softmax,
}
"""Operations whose bytes aren't those of their inputs and outputs, by namespace and name. A fused
kernel of ours is added here only if it has FLOPs that matter or reads an input more than once."""


class Recorder(TorchDispatchMode):
    """Records the kernels of everything that is computed inside.

    `pairs` is the number of pairs of tokens that attend to each other, `vocabulary` the number of
    rows of the output layer. Collective operations aren't recorded.
    """

    def __init__(self, pairs: float, vocabulary: int) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self.backward = False
        self._pairs = pairs
        self._vocabulary = vocabulary
        self._in_head = False

    @contextmanager
    def in_head(self) -> Iterator[None]:
        """Attributes everything inside to the output head."""
        before, self._in_head = self._in_head, True
        try:
            yield
        finally:
            self._in_head = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        out = func(*args, **options)
        name = str(func).rsplit(".", 1)[0]
        if name not in _FREE and not func.is_view and not name.startswith(_COLLECTIVE) and _tensors(out):
            self._record(name, args, options, out)
        return out

    def _record(self, name: str, args: tuple[Any, ...], options: Mapping[str, Any], out: Any) -> None:
        inputs = _tensors((args, {key: value for key, value in options.items() if key != "out"}))
        outputs = _tensors(out)
        flops, size = 0.0, float(sum(map(_size, inputs)) + sum(map(_size, outputs)))
        factors = [args[index] for index in _WORK.get(name, ())]
        if name in OWN_OPERATIONS:
            flops, size = OWN_OPERATIONS[name](args, options, out)
        elif factors:
            flops = 2.0 * factors[0].numel() * factors[1].shape[-1]
        elif _ATTENTION in name:
            backward = "backward" in name
            _, heads, _, head_size = args[1 if backward else 0].shape
            flops = 4.0 * self._pairs * heads * head_size * (2.5 if backward else 1.0)
        dtype = factors[0].dtype if factors else outputs[0].dtype
        kind = self._kind(name, [*inputs, *outputs], factors)
        self.kernels.append(Kernel(name, kind, flops, size, dtype, self.backward))

    def _kind(self, name: str, tensors: list[torch.Tensor], factors: list[torch.Tensor]) -> Kind:
        is_embedding = "embedding" in name
        if self._in_head or (not is_embedding and any(self._vocabulary in tensor.shape for tensor in tensors)):
            return "head"
        if _ATTENTION in name:
            return "attention"
        if "dropout" in name:
            return "adapters"
        if name == "bitsandbytes.gemm_4bit":
            return "matmul"
        if name.startswith("bitsandbytes"):
            return "quantization"
        if factors:
            sides = {*factors[0].shape[-2:], *factors[1].shape[-2:]}
            return "adapters" if min(sides) <= WIDEST_ADAPTER else "matmul"
        return "elementwise"


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _size(tensor: torch.Tensor) -> float:
    """Returns the bytes of a tensor's own elements. Those of an expanded dimension are the same."""
    elements = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= length if stride else min(length, 1)
    return float(elements * tensor.element_size())
