"""Adds LoRA and its variants to a base model with PEFT.

The options are checked against the model first, so that an error about a wrong name lists the names
that exist.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from finetune_api.resource import LoraSpec
from finetune_trainer import refusals
from finetune_trainer.errors import RunError
from finetune_trainer.kernels import fast_dropout
from finetune_trainer.model import added_tokens, experts, families, precision
from finetune_trainer.model.loading import LoadedModel
from finetune_trainer.model.partitioned import shape_of

_OTHER_TARGETS = "name other layers in method.lora.targetModules, or use method.type full"


def adapt(loaded: LoadedModel, lora: LoraSpec, seed: int, token_ids: Sequence[int] = ()) -> LoadedModel:
    """Freezes the base and adds adapters. The embedding rows of `token_ids` are trained too.

    The same seed gives the same adapters on every rank. All trainable parameters are float32.
    Raises RunError if the options don't fit the model.
    """
    if loaded.quantized:
        _with_bitsandbytes()
    with nullcontext() if loaded.quantized else _without_bitsandbytes():
        from peft import LoraConfig, TaskType, get_peft_model

    targets, modules_to_save = list(lora.target_modules), list(lora.modules_to_save)
    without_text = families.parts_without_text(loaded.base)
    _check_targets(loaded.base, targets, without_text)
    _check_modules_to_save(loaded.base, modules_to_save)
    _check_not_quantized(loaded, modules_to_save)
    if lora.init != "default":
        _check_principal(loaded.base, lora)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_target_modules(loaded.base, targets),
        exclude_modules=_pattern(without_text),
        use_rslora=lora.rank_stabilized,
        use_dora=lora.dora,
        init_lora_weights=_init_method(loaded.base, lora),
        bias=lora.bias,
        modules_to_save=modules_to_save or None,
        trainable_token_indices=added_tokens.rows(loaded.base, token_ids),
        ensure_weight_tying=_trains_tied_embedding(loaded.base, modules_to_save),
        fan_in_fan_out=_targets_conv1d(loaded.base, targets),
        task_type=TaskType.SEQ_2_SEQ_LM if loaded.encoder_decoder else TaskType.CAUSAL_LM,
    )
    torch.manual_seed(seed)
    with refusals.raising("InvalidConfig", "method.lora: the model can't be adapted", _OTHER_TARGETS):
        model = get_peft_model(loaded.base, config)
    if not adapted_layers(model):
        raise RunError(
            "InvalidConfig",
            f"method.lora.targetModules: {', '.join(targets)} matches no layer that can be adapted; {_OTHER_TARGETS}",
        )
    _check_biases(model, lora)
    _convert_to_float32(parameter for parameter in model.parameters() if parameter.requires_grad)
    precision.keep_activations(model)
    fast_dropout.replace_modules(model)
    return replace(loaded, model=model, residuals={} if lora.init == "default" else _lora_matrices(model))


def adapted_layers(model: Any) -> list[str]:
    """Returns the names of the layers that have adapters, without the numbers of their layers."""
    return sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if hasattr(module, "lora_A")})


def for_original_base(
    tensors: Mapping[str, Tensor], residuals: Mapping[str, Tensor], config: Any
) -> tuple[dict[str, Tensor], Any]:
    """Converts an adapter trained with PiSSA or OLoRA into one for the base as it was before
    training.

    The result (tensors by PEFT's names, LoraConfig) has rank 2r. Its update is the trained one
    minus the residuals that were subtracted from the base: B A - B0 A0 = (B, -B0) (A; A0). With
    rsLoRA, doubling the rank divides the scale by sqrt(2), so doubling alpha as well makes it too
    large by sqrt(2), and B is divided by that factor.
    """
    factor = math.sqrt(0.5) if config.use_rslora else 1.0
    converted = dict(tensors)
    for name, residual in residuals.items():
        if ".lora_A." in name:
            converted[name] = torch.cat([tensors[name], residual], dim=0)
        else:
            converted[name] = torch.cat([tensors[name], -residual], dim=1) * factor
    config.r, config.lora_alpha, config.init_lora_weights = 2 * config.r, 2 * config.lora_alpha, True
    return converted, config


@contextmanager
def _without_bitsandbytes() -> Iterator[None]:
    """Hides bitsandbytes while PEFT is imported inside, for a base that isn't quantized.

    Otherwise, PEFT would load bitsandbytes, which takes seconds.
    """
    if "bitsandbytes" in sys.modules or "peft" in sys.modules:
        yield
        return
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    try:
        yield
        from peft.import_utils import is_bnb_available

        is_bnb_available()  # caches its result
    finally:
        del sys.modules["bitsandbytes"]


def _with_bitsandbytes() -> None:
    """Makes PEFT look for bitsandbytes again, in case `_without_bitsandbytes` hid it before."""
    from peft.import_utils import is_bnb_4bit_available, is_bnb_available

    is_bnb_available.cache_clear()
    is_bnb_4bit_available.cache_clear()


def _init_method(base: Any, lora: LoraSpec) -> bool | str:
    """Returns PEFT's init_lora_weights. PiSSA uses the fast, randomized decomposition.

    A rank without weights receives the matrices of another rank, so the default suffices for it.
    """
    if any(parameter.is_meta for parameter in base.parameters()):
        return True
    match lora.init:
        case "default":
            return True
        case "pissa":
            return "pissa_niter_16"
        case "olora":
            return "olora"


def _lora_matrices(model: Any) -> dict[str, Tensor]:
    """Returns copies of the adapters' matrices on the CPU, by the names that their files use."""
    return {
        name.replace(".default.", "."): parameter.detach().to("cpu", torch.float32, copy=True)
        for name, parameter in model.named_parameters()
        if (".lora_A." in name or ".lora_B." in name) and not parameter.is_meta
    }


def _check_principal(base: Any, lora: LoraSpec) -> None:
    """Raises RunError if PiSSA or OLoRA can't extract the principal part of a target layer."""
    all_linear = list(lora.target_modules) == ["all-linear"]
    head = base.get_output_embeddings()
    tied = head is not None and head.weight is base.get_input_embeddings().weight
    for name, module in base.named_modules():
        if not _has_matrix(module) or not (all_linear or _matches_any(name, lora.target_modules)):
            continue
        if type(module).__name__ == "Conv1D" and lora.init == "olora":
            raise RunError(
                "InvalidConfig", f"method.lora.init: olora doesn't support layers like {name} (Conv1D); use pissa"
            )
        if module is head and all_linear:
            continue
        if module is head and tied:
            raise RunError(
                "InvalidConfig",
                f"method.lora.init: {lora.init} would take the principal part of {name} out of the embeddings too, "
                "which are tied to it; remove it from method.lora.targetModules",
            )
        if lora.rank > min(shape_of(module.weight)):
            raise RunError(
                "InvalidConfig",
                f"method.lora.rank: {lora.init} takes at most rank {min(shape_of(module.weight))} out of {name}; "
                f"lower the rank, or set method.lora.init to default",
            )


def _convert_to_float32(parameters: Iterable[Any]) -> None:
    """Converts half-precision parameters to float32.

    PEFT's own matrices are float32 already, but copies of the base's modules and its biases have
    the base's format.
    """
    for parameter in parameters:
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def _trains_tied_embedding(base: Any, modules_to_save: list[str]) -> bool:
    """Returns whether the modules to save include an embedding that is tied to the output layer."""
    from peft.utils.constants import EMBEDDING_LAYER_NAMES

    tied = getattr(base.config.get_text_config(), "tie_word_embeddings", False)
    return bool(tied) and any(name.rsplit(".", 1)[-1] in EMBEDDING_LAYER_NAMES for name in modules_to_save)


def _target_modules(base: Any, targets: list[str]) -> str | list[str]:
    if targets != ["all-linear"]:
        return targets
    return experts.linear_layers(base) if experts.find(base).parameters else "all-linear"


def _pattern(parts: Sequence[str]) -> str | None:
    """Returns a regular expression for the names of all modules in these parts."""
    return rf"(?:{'|'.join(map(re.escape, parts))})(?:\..*)?" if parts else None


def _check_targets(base: Any, targets: list[str], without_text: Sequence[str]) -> None:
    if targets == ["all-linear"]:
        return
    excluded = re.compile(_pattern(without_text) or "(?!)")
    known = {name for name, module in base.named_modules() if _has_matrix(module) and not excluded.fullmatch(name)}
    unknown = [target for target in targets if not _matches_name(target, known)]
    taken = [target for target in targets if experts.means_experts(base, target)]
    if taken:
        raise RunError(
            "InvalidConfig",
            f"method.lora.targetModules: {', '.join(taken)} would adapt the experts, which isn't supported; use "
            f"{', '.join(experts.linear_layers(base))}",
        )
    if unknown:
        raise RunError(
            "InvalidConfig",
            f"method.lora.targetModules: the model has no linear layer called {', '.join(unknown)}; it has "
            f"{_short_names(known)} (or use all-linear)",
        )


def _check_modules_to_save(base: Any, modules_to_save: list[str]) -> None:
    known = {name for name, module in base.named_modules() if name and any(True for _ in module.parameters())}
    unknown = [name for name in modules_to_save if not _matches_name(name, known)]
    if unknown:
        outside_layers = {name for name in known if not any(part.isdigit() for part in name.split("."))}
        raise RunError(
            "InvalidConfig",
            f"method.lora.modulesToSave: the model has no module called {', '.join(unknown)}; besides its layers it "
            f"has {_short_names(outside_layers)}",
        )


def _check_not_quantized(loaded: LoadedModel, modules_to_save: list[str]) -> None:
    head = loaded.base.get_output_embeddings()
    for name, module in loaded.base.named_modules():
        if loaded.quantized and _matches_any(name, modules_to_save) and _has_matrix(module) and module is not head:
            raise RunError(
                "InvalidConfig",
                f"method.lora.modulesToSave: {name} is quantized, so it can't be trained; remove it, adapt it by "
                "method.lora.targetModules, or set model.quantization: none",
            )


def _check_biases(model: Any, lora: LoraSpec) -> None:
    if lora.bias == "none" or any(p.requires_grad and name.endswith("bias") for name, p in model.named_parameters()):
        return
    subject = "the model has" if lora.bias == "all" else "the adapted layers have"
    raise RunError("InvalidConfig", f"method.lora.bias: {subject} no bias to train with {lora.bias}; use none")


def _matches_name(target: str, names: Iterable[str]) -> bool:
    """Returns whether one of the module names is `target` or ends with it."""
    return any(name == target or name.endswith(f".{target}") for name in names)


def _matches_any(name: str, targets: Iterable[str]) -> bool:
    return any(_matches_name(target, [name]) for target in targets)


def _short_names(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))


def _has_matrix(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def _targets_conv1d(base: Any, targets: list[str]) -> bool:
    """Returns whether a target layer stores its weight as (in, out)."""
    if targets == ["all-linear"]:
        return any(type(module).__name__ == "Conv1D" for module in base.modules())
    modules = (module for name, module in base.named_modules() if name.rsplit(".", 1)[-1] in targets)
    return any(type(module).__name__ == "Conv1D" for module in modules)
