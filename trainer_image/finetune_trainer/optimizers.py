"""Optimizers: the one that a recipe names, over the weights that learn, with its state in and out by parameter name.

Called by `assembly` (which one, and why) and by the learners, who hold it. Knows no ranks. Which optimizer takes which
weights: one-dimensional weights (biases, norms) never decay; Muon takes matrices and AdamW the rest; embeddings keep
32-bit moments, since their rare rows would be rounded away in 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finetune_api.resource import LoraSpec, TrainingSpec
from finetune_trainer.failure import Failed

_WHOLE = {  # AdamW alone computes each value by itself
    "adamw_8bit": "keeps its moments in blocks of 256 of a weight's values",
    "paged_adamw_8bit": "keeps its moments in blocks of 256 of a weight's values",
    "adafactor": "needs the means of whole rows and columns",
    "muon": "makes the updates of whole matrices orthogonal",
}
_SHARED = ("qmap1", "qmap2")  # bitsandbytes' code books: constants that it puts into every weight's state


@dataclass(frozen=True)
class Recipe:
    """How weights follow from gradients, but for the rate."""

    weight_decay: float
    max_grad_norm: float  # 0 means never clip
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    plus_ratio: float = 1.0  # LoRA+: B's learning rate over A's


def recipe(training: TrainingSpec, lora: LoraSpec | None, device: str) -> Recipe:
    """`device` is cpu or cuda. On the CPU there is nothing to page to, so the paged optimizer is the plain one."""
    adam = training.adam
    paged = training.optimizer == "paged_adamw_8bit"
    return Recipe(
        training.weight_decay,
        training.max_grad_norm,
        "adamw_8bit" if paged and device == "cpu" else training.optimizer,
        (adam.beta1, adam.beta2) if adam else (0.9, 0.999),
        adam.epsilon if adam else 1e-8,
        (lora.plus_ratio if lora else None) or 1.0,
    )


def reason(training: TrainingSpec, chosen: Recipe, strategy: str) -> str:
    """Why the recipe's optimizer is what it is, in words. Raises Failed where `strategy` can't carry it."""
    if strategy != "ddp" and chosen.optimizer != "adamw":
        raise Failed(
            "InvalidConfig",
            f"training.optimizer: {training.optimizer} {_WHOLE[training.optimizer]}, and distribution.strategy "
            f"{strategy} cuts them over the ranks; use strategy ddp, or optimizer adamw",
        )
    words = {
        "adamw": "training.optimizer says so",
        "adamw_8bit": "training.optimizer says so; embeddings and small weights keep 32 bits",
        "paged_adamw_8bit": "training.optimizer says so; its state moves to the host where GPU memory runs short",
        "adafactor": "training.optimizer says so; second moments by row and column, no first moment",
        "muon": "training.optimizer says so; embeddings, the output layer and vectors are adamw's",
    }
    said = words[chosen.optimizer]
    if chosen.optimizer != training.optimizer:
        said = f"{training.optimizer} pages between GPU and host, and this run has no GPU; its result is the same"
    return said if chosen.plus_ratio == 1 else f"{said}; LoRA's B learns {chosen.plus_ratio:g} times as fast as A"


class Optimizer:
    """One or two torch optimizers that act as one. `parameters` are the model's trained ones by name."""

    def __init__(self, model: Any, parameters: Mapping[str, Any], recipe: Recipe) -> None:
        self._names = {parameter: name for name, parameter in parameters.items()}
        self._parts = _parts(model, parameters, recipe)

    def step(self, rate: float) -> None:
        for part in self._parts:
            set_rate(part, rate)
            part.step()

    def forget(self) -> None:
        """The gradients."""
        for part in self._parts:
            part.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Copies on the CPU, as `<what>/<parameter>`. A Python number becomes a 64-bit tensor without dimensions.

        A parameter that never had a gradient has none.
        """
        return {
            f"{key}/{self._names[parameter]}": _stored(value)
            for part in self._parts
            for parameter, own in part.state.items()
            for key, value in own.items()
            if key not in _SHARED
        }

    def set_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        """`steps` counts where the state doesn't say how many steps it had (it comes from a strategy that splits)."""
        keys: dict[str, list[str]] = {}
        for path in state:
            key, _, name = path.partition("/")
            keys.setdefault(name, []).append(key)
        for part in self._parts:
            for at, group in enumerate(part.param_groups):
                for index, parameter in enumerate(group["params"]):
                    name = self._names[parameter]
                    if name not in keys:
                        continue
                    own = {key: state[f"{key}/{name}"] for key in keys[name]}
                    if hasattr(part, "init_state"):  # bitsandbytes: it knows where paged state lies
                        part.init_state(group, parameter, at, index)
                        _fill(part.state[parameter], own)
                        continue
                    part.state[parameter] = {key: _restored(value, parameter.device) for key, value in own.items()}
                    if isinstance(part, torch.optim.AdamW) and "step" not in own:
                        part.state[parameter]["step"] = torch.tensor(float(steps), device=parameter.device)


