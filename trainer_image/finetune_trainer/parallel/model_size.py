"""Determines how large a model is, from config.json and the headers of its safetensors files.

This module loads no weights and doesn't import torch.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune_api.resource import FullSpec, LoraSpec
from finetune_trainer import model_config, safetensors_header
from finetune_trainer.errors import RunError
from finetune_trainer.kernels.sizes import supports_head_size
from finetune_trainer.model import freezing

_LAYER = re.compile(r"^((?:.*?\.)?(?:layers|layer|h|blocks?)\.\d+)\.")
_OUTSIDE_LAYERS = ("embed", "wte", "wpe", "shared", "lm_head", "head")
"""Parts of the names of weights outside of the layers, which all-linear never adapts."""
_EXPERTS = ".experts."
"""Is in the names of a mixture's experts, which files store one by one or, like Transformers, as
one tensor for each layer."""
_NOT_ADAPTED = ("gate", "router", "shared_expert_gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""In such a model, the last parts of the names of layers that all-linear leaves out."""
_SHARED_EXPERT = "shared_expert"
"""Names the expert that every token uses, whose weights are linear layers."""


@dataclass(frozen=True)
class LayerShape:
    """Holds the widths in one layer that determine its activations, in numbers of values per token.

    `queries` and `keys` are all heads together, and `norms` is what enters the layer's norms.
    `adapter_inputs` is what adapters store of their inputs, and `dropout_masks` is how many values
    have a mask. With `fusible`, norms and gated products are of the kind that `kernels.cuda`
    replaces.
    """

    queries: int
    keys: int
    norms: int
    adapter_inputs: int = 0
    dropout_masks: int = 0
    fusible: bool = True


@dataclass(frozen=True)
class ModelSize:
    """Holds the size of a model, in numbers of values, not bytes.

    `largest` is what must be gathered at a time when weights are split: the largest layer, or
    everything outside of the layers; `largest_layer` is the former. `matrices` is the number of
    values in the layers' matrices, which are those that a quantized base stores in few bits. The
    experts of a mixture aren't among them: Transformers loads those of a layer as one tensor, and
    bitsandbytes quantizes linear layers only. `trains_head` says whether, with adapters, a copy of
    the output layer is trained, or of embeddings that it is tied to. `layer` is known only for
    layers that are built like those of Llama. `formats` are the number formats of the files, as
    safetensors names them, if they are known. With `chunks_scores`, the flash kernel doesn't
    support the model's attention, and its scores are computed in chunks. `heads` and `kv_heads` are
    the numbers of attention heads of a layer and of their keys; 0 if they aren't known.
    """

    parameters: int
    trained: int
    largest: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    matrices: int = 0
    largest_layer: int = 0
    trains_head: bool = False
    layer: LayerShape | None = None
    formats: frozenset[str] = frozenset()
    chunks_scores: bool = False
    heads: int = 0
    kv_heads: int = 0

    @property
    def layer_values(self) -> int:
        """The number of values in the largest layer, or more if that isn't known."""
        return self.largest_layer or self.largest


def read(folder: Path, lora: LoraSpec | None, full: FullSpec | None = None) -> ModelSize:
    """Returns the size of the model in a folder.

    With `lora`, only its adapters are trained; otherwise, every weight is, or those that `full`
    selects. Raises RunError if the files can't be read.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    formats: set[str] = set()
    try:
        for path in sorted(folder.glob("*.safetensors")):
            for tensor in safetensors_header.read(path)[1]:
                shapes[tensor.name] = tensor.shape
                formats.add(tensor.format)
        config = model_config.read(model_config.CONFIG, (folder / model_config.CONFIG).read_bytes(), "the folder")
    except OSError as error:
        raise RunError("ModelInvalid", f"model.uri: the model can't be loaded: {error}") from None
    if lora is not None and not any(_is_adapted(name, shapes[name], lora) for name in _adaptable(shapes)):
        modules = sorted({name.removesuffix(".weight").rsplit(".", 1)[-1] for name in shapes if len(shapes[name]) == 2})
        raise RunError(
            "InvalidConfig",
            f"method.lora.targetModules: the model has no layer called {', '.join(lora.target_modules)}; it has "
            f"{', '.join(modules)} (or use all-linear)",
        )
    return replace(size_of(config, shapes, lora, full), formats=frozenset(formats))


def size_of(
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    lora: LoraSpec | None,
    full: FullSpec | None = None,
) -> ModelSize:
    """Returns the size of a model with this configuration and these tensors. This function is pure.

    The configuration is read by the names that Transformers uses; a default replaces a missing
    setting.
    """
    text = config.get("text_config")
    config = {**config, **text} if isinstance(text, dict) else config
    units: Counter[str] = Counter()
    for name, shape in shapes.items():
        layer = _LAYER.match(name)
        units[layer.group(1) if layer else ""] += math.prod(shape)
    total = sum(units.values())
    adapters = 0 if lora is None else sum(_adapter(name, shapes[name], lora) for name in _adaptable(shapes))
    hidden = _first(config, 512, "hidden_size", "n_embd", "d_model")
    untied = any(name.endswith("lm_head.weight") for name in shapes)
    outside = [name for name in shapes if _is_outside_layers(name)]
    output = [name for name in outside if "head" in name or "embed_out" in name] or outside  # if it is tied
    copied = lora.modules_to_save if lora is not None else ()
    if lora is not None:
        adapters += len(lora.added_tokens) * hidden * (2 if untied else 1)
    heads = _first(config, 0, "num_attention_heads", "n_head")
    matrices = [
        shape
        for name, shape in shapes.items()
        if len(shape) == 2 and not _is_outside_layers(name) and _EXPERTS not in name
    ]
    return ModelSize(
        parameters=total + adapters,
        trained=_trained(shapes, full) if lora is None else adapters,
        largest=max(units.values(), default=0),
        layers=len([unit for unit in units if unit])
        or _first(config, 12, "num_hidden_layers", "n_layer", "num_layers"),
        hidden=hidden,
        intermediate=_first(config, 4 * hidden, "intermediate_size", "n_inner", "d_ff"),
        vocabulary=_first(config, 32000, "vocab_size"),
        matrices=sum(math.prod(shape) for shape in matrices),
        largest_layer=max((values for unit, values in units.items() if unit), default=0),
        trains_head=any(_belongs(name, module) for name in output for module in copied),
        layer=_layer_shape(config, shapes, lora),
        chunks_scores=_chunks_scores(config),
        heads=heads,
        kv_heads=_first(config, heads, "num_key_value_heads"),
    )


def _adaptable(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Returns the names of the tensors that adapters may change."""
    if not any(_EXPERTS in name for name in shapes):
        return list(shapes)
    return [
        name
        for name in shapes
        if f"{_SHARED_EXPERT}." in name or name.removesuffix(".weight").rsplit(".", 1)[-1] not in _NOT_ADAPTED
    ]


