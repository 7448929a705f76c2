"""Builds the optimizer that a recipe names, over the weights that are trained, and saves and
restores its state by parameter name. This module knows nothing about ranks.

One-dimensional weights (biases, norms) never decay. Muon updates matrices, and AdamW updates the
other weights. Embeddings keep 32-bit moments, since updates of their rare rows would be rounded
away in 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finetune_api.resource import LoraSpec, TrainingSpec
from finetune_trainer.errors import RunError
from finetune_trainer.model.partitioned import shape_of

_UNSHARDABLE = {  # only AdamW updates each value independently
    "adamw_8bit": "keeps its moments in blocks of 256 values of a weight",
    "paged_adamw_8bit": "keeps its moments in blocks of 256 values of a weight",
    "adafactor": "needs the means of full rows and columns",
    "muon": "makes the updates of full matrices orthogonal",
}
_CODE_BOOKS = ("qmap1", "qmap2")  # constants that bitsandbytes adds to the state of every weight


@dataclass(frozen=True)
class OptimizerConfig:
    """Describes how an optimizer updates weights from gradients, except for the learning rate."""

    weight_decay: float
    max_grad_norm: float  # 0 means never clip
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    plus_ratio: float = 1.0  # LoRA+: B's learning rate divided by A's


def optimizer_config(training: TrainingSpec, lora: LoraSpec | None, device: str) -> OptimizerConfig:
    """Returns the configuration of the recipe's optimizer. `device` is cpu or cuda.

    On the CPU, there is no other memory to page to, so the plain optimizer replaces the paged one.
    """
    adam = training.adam
    paged = training.optimizer == "paged_adamw_8bit"
    return OptimizerConfig(
        training.weight_decay,
        training.max_grad_norm,
        "adamw_8bit" if paged and device == "cpu" else training.optimizer,
        (adam.beta1, adam.beta2) if adam else (0.9, 0.999),
        adam.epsilon if adam else 1e-8,
        (lora.plus_ratio if lora else None) or 1.0,
    )


def reason(training: TrainingSpec, config: OptimizerConfig, strategy: str) -> str:
    """Returns in words why this optimizer is used.

    Raises RunError if `strategy` splits what the optimizer needs unsplit.
    """
    if strategy != "ddp" and config.optimizer != "adamw":
        raise RunError(
            "InvalidConfig",
            f"training.optimizer: {training.optimizer} {_UNSHARDABLE[training.optimizer]}, and distribution.strategy "
            f"{strategy} cuts them over the ranks; use strategy ddp, or optimizer adamw",
        )
    reasons = {
        "adamw": "set by training.optimizer",
        "adamw_8bit": "set by training.optimizer; the moments of embeddings and small weights keep 32 bits",
        "paged_adamw_8bit": "set by training.optimizer; its state moves to the host when GPU memory runs short",
        "adafactor": "set by training.optimizer; it keeps second moments by row and column, and no first moment",
        "muon": "set by training.optimizer; adamw updates embeddings, the output layer and vectors",
    }
    text = reasons[config.optimizer]
    if config.optimizer != training.optimizer:
        text = f"{training.optimizer} pages between GPU and host, and this run has no GPU; its result is the same"
    return text if config.plus_ratio == 1 else f"{text}; LoRA's B learns {config.plus_ratio:g} times as fast as A"


class Optimizer:
    """Combines one or two torch optimizers into one. `parameters` are the model's trained
    parameters by name."""

    def __init__(self, model: Any, parameters: Mapping[str, Any], config: OptimizerConfig) -> None:
        self._names = {parameter: name for name, parameter in parameters.items()}
        self._optimizers = _optimizers(model, parameters, config)

    def step(self, rate: float) -> None:
        """Updates the weights with this learning rate."""
        for optimizer in self._optimizers:
            set_rate(optimizer, rate)
            optimizer.step()

    def zero_grad(self) -> None:
        """Drops the gradients."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Returns copies of the state on the CPU, by `<key>/<parameter>`.

        A Python number becomes a 64-bit tensor without dimensions. A parameter that never had a
        gradient has no state.
        """
        return {
            f"{key}/{self._names[parameter]}": _to_tensor(value)
            for optimizer in self._optimizers
            for parameter, entries in optimizer.state.items()
            for key, value in entries.items()
            if key not in _CODE_BOOKS
        }

    def set_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Restores what `state` returned.

        `steps` is the number of steps already taken, in case the state doesn't contain it (ZeRO and
        FSDP don't save it).
        """
        keys: dict[str, list[str]] = {}
        for path in state:
            key, _, name = path.partition("/")
            keys.setdefault(name, []).append(key)
        for optimizer in self._optimizers:
            for group_index, group in enumerate(optimizer.param_groups):
                for index, parameter in enumerate(group["params"]):
                    name = self._names[parameter]
                    if name not in keys:
                        continue
                    saved = {key: state[f"{key}/{name}"] for key in keys[name]}
                    # Only bitsandbytes knows where its paged state is stored.
                    if hasattr(optimizer, "init_state"):
                        optimizer.init_state(group, parameter, group_index, index)
                        _fill(optimizer.state[parameter], saved)
                        continue
                    entries = {key: _from_tensor(value, parameter.device) for key, value in saved.items()}
                    if isinstance(optimizer, torch.optim.AdamW) and "step" not in saved:
                        entries["step"] = torch.tensor(float(steps), device=parameter.device)
                    optimizer.state[parameter] = entries