def set_rate(optimizer: Any, rate: float) -> None:
    """Writes the learning rate of the next step into every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_ratio"]


def adamw(parameters: Mapping[str, Any], recipe: Recipe, *, fused: bool) -> torch.optim.AdamW:
    return torch.optim.AdamW(_groups(parameters, recipe), lr=0.0, betas=recipe.betas, eps=recipe.epsilon, fused=fused)


def _parts(model: Any, parameters: Mapping[str, Any], recipe: Recipe) -> list[torch.optim.Optimizer]:
    """The optimizer that was asked for, and AdamW for the weights that aren't for it."""
    left = _left_to_adamw(model, parameters, recipe.optimizer)
    main = _groups({name: p for name, p in parameters.items() if name not in left}, recipe)
    parts = [_main(main, recipe)] if main else []
    return [*parts, adamw(left, recipe, fused=True)] if left else parts


def _left_to_adamw(model: Any, parameters: Mapping[str, Any], optimizer: str) -> dict[str, Any]:
    embeddings = {module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    match optimizer:
        case "adamw":
            return dict(parameters)
        case "muon":
            head = model.get_output_embeddings()  # an adapter on it is a matrix like others
            apart = embeddings if head is None else {*embeddings, head.weight}
            return {name: p for name, p in parameters.items() if p.dim() != 2 or p in apart}
        case "adafactor":
            return {}
        case _:
            return {name: p for name, p in parameters.items() if p in embeddings}


def _main(groups: list[dict[str, Any]], recipe: Recipe) -> torch.optim.Optimizer:
    """All but AdamW."""
    match recipe.optimizer:
        case "muon":
            # Its update is scaled to the size of AdamW's, so the rates that one knows for AdamW are right for it.
            return torch.optim.Muon(groups, lr=0.0, adjust_lr_fn="match_rms_adamw")
        case "adafactor":
            # Transformers' one: torch's scales the rate by the weights' size, which is 0 for LoRA's B at the start,
            # and caps it by 1 / sqrt(step).
            from transformers.optimization import Adafactor

            made: torch.optim.Optimizer = Adafactor(groups, lr=0.0, scale_parameter=False, relative_step=False)
            return made
        case _:
            import bitsandbytes as bnb

            kind = bnb.optim.PagedAdamW8bit if recipe.optimizer == "paged_adamw_8bit" else bnb.optim.AdamW8bit
            made = kind(groups, lr=0.0, betas=recipe.betas, eps=recipe.epsilon)
            return made


def _groups(parameters: Mapping[str, Any], recipe: Recipe) -> list[dict[str, Any]]:
    """By decay and rate."""
    kinds: dict[tuple[float, float], list[Any]] = {}
    for name, parameter in parameters.items():
        decay = recipe.weight_decay if len(shape_of(parameter)) > 1 else 0.0
        ratio = recipe.plus_ratio if ".lora_B." in name else 1.0
        kinds.setdefault((decay, ratio), []).append(parameter)
    return [
        {"params": members, "weight_decay": decay, "rate_ratio": ratio} for (decay, ratio), members in kinds.items()
    ]


def shape_of(parameter: Any) -> Any:
    return getattr(parameter, "ds_shape", parameter.shape)


def _stored(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)


def _restored(value: Tensor, device: torch.device) -> Any:
    is_number = value.dim() == 0 and value.dtype in (torch.int64, torch.float64)
    return value.item() if is_number else value.to(device, copy=True)


def _fill(own: dict[str, Any], saved: Mapping[str, Tensor]) -> None:
    for key, value in saved.items():
        if isinstance(own[key], Tensor):
            own[key].copy_(value)
        else:
            own[key] = value.item()
