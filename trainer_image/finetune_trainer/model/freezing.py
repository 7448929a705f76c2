"""Selects the weights that full fine-tuning trains, by patterns for their names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from finetune_api.resource import FullSpec
from finetune_trainer.errors import RunError
from finetune_trainer.model import families

if TYPE_CHECKING:
    from finetune_trainer.model.loading import LoadedModel  # imports torch


def unfreeze(loaded: LoadedModel, full: FullSpec | None = None) -> LoadedModel:
    """Makes every weight trainable, or only those that `full` selects. A tied weight matches by any
    of its names. The parts that no text passes through stay frozen.

    Raises RunError(InvalidConfig) if a pattern matches no weight, or if no weight would be trained.
    """
    names: dict[int, list[str]] = {}
    parameters = {id(parameter): parameter for parameter in loaded.model.parameters()}
    for name, parameter in loaded.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    trainable = trainable_names({aliases[0]: aliases for aliases in names.values()}, full)
    excluded = tuple(f"{part}." for part in families.parts_without_text(loaded.base))
    trainable -= {aliases[0] for aliases in names.values() if aliases[0].startswith(excluded)}
    if not trainable:
        raise RunError("InvalidConfig", "method.full: only parts that no text passes through would be trained")
    for key, parameter in parameters.items():
        parameter.requires_grad_(names[key][0] in trainable)
    return loaded


def trainable_names(weights: Mapping[str, Iterable[str]], full: FullSpec | None) -> set[str]:
    """Returns the keys of `weights` that are trained. Each value has all names of the weight.

    Raises RunError(InvalidConfig) in the same cases as `unfreeze`.
    """
    if full is None:
        return set(weights)
    all_names = [name for names in weights.values() for name in names]
    for field, patterns in (("trainable", full.trainable), ("freeze", full.freeze)):
        for pattern in patterns:
            if not _matches(all_names, (pattern,)):
                raise RunError(
                    "InvalidConfig",
                    f"method.full.{field}: {pattern} matches no weight of the model; its names are like "
                    f"{all_names[0]} and {all_names[-1]}",
                )
    trainable = {
        weight
        for weight, names in weights.items()
        if (not full.trainable or _matches(names, full.trainable)) and not _matches(names, full.freeze)
    }
    if not trainable:
        raise RunError("InvalidConfig", "method.full: every weight is frozen; leave some weights to train")
    return trainable


def _matches(names: Iterable[str], patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
