"""What a model weighs, from config.json and the heads of its safetensors files: nothing is loaded. No torch.

Called by `scale` on rank 0, and by `finetune plan --model`.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.resource import FullSpec, LoraSpec
from finetune_trainer import freezing
from finetune_trainer.failure import Failed

_LAYER = re.compile(r"^((?:.*?\.)?(?:layers|layer|h|blocks?)\.\d+)\.")
_AROUND = ("embed", "wte", "wpe", "shared", "lm_head", "head")  # never adapted by all-linear
_LARGEST_HEAD = 100 * 2**20


@dataclass(frozen=True)
class ModelSize:
    """Numbers of values, not bytes. `largest`: what must be whole at once where weights are split (a layer, or all
    that is around the layers)."""

    parameters: int
    trained: int
    largest: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    matrices: int = 0  # of the layers: what a quantised base keeps in few bits


def read(folder: Path, lora: LoraSpec | None, full: FullSpec | None = None) -> ModelSize:
    """`lora`: only its adapters are trained; None: everything, or what `full` says.

    Raises Failed for files that can't be read.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            shapes.update(heads(path))
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise Failed("ModelInvalid", f"model.uri: the model can't be loaded: {error}") from None
    return of(config, shapes, lora, full)


def heads(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name, from the first bytes of a safetensors file."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > _LARGEST_HEAD:
            raise ValueError(f"{path.name}: its head can't be read")
        body: dict[str, Any] = json.loads(file.read(length))
    return {name: tuple(entry["shape"]) for name, entry in body.items() if name != "__metadata__"}


def of(
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    lora: LoraSpec | None,
    full: FullSpec | None = None,
) -> ModelSize:
    """By the names that Transformers' configurations use; what is missing is taken from what is there. Pure."""
    text = config.get("text_config")
    config = {**config, **text} if isinstance(text, dict) else config
    units: Counter[str] = Counter()
    for name, shape in shapes.items():
        found = _LAYER.match(name)
        units[found.group(1) if found else ""] += math.prod(shape)
    total = sum(units.values())
    adapters = 0 if lora is None else sum(_adapter(name, shape, lora) for name, shape in shapes.items())
    hidden = _first(config, 512, "hidden_size", "n_embd", "d_model")
    if lora is not None:
        apart = any(name.endswith("lm_head.weight") for name in shapes)
        adapters += len(lora.added_tokens) * hidden * (2 if apart else 1)
    return ModelSize(
        parameters=total + adapters,
        trained=_trained(shapes, full) if lora is None else adapters,
        largest=max(units.values(), default=0),
        layers=len([unit for unit in units if unit])
        or _first(config, 12, "num_hidden_layers", "n_layer", "num_layers"),
        hidden=hidden,
        intermediate=_first(config, 4 * hidden, "intermediate_size", "n_inner", "d_ff"),
        vocabulary=_first(config, 32000, "vocab_size"),
        matrices=sum(math.prod(shape) for name, shape in shapes.items() if len(shape) == 2 and not _is_around(name)),
    )


def _trained(shapes: Mapping[str, tuple[int, ...]], full: FullSpec | None) -> int:
    """In full training. All where the files' names aren't the model's, and patterns therefore match none of them."""
    try:
        learning = freezing.learn({name: (name,) for name in shapes}, full)
    except Failed:
        learning = set(shapes)
    return sum(math.prod(shapes[name]) for name in learning)


def _adapter(name: str, shape: tuple[int, ...], lora: LoraSpec) -> int:
    """Values that are trained because of a weight: its adapter's two matrices and length, or a copy of it."""
    if any(_belongs(name, module) for module in lora.modules_to_save):
        return math.prod(shape)
    module = name.removesuffix(".weight")
    if len(shape) != 2 or module == name:
        return math.prod(shape) if name.endswith(".bias") and lora.bias != "none" else 0
    targets = list(lora.target_modules)
    if targets == ["all-linear"]:
        wanted = not _is_around(module)
    else:
        wanted = any(module == target or module.endswith(f".{target}") for target in targets)
    return lora.rank * sum(shape) + (shape[0] if lora.dora else 0) if wanted else 0


def _is_around(name: str) -> bool:
    return any(word in name for word in _AROUND)


def _belongs(name: str, module: str) -> bool:
    return f".{module}." in f".{name}"


def _first(config: Mapping[str, Any], otherwise: int, *names: str) -> int:
    values = (config.get(name) for name in names)
    return next((int(value) for value in values if isinstance(value, int) and value), otherwise)
