"""Which weights learn in full training: globs over names. Called by `assembly`, and by `model_size` to estimate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from finetune_api.resource import FullSpec
from finetune_trainer.failure import Failed

if TYPE_CHECKING:
    from finetune_trainer.model import Loaded  # needs torch


def unfreeze(loaded: Loaded, full: FullSpec | None = None) -> Loaded:
    """Every weight learns, or those that `full` says. A tied weight goes by each of its names.

    Raises Failed for a pattern that matches no weight, and where nothing is left to learn.
    """
    names: dict[int, list[str]] = {}
    own = {id(parameter): parameter for parameter in loaded.model.parameters()}
    for name, parameter in loaded.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    learning = learn({names_of[0]: names_of for names_of in names.values()}, full)
    for key, parameter in own.items():
        parameter.requires_grad_(names[key][0] in learning)
    return loaded


def learn(weights: Mapping[str, Iterable[str]], full: FullSpec | None) -> set[str]:
    """The weights (each with all of its names) that learn. Pure. Raises Failed."""
    if full is None:
        return set(weights)
    everyone = [name for names in weights.values() for name in names]
    for field, patterns in (("trainable", full.trainable), ("freeze", full.freeze)):
        for pattern in patterns:
            if not _matches(everyone, (pattern,)):
                raise Failed(
                    "InvalidConfig",
                    f"method.full.{field}: {pattern} matches no weight of the model; its names are like "
                    f"{everyone[0]} and {everyone[-1]}",
                )
    learning = {
        weight
        for weight, names in weights.items()
        if (not full.trainable or _matches(names, full.trainable)) and not _matches(names, full.freeze)
    }
    if not learning:
        raise Failed("InvalidConfig", "method.full: every weight is frozen; leave some to learn")
    return learning


def _matches(names: Iterable[str], patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
