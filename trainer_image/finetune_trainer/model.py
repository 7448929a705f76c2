"""Loads the base model from a folder and puts LoRA adapters on it. Called by `rank` on every rank alike.

Only safetensors are read and no code that ships with a model is run. Never reaches for the network.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from finetune_api.resource import LoraSpec
from finetune_trainer import documents, dropout
from finetune_trainer.failure import Failed

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Loaded:
    """`base` is the Transformers model, also inside of `model` where that carries adapters."""

    model: Any
    base: Any
    encoder_decoder: bool
    why_not: str  # examples can't share a row; empty where they can

    @property
    def parameters(self) -> int:
        return sum(_size(p) for p in self.model.parameters())

    @property
    def trainable(self) -> int:
        return sum(_size(p) for p in self.model.parameters() if p.requires_grad)


def check(folder: Path) -> None:
    """Raises Failed ModelInvalid unless the folder looks like a model whose weights are safetensors."""
    if not (folder / "config.json").is_file():
        raise Failed("ModelInvalid", "model.uri: the folder has no config.json, so it isn't a Transformers model")
    weights = sorted(path.name for path in folder.glob("*.safetensors"))
    if not weights:
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        found = f"only {', '.join(pickles)}, which are pickles and never loaded" if pickles else "no weights"
        raise Failed("ModelInvalid", f"model.uri: the folder holds {found}; convert them to *.safetensors")


def load(folder: Path, *, dtype: torch.dtype, longest: int, outline: bool = False) -> Loaded:
    """The base model on the CPU, in evaluation mode. `longest` is the longest row in tokens.

    `outline`: without the weights (on PyTorch's meta device), for a rank that gets its part from another.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    check(folder)
    documents.register()
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        encoder_decoder = bool(config.is_encoder_decoder)
        auto = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
        kind = auto._model_mapping[type(config)]
        why_not = _why_not_packed(config, encoder_decoder, longest, bool(getattr(kind, "_supports_sdpa", True)))
        attention = {} if why_not else {"attn_implementation": documents.NAME}
        if outline:
            model, missing = _outline(auto, folder, config, dtype, attention), []
        else:
            model, info = auto.from_pretrained(
                str(folder),
                config=config,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **attention,
            )
            missing = sorted(info["missing_keys"])
    except (OSError, ValueError, KeyError, json.JSONDecodeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and "memory" in str(error):
            raise
        raise Failed("ModelInvalid", f"model.uri: the model can't be loaded: {_short(error)}") from error
    if missing:
        raise Failed(
            "ModelInvalid",
            f"model.uri: the weights lack {len(missing)} tensors that the model needs, e.g. {missing[0]}; is it the "
            "folder of a whole model (not of an adapter)?",
        )
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and longest > limit and not encoder_decoder:
        raise Failed(
            "InvalidConfig",
            f"dataset.maxSequenceLength: the longest row has {longest} tokens, but the model has {limit} positions; "
            f"set it to {limit}",
        )
    return Loaded(model, model, encoder_decoder, why_not)


def check_tokens(loaded: Loaded, highest: int) -> None:
    """Raises Failed where rows hold a token that the model has no embedding for: its tokenizer has grown."""
    rows = int(loaded.base.get_input_embeddings().num_embeddings)
    if highest >= rows:
        raise Failed(
            "ModelInvalid",
            f"model.uri: the rows hold token {highest} of the folder's tokenizer, but the model has embeddings for "
            f"{rows} only; give the tokenizer that belongs to it, or resize the embeddings and save both",
        )


def adapt(loaded: Loaded, lora: LoraSpec, seed: int) -> Loaded:
    """With adapters of float32 beside a frozen base. The same seed gives the same adapters on every rank."""
    with without_bitsandbytes():
        from peft import LoraConfig, TaskType, get_peft_model

    targets = list(lora.target_modules)
    _check_targets(loaded.base, targets)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        bias="none",
        fan_in_fan_out=_is_conv1d(loaded.base, targets),
        task_type=TaskType.SEQ_2_SEQ_LM if loaded.encoder_decoder else TaskType.CAUSAL_LM,
    )
    torch.manual_seed(seed)
    model = get_peft_model(loaded.base, config)
    dropout.put_in(model)
    return Loaded(model, loaded.base, loaded.encoder_decoder, loaded.why_not)


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


def unfreeze(loaded: Loaded) -> Loaded:
    """For full training: every weight learns."""
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(True)
    return loaded


def recompute(loaded: Loaded) -> None:
    """A layer's activations are computed again in the backward pass, with the same dropout, instead of kept."""
    if not loaded.base.supports_gradient_checkpointing:
        raise Failed(
            "InvalidConfig",
            f"training.activationCheckpointing: {type(loaded.base).__name__} can't compute activations again; set it "
            "to never, with more memory, more processes under fsdp or a smaller dataset.maxSequenceLength",
        )
    loaded.base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


def _outline(auto: Any, folder: Path, config: Any, dtype: torch.dtype, attention: dict[str, str]) -> Any:
    from transformers import GenerationConfig

    with torch.device("meta"):
        model = auto.from_config(config, dtype=dtype, trust_remote_code=False, **attention)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    return model.eval()


def layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The decoder's (and encoder's) layers, by the names that Transformers' classes give themselves."""
    names = {name for module in model.modules() for name in (getattr(module, "_no_split_modules", None) or ())}
    return [module for module in model.modules() if type(module).__name__ in names]


def _why_not_packed(config: Any, encoder_decoder: bool, longest: int, usual_attention: bool) -> str:
    """Why examples can't share a row in this family, or nothing. `packing` finds the rest by trying."""
    if encoder_decoder:
        return "an encoder-decoder reads one example a row"
    if not usual_attention or getattr(config, "attn_logit_softcapping", None):
        return "its attention isn't a plain softmax over scores"
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention"}:
        return f"layers of kind {', '.join(sorted(kinds - {'full_attention', 'sliding_attention'}))} carry state along"
    window = getattr(config, "sliding_window", None)
    if window is not None and window < longest and (kinds - {"full_attention"} or not kinds):
        return f"the attention window of {window} tokens is shorter than the longest row ({longest})"
    return ""


def _check_targets(base: Any, targets: list[str]) -> None:
    if targets == ["all-linear"]:
        return
    linear = {name.rsplit(".", 1)[-1] for name, module in base.named_modules() if _has_matrix(module)}
    unknown = [
        target
        for target in targets
        if not any(name == target or name.endswith(f".{target}") for name, m in base.named_modules() if _has_matrix(m))
    ]
    if unknown:
        raise Failed(
            "InvalidConfig",
            f"method.lora.targetModules: the model has no linear layer called {', '.join(unknown)}; it has "
            f"{', '.join(sorted(linear))} (or give all-linear)",
        )


def _has_matrix(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def _is_conv1d(base: Any, targets: list[str]) -> bool:
    chosen = (m for name, m in base.named_modules() if name.rsplit(".", 1)[-1] in targets)
    return any(type(module).__name__ == "Conv1D" for module in chosen)


def _size(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