def set_rate(optimizer: Any, rate: float) -> None:
    """Sets the learning rate of the next step in every parameter group, multiplied by the group's
    rate_ratio."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_ratio"]


def adamw(parameters: Mapping[str, Any], config: OptimizerConfig, *, fused: bool) -> torch.optim.AdamW:
    """Returns torch's AdamW over these parameters. Its learning rate is set by `set_rate`."""
    return torch.optim.AdamW(_groups(parameters, config), lr=0.0, betas=config.betas, eps=config.epsilon, fused=fused)


def _optimizers(model: Any, parameters: Mapping[str, Any], config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Returns the configured optimizer, and AdamW for the weights that it doesn't update."""
    others = _updated_by_adamw(model, parameters, config.optimizer)
    groups = _groups({name: p for name, p in parameters.items() if name not in others}, config)
    optimizers = [_configured(groups, config)] if groups else []
    return [*optimizers, adamw(others, config, fused=True)] if others else optimizers


def _updated_by_adamw(model: Any, parameters: Mapping[str, Any], optimizer: str) -> dict[str, Any]:
    embeddings = {module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    match optimizer:
        case "adamw":
            return dict(parameters)
        case "muon":
            head = model.get_output_embeddings()  # an adapter on it is a matrix like any other
            excluded = embeddings if head is None else {*embeddings, head.weight}
            return {name: p for name, p in parameters.items() if p.dim() != 2 or p in excluded}
        case "adafactor":
            return {}
        case _:
            return {name: p for name, p in parameters.items() if p in embeddings}


def _configured(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Returns the configured optimizer, which is one other than plain AdamW."""
    match config.optimizer:
        case "muon":
            # Its updates have the size of AdamW's, so rates that suit AdamW also suit Muon.
            return torch.optim.Muon(groups, lr=0.0, adjust_lr_fn="match_rms_adamw")
        case "adafactor":
            # Torch's Adafactor would scale the rate by the size of the weights, which is 0 for
            # LoRA's B at the start, and would limit it to 1 / sqrt(step).
            from transformers.optimization import Adafactor

            optimizer: torch.optim.Optimizer = Adafactor(groups, lr=0.0, scale_parameter=False, relative_step=False)
            return optimizer
        case _:
            import bitsandbytes as bnb

            kind = bnb.optim.PagedAdamW8bit if config.optimizer == "paged_adamw_8bit" else bnb.optim.AdamW8bit
            optimizer = kind(groups, lr=0.0, betas=config.betas, eps=config.epsilon)
            return optimizer


def _groups(parameters: Mapping[str, Any], config: OptimizerConfig) -> list[dict[str, Any]]:
    """Returns torch's parameter groups: parameters with the same weight decay and learning rate."""
    kinds: dict[tuple[float, float], list[Any]] = {}
    for name, parameter in parameters.items():
        decay = config.weight_decay if len(shape_of(parameter)) > 1 else 0.0
        ratio = config.plus_ratio if ".lora_B." in name else 1.0
        kinds.setdefault((decay, ratio), []).append(parameter)
    return [
        {"params": members, "weight_decay": decay, "rate_ratio": ratio} for (decay, ratio), members in kinds.items()
    ]


def _to_tensor(value: Any) -> Tensor:
    """Returns a copy of the value on the CPU, in a form that safetensors can store."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)


def _from_tensor(value: Tensor, device: torch.device) -> Any:
    """Reverses `_to_tensor`."""
    is_number = value.dim() == 0 and value.dtype in (torch.int64, torch.float64)
    return value.item() if is_number else value.to(device, copy=True)


def _fill(entries: dict[str, Any], saved: Mapping[str, Tensor]) -> None:
    """Copies saved state into the state that an optimizer has allocated."""
    for key, value in saved.items():
        if isinstance(entries[key], Tensor):
            entries[key].copy_(value)
        else:
            entries[key] = value.item()
