"""A model whose padding token has an arbitrary embedding, to show that no padding reaches a real
token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def poisoned(base: torch.nn.Module, pad: int, poison: float) -> Callable[[], None]:
    """Sets the padding token's embedding to `poison`, except in an output layer that shares the
    weight.

    Returns a function that restores the model.
    """

    def replace_output(module: torch.nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.masked_fill((arguments[0] == pad)[..., None], poison)

    size = base.get_input_embeddings().num_embeddings  # type: ignore[operator, union-attr]
    embeddings = (m for m in base.modules() if isinstance(m, torch.nn.Embedding) and m.num_embeddings == size)
    hooks = [module.register_forward_hook(replace_output) for module in embeddings]

    def restore() -> None:
        for hook in hooks:
            hook.remove()

    return restore
