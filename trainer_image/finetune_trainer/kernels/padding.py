"""Keeps what is computed for padding away from real tokens: every layer's output is set to zero at
padded positions.

A mask alone isn't enough. A masked score has a weight of zero, and a padded position has a gradient
of zero, but zero times infinity is NaN, both in attention's sum over values and in the gradient of
every weight. With zeros at the start of each layer, whatever the layer computes for padding stays
finite. Packed rows don't need this: `packed_layout` fills them up with copies of real tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from finetune_trainer.data.batching.collator import Padding

_NONE = Padding()
_current = _NONE  # a plain global, for the same reason as in `packed_row`


@contextmanager
def masked(padding: Padding | None) -> Iterator[None]:
    """Declares the padding of the batch whose forward and backward passes run inside. None declares
    that it has no padding."""
    global _current
    previous, _current = _current, padding or _NONE
    try:
        yield
    finally:
        _current = previous


def guard(model: Any, layers: list[nn.Module]) -> None:
    """Installs the hooks that clear padding. `layers` are those of the model, in the order in which
    they are computed."""
    encoder: Any = model.get_encoder() if model.config.is_encoder_decoder else nn.Identity()
    encoder_modules = {id(module) for module in encoder.modules()}
    for is_encoder in (True, False):
        own = [layer for layer in layers if (id(layer) in encoder_modules) is is_encoder]
        for layer in own[:1]:
            layer.register_forward_pre_hook(_ClearInput(is_encoder), with_kwargs=True)
        for layer in own:
            layer.register_forward_hook(_ClearOutput(is_encoder))


@dataclass(frozen=True)
class _ClearInput:
    """Clears padding in the embeddings, as the first layer receives them."""

    encoder: bool

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if _current is _NONE:
            return None
        if arguments:
            return (_cleared(arguments[0], self.encoder), *arguments[1:]), options
        return arguments, {**options, "hidden_states": _cleared(options["hidden_states"], self.encoder)}


@dataclass(frozen=True)
class _ClearOutput:
    """Clears padding in a layer's output."""

    encoder: bool

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        if _current is _NONE:
            return None
        if isinstance(output, tuple):
            return (_cleared(output[0], self.encoder), *output[1:])
        return _cleared(output, self.encoder)


def _cleared(hidden: Tensor, encoder: bool) -> Tensor:
    """Returns `hidden` (rows, length, width) with zeros at padded positions.

    The steps of a generation compute tokens that come after all padding: their shapes differ, and
    they are returned unchanged.
    """
    padding = _current.encoder if encoder else _current.decoder
    if padding is None or hidden.shape[:2] != padding.shape:
        return hidden
    return hidden.masked_fill(padding[..., None], 0)
