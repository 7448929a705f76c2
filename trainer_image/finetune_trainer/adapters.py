"""LoRA and its relatives put on a base model by PEFT. Called by `assembly` on every rank alike.

What is asked for is checked against the model first, so that a wrong name is told with the right ones.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from finetune_api.resource import LoraSpec
from finetune_trainer import dropout, vocabulary
from finetune_trainer.failure import Failed
from finetune_trainer.model import Loaded
from finetune_trainer.optimizers import shape_of


def adapt(loaded: Loaded, lora: LoraSpec, seed: int, tokens: Sequence[int] = ()) -> Loaded:
    """With adapters beside a frozen base, in which the rows of `tokens` learn. The same seed gives the same adapters
    on every rank.

    All that learns is float32.
    """
    if loaded.quantized:
        with_bitsandbytes()
    with nullcontext() if loaded.quantized else without_bitsandbytes():
        from peft import LoraConfig, TaskType, get_peft_model

    targets, whole = list(lora.target_modules), list(lora.modules_to_save)
    _check_targets(loaded.base, targets)
    _check_whole(loaded.base, whole)
    _check_not_quantized(loaded.base, whole)
    if lora.init != "default":
        _check_principal(loaded.base, lora)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        use_rslora=lora.rank_stabilized,
        use_dora=lora.dora,
        init_lora_weights=_beginning(loaded.base, lora),
        bias=lora.bias,
        modules_to_save=whole or None,
        trainable_token_indices=vocabulary.rows(loaded.base, tokens),
        ensure_weight_tying=_ties(loaded.base, whole),
        fan_in_fan_out=_is_conv1d(loaded.base, targets),
        task_type=TaskType.SEQ_2_SEQ_LM if loaded.encoder_decoder else TaskType.CAUSAL_LM,
    )
    torch.manual_seed(seed)
    model = get_peft_model(loaded.base, config)
    _check_biases(model, lora)
    _widen(parameter for parameter in model.parameters() if parameter.requires_grad)
    dropout.put_in(model)
    return replace(loaded, model=model, taken_out={} if lora.init == "default" else _matrices(model))


def for_the_base_as_it_was(
    tensors: Mapping[str, Tensor], taken_out: Mapping[str, Tensor], config: Any
) -> tuple[dict[str, Tensor], Any]:
    """The adapter (tensors by PEFT's names, its LoraConfig) of rank 2r whose update is the trained one less what was
    taken out of the base: B A - B0 A0 = (B, -B0) (A; A0).

    Under rsLoRA the scale falls by sqrt(2) with twice the rank; doubling alpha too makes it too large by as much.
    """
    factor = math.sqrt(0.5) if config.use_rslora else 1.0
    whole = dict(tensors)
    for name, before in taken_out.items():
        if ".lora_A." in name:
            whole[name] = torch.cat([tensors[name], before], dim=0)
        else:
            whole[name] = torch.cat([tensors[name], -before], dim=1) * factor
    config.r, config.lora_alpha, config.init_lora_weights = 2 * config.r, 2 * config.lora_alpha, True
    return whole, config


@contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """Around PEFT's first import: it would load bitsandbytes, which takes seconds, for bases that aren't quantised."""
    if "bitsandbytes" in sys.modules or "peft" in sys.modules:
        yield
        return
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    try:
        yield
        from peft.import_utils import is_bnb_available

        is_bnb_available()  # remembers what it says
    finally:
        del sys.modules["bitsandbytes"]


def with_bitsandbytes() -> None:
    """PEFT looks again, where it was told before that there is none."""
    from peft.import_utils import is_bnb_4bit_available, is_bnb_available

    is_bnb_available.cache_clear()
    is_bnb_4bit_available.cache_clear()


def _beginning(base: Any, lora: LoraSpec) -> bool | str:
    """PiSSA's decomposition is the fast, randomised one. A rank without weights gets another's matrices anyway."""
    if any(parameter.is_meta for parameter in base.parameters()):
        return True
    match lora.init:
        case "default":
            return True
        case "pissa":
            return "pissa_niter_16"
        case "olora":
            return "olora"


def _matrices(model: Any) -> dict[str, Tensor]:
    """By the names under which they are written."""
    return {
        name.replace(".default.", "."): parameter.detach().to("cpu", torch.float32, copy=True)
        for name, parameter in model.named_parameters()
        if (".lora_A." in name or ".lora_B." in name) and not parameter.is_meta
    }


def _check_principal(base: Any, lora: LoraSpec) -> None:
    """What PiSSA and OLoRA can't take the principal part of."""
    everything = list(lora.target_modules) == ["all-linear"]
    head = base.get_output_embeddings()
    tied = head is not None and head.weight is base.get_input_embeddings().weight
    for name, module in base.named_modules():
        if not _has_matrix(module) or not (everything or _called_one_of(name, lora.target_modules)):
            continue
        if type(module).__name__ == "Conv1D" and lora.init == "olora":
            raise Failed("InvalidConfig", f"method.lora.init: olora can't read layers like {name} (Conv1D); use pissa")
        if module is head and everything:
            continue
        if module is head and tied:
            raise Failed(
                "InvalidConfig",
                f"method.lora.init: {lora.init} would take the principal part of {name} out of the embeddings too, "
                "which are tied to it; leave it out of targetModules",
            )
        if lora.rank > min(shape_of(module.weight)):
            raise Failed(
                "InvalidConfig",
                f"method.lora.rank: {lora.init} takes at most rank {min(shape_of(module.weight))} out of {name}; "
                f"lower the rank, or use init default",
            )


def _widen(parameters: Iterable[Any]) -> None:
    """PEFT makes its own matrices float32; copies of the base's modules and its biases are in the base's format."""
    for parameter in parameters:
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def _ties(base: Any, whole: list[str]) -> bool:
    """Whether an embedding is to be trained whole that is the output layer too."""
    from peft.utils.constants import EMBEDDING_LAYER_NAMES

    tied = getattr(base.config.get_text_config(), "tie_word_embeddings", False)
    return bool(tied) and any(name.rsplit(".", 1)[-1] in EMBEDDING_LAYER_NAMES for name in whole)


def _check_targets(base: Any, targets: list[str]) -> None:
    if targets == ["all-linear"]:
        return
    known = {name for name, module in base.named_modules() if _has_matrix(module)}
    unknown = [target for target in targets if not _called(target, known)]
    if unknown:
        raise Failed(
            "InvalidConfig",
            f"method.lora.targetModules: the model has no linear layer called {', '.join(unknown)}; it has "
            f"{_short_names(known)} (or give all-linear)",
        )


def _check_whole(base: Any, whole: list[str]) -> None:
    known = {name for name, module in base.named_modules() if name and any(True for _ in module.parameters())}
    unknown = [name for name in whole if not _called(name, known)]
    if unknown:
        own = {name for name in known if not any(part.isdigit() for part in name.split("."))}
        raise Failed(
            "InvalidConfig",
            f"method.lora.modulesToSave: the model has no module called {', '.join(unknown)}; beside its layers it "
            f"has {_short_names(own)}",
        )


def _check_not_quantized(base: Any, whole: list[str]) -> None:
    for name, module in base.named_modules():
        if _called_one_of(name, whole) and any(not p.is_floating_point() for p in module.parameters()):
            raise Failed(
                "InvalidConfig",
                f"method.lora.modulesToSave: {name} is quantised, so it can't learn; leave it out, adapt it by "
                "targetModules, or use model.quantization none",
            )


def _check_biases(model: Any, lora: LoraSpec) -> None:
    if lora.bias == "none" or any(p.requires_grad and name.endswith("bias") for name, p in model.named_parameters()):
        return
    where = "the model" if lora.bias == "all" else "of the layers that are adapted, none"
    raise Failed("InvalidConfig", f"method.lora.bias: {where} has no bias to train with {lora.bias}; use none")


def _called(target: str, names: Iterable[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for name in names)


def _called_one_of(name: str, targets: Iterable[str]) -> bool:
    return any(_called(target, [name]) for target in targets)


def _short_names(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))


def _has_matrix(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def _is_conv1d(base: Any, targets: list[str]) -> bool:
    if targets == ["all-linear"]:
        return any(type(module).__name__ == "Conv1D" for module in base.modules())
    chosen = (module for name, module in base.named_modules() if name.rsplit(".", 1)[-1] in targets)
    return any(type(module).__name__ == "Conv1D" for module in chosen)
