"""Estimates how many bytes of activations a rank needs for each token that it computes at a time.

This module is pure and doesn't import torch. tests/trainer/parallel/test_memory_of_a_step.py
compares the formulas with the trainer's own step on fake tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from finetune_trainer.data.batching.sequence_part import key_copies
from finetune_trainer.kernels.sizes import GATHERED_KEYS
from finetune_trainer.parallel.estimate.recomputation import Recomputation
from finetune_trainer.parallel.model_size import LayerShape, ModelSize

_OUTSIDE, _WIDE_OUTSIDE = 12, 24
"""Bytes per value of a hidden state that the last norm and the output layer need."""
_GRADIENTS = 6
"""Bytes per value of a gated product that the backward pass of one layer needs besides."""


@dataclass(frozen=True)
class Precision:
    """Describes the number formats that activations have.

    With `half`, matrix products are in bfloat16. With `trained`, the base's own weights are
    trained. Activations between products are in the format of the weights: in bfloat16 if the
    weights are frozen or `gathered` in it, and otherwise in float32. With `stores_inputs`, products
    store their inputs also if their weights are frozen, as DeepSpeed's own do in stage 3.
    """

    half: bool
    trained: bool
    gathered: bool = False
    stores_inputs: bool = False

    @property
    def wide(self) -> bool:
        """Whether activations between products are in float32."""
        return self.trained and not self.gathered


@dataclass(frozen=True)
class TokenBytes:
    """Holds the bytes that each token needs: `stored` from the forward pass to the backward pass;
    besides, `outside` of the layers while the loss is computed, and later `layer` in the backward
    pass of one layer."""

    stored: int
    outside: int
    layer: int


def bytes_per_token(
    size: ModelSize, precision: Precision, *, recompute: Recomputation, shares_prefixes: bool = False, parts: int = 1
) -> TokenBytes:
    """Returns the bytes that each token needs. `parts` ranks share each row, and each of them
    computes its own tokens.

    Of a layer that is recomputed, only its input is stored, and perhaps the output of attention;
    the rest exists for one layer at a time. If other layers aren't recomputed, their backward pass
    comes first, and needs more. With `shares_prefixes`, examples may attend to prefixes that they
    share, whose keys are gathered.
    """
    if size.layer is None or not precision.half:
        return _generic(size, half=precision.half, recompute=recompute)
    shape = _exchanged(size.layer, size.kv_heads, parts)
    layer = _layer(size, shape, precision)
    if parts > 1 and (precision.trained or (shape.adapter_inputs and not shape.dropout_masks)):
        layer += 2 * shape.queries  # the input of o is no longer what attention stored
    # The masks of the layer's last product are freed before most of these gradients exist.
    gated = _GRADIENTS * size.intermediate - min(2 * size.intermediate, shape.dropout_masks)
    gradients = max(gated, _attention_gradients(shape, shares_prefixes=shares_prefixes))
    outside = size.hidden * (_WIDE_OUTSIDE if precision.wide else _OUTSIDE)
    again = recompute.layers(size.layers)
    remaining = size.hidden * (4 if precision.wide else 2)
    if recompute.keeps_attention:
        remaining += 2 * shape.queries
    stored = again * remaining + (size.layers - again) * layer
    return TokenBytes(stored, outside, gradients if again < size.layers else layer + gradients)


def _exchanged(shape: LayerShape, kv_heads: int, parts: int) -> LayerShape:
    """Returns the widths in attention if `parts` ranks share each row. Each rank then has all
    tokens of its part of the heads, which are as many values as all heads of its tokens, except
    that key heads which can't be divided are sent several times."""
    return replace(shape, keys=shape.keys * key_copies(max(1, kv_heads), parts))


def _layer(size: ModelSize, shape: LayerShape, precision: Precision) -> int:
    """Returns the bytes that the backward pass of one layer needs, in bfloat16.

    Attention stores q, k, v and its output. A gated product stores its two factors and, unless it
    is fused (`kernels.cuda`), the activated one.
    """
    attention = 2 * (2 * shape.queries + 2 * shape.keys)
    gated = (4 if shape.fusible else 6) * size.intermediate
    if not precision.trained:
        norms = (2 if shape.fusible else 4) * shape.norms
        # Without dropout, adapters store the inputs themselves. That of o is attention's output.
        inputs = 2 * size.hidden + size.intermediate if precision.stores_inputs else 0
        inputs = inputs if shape.dropout_masks else max(0, inputs - shape.adapter_inputs)
        return norms + attention + gated + 2 * (shape.adapter_inputs + inputs) + shape.dropout_masks
    # Fused norms store their inputs, in the format of the activations. Matrix products store their
    # inputs in bfloat16: q, k and v; gate and up; and down, whose input is the gated product. The
    # input of o is attention's output. Norms that aren't fused store their inputs in float32 and
    # what they multiply by their weights. If norms are in float32, each product stores its own copy
    # of its input.
    inputs = (4 if shape.fusible else 8) * shape.norms + (5 * 2 * size.hidden if precision.wide else 0)
    return inputs + attention + gated + 2 * size.intermediate


def _attention_gradients(shape: LayerShape, *, shares_prefixes: bool) -> int:
    """Returns the bytes that the backward pass of a layer's attention needs besides what is stored.

    The kernel has the gradients of the output and of q, and the sum of the latter in float32; the
    gradients of keys and values, and if several queries share a key, of a copy for each of them.
    Keys and values of shared prefixes are gathered, and their gradients summed in float32.
    """
    copies = GATHERED_KEYS if shares_prefixes else 1
    expanded = 2 * 2 * shape.queries if shape.queries != shape.keys else 0
    gathered = 2 * 2 * shape.keys * copies + 2 * 4 * shape.keys if shares_prefixes else 0
    return 8 * shape.queries + copies * (2 * 2 * shape.keys + expanded) + gathered


def _generic(size: ModelSize, *, half: bool, recompute: Recomputation) -> TokenBytes:
    """Returns the bytes for layers of an unknown shape, and in float32.

    In each layer, these are the norms; q, k, v and their rotated copies; attention's output; and
    gate, up and their product. In half precision, the inputs of matrix products are added.
    """
    value = 2 if half else 4
    layer = (12 * size.hidden + 5 * size.intermediate) * value + (4 * size.hidden * 2 if half else 0)
    if not recompute:
        return TokenBytes(size.layers * layer, 0, 0)
    again = recompute.layers(size.layers)
    remaining = size.hidden * (4 + (value if recompute.keeps_attention else 0))
    return TokenBytes(again * remaining + (size.layers - again) * layer, 2 * layer, 0)
