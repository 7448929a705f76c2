"""Compares the tensors of a model's files with those that its configuration asks for.

Transformers fills a tensor that is missing, or has another shape, with random numbers, and leaves
out one that it doesn't need. A model like that would be trained without a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from finetune_trainer.errors import RunError

_OF_ONE_MODEL = "use weights and config.json of the same model"
_ADAPTER = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|ia3_l)\b")
_LONGEST_PREFIX = 3
_NUMBER = re.compile(r"\.(\d+)\.")


def check(info: Mapping[str, Any], model: Any) -> None:
    """Refuses weights that don't fit the configuration.

    `info` is what Transformers returned with `model`: empty if no weights were read. Raises
    RunError(ModelInvalid) with the names of the tensors.
    """
    errors = list(info.get("error_msgs") or ())
    if errors:
        raise RunError("ModelInvalid", f"model.uri: the weights can't be loaded: {' '.join(errors[0].split())[:400]}")
    mismatched = sorted(info.get("mismatched_keys") or ())
    if mismatched:
        name, stored, expected = mismatched[0]
        raise RunError(
            "ModelInvalid",
            f"model.uri: the weights don't fit config.json: {name} has the shape {tuple(stored)}, and the "
            f"configuration asks for {tuple(expected)}{_others(mismatched)}; {_OF_ONE_MODEL}",
        )
    missing = sorted(info.get("missing_keys") or ())
    unexpected = sorted(info.get("unexpected_keys") or ())
    wrapped = _wrapped(missing, unexpected)
    if wrapped is not None:
        name, prefix = wrapped
        raise RunError(
            "ModelInvalid",
            f"model.uri: the names of the weights begin with {prefix!r}, which the model's don't: it has {name}, and "
            f"the file {prefix}{name}; save the model itself, without the wrapper that was around it",
        )
    adapters = [name for name in unexpected if _ADAPTER.search(name)]
    if adapters:
        raise RunError(
            "ModelInvalid",
            f"model.uri: {adapters[0]} is of an adapter, which would be left out{_others(adapters)}; merge the adapter "
            "into the weights and save them",
        )
    if missing:
        raise RunError(
            "ModelInvalid",
            f"model.uri: the weights lack {missing[0]}, which the model needs{_others(missing)}; use the folder of a "
            "complete model, not of an adapter",
        )
    layers = _unread_layers(unexpected, model)
    if len(layers) > _predicted_tokens(model.config):
        raise RunError(
            "ModelInvalid",
            f"model.uri: config.json asks for fewer layers than the files have: {layers[0]} would be left out; "
            f"{_OF_ONE_MODEL}",
        )


def _wrapped(missing: Iterable[str], unexpected: Iterable[str]) -> tuple[str, str] | None:
    """Returns the name of a missing tensor, and what a wrapper has put before it in the file."""
    names = set(missing)
    for other in unexpected:
        parts = other.split(".")
        for length in range(1, min(len(parts), _LONGEST_PREFIX + 1)):
            name = ".".join(parts[length:])
            if name in names:
                return name, other.removesuffix(name)
    return None


def _others(tensors: Sequence[Any]) -> str:
    count = len(tensors) - 1
    return f" (as with {count} other{'s' if count > 1 else ''})" if count else ""


def _unread_layers(unexpected: Iterable[str], model: Any) -> list[str]:
    """Returns the names of layers that the model doesn't have although it has others like them."""
    known = {_NUMBER.sub(".#.", name, count=1) for name, _ in model.named_parameters()}
    return sorted(
        {
            name[: match.end() - 1]
            for name in unexpected
            if (match := _NUMBER.search(name)) and _NUMBER.sub(".#.", name, count=1) in known
        }
    )


def _predicted_tokens(config: Any) -> int:
    """Returns how many layers only predict later tokens; Transformers never loads them."""
    value = getattr(config.get_text_config(), "num_nextn_predict_layers", 0)
    return value if isinstance(value, int) else 0