def _chunks_scores(config: Mapping[str, Any]) -> bool:
    head = _first(config, _first(config, 512, "hidden_size") // _first(config, 1, "num_attention_heads"), "head_dim")
    return bool(config.get("attn_logit_softcapping")) or not supports_head_size(head)


def _layer_shape(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], lora: LoraSpec | None
) -> LayerShape | None:
    """Returns the widths of a layer, or None if its feed-forward part isn't one gated product."""
    names = [name for name in shapes if _LAYER.match(name)]
    if not all(any(part in name for name in names) for part in (".gate_proj.", ".up_proj.", ".q_proj.")):
        return None
    if any("expert" in name for name in names):
        return None
    layers = len({match.group(1) for name in names if (match := _LAYER.match(name))})
    hidden, heads = _first(config, 512, "hidden_size"), _first(config, 1, "num_attention_heads")
    head = _first(config, hidden // heads, "head_dim")
    queries, keys = heads * head, _first(config, heads, "num_key_value_heads") * head
    widths = {"q_norm": queries, "k_norm": keys}
    norms = [
        next((width for norm, width in widths.items() if norm in name), hidden)
        for name in names
        if "norm" in name and name.endswith(".weight")
    ]
    inputs, masks = (0, 0) if lora is None else _adapter_inputs(shapes, lora)
    activation = config.get("hidden_act", config.get("hidden_activation", "silu"))
    fusible = activation in ("silu", "swish", "gelu_pytorch_tanh")
    return LayerShape(queries, keys, sum(norms) // layers, inputs // layers, masks // layers, fusible)


def _adapter_inputs(shapes: Mapping[str, tuple[int, ...]], lora: LoraSpec) -> tuple[int, int]:
    """Returns (the values of adapters' inputs that are stored, the values that have a dropout mask)
    in all layers.

    Dropout gives each adapter an input of its own. Without it, the adapters of a module with the
    same input share it.
    """
    inputs = [(name, shape[1]) for name, shape in shapes.items() if _is_adapted(name, shape, lora)]
    if lora.dropout:
        total = sum(width for _, width in inputs)
        return total, total
    return sum(width for _, width in {(name.rsplit(".", 2)[0], width) for name, width in inputs}), 0


def _trained(shapes: Mapping[str, tuple[int, ...]], full: FullSpec | None) -> int:
    """Counts the values that full fine-tuning trains.

    If a pattern of `full` matches no name, since the files name the weights differently than the
    model does, all values are counted.
    """
    try:
        trained = freezing.trainable_names({name: (name,) for name in shapes}, full)
    except RunError:
        trained = set(shapes)
    return sum(math.prod(shapes[name]) for name in trained)


def _adapter(name: str, shape: tuple[int, ...], lora: LoraSpec) -> int:
    """Counts the values that are trained for a weight: those of its adapter's two matrices and
    magnitudes, or all values of the weight if a copy of it is trained or if it is a trained
    bias."""
    if any(_belongs(name, module) for module in lora.modules_to_save):
        return math.prod(shape)
    if len(shape) != 2 or not name.endswith(".weight"):
        return math.prod(shape) if name.endswith(".bias") and lora.bias != "none" else 0
    return lora.rank * sum(shape) + (shape[0] if lora.dora else 0) if _is_adapted(name, shape, lora) else 0


def _is_adapted(name: str, shape: tuple[int, ...], lora: LoraSpec) -> bool:
    module = name.removesuffix(".weight")
    if len(shape) != 2 or module == name:
        return False
    if list(lora.target_modules) == ["all-linear"]:
        return not _is_outside_layers(module)
    return any(module == target or module.endswith(f".{target}") for target in lora.target_modules)


def _is_outside_layers(name: str) -> bool:
    return any(part in name.replace(_SHARED_EXPERT, "") for part in _OUTSIDE_LAYERS)


def _belongs(name: str, module: str) -> bool:
    return f".{module}." in f".{name}"


def _first(config: Mapping[str, Any], default: int, *names: str) -> int:
    """Returns the first of these settings that is an integer other than 0, or `default`."""
    values = (config.get(name) for name in names)
    return next((int(value) for value in values if isinstance(value, int) and value), default)
