"""Loads the base model from a folder. Called by `assembly` on every rank alike.

Only safetensors are read and no code that ships with a model is run. Never reaches for the network.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from finetune_trainer import documents
from finetune_trainer.failure import Failed

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Quantized:
    """How bitsandbytes keeps a frozen base: nf4 with its constants quantised again, as QLoRA does, or int8."""

    kind: Literal["int8", "nf4"]
    device: torch.device

    def options(self, computed: torch.dtype) -> dict[str, Any]:
        """For from_pretrained, which quantises a weight as soon as it has read it."""
        from transformers import BitsAndBytesConfig

        config = (
            BitsAndBytesConfig(load_in_8bit=True)
            if self.kind == "int8"
            else BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=computed,
            )
        )
        return {"quantization_config": config, "device_map": {"": self.device}}


@dataclass(frozen=True)
class Loaded:
    """`base` is the Transformers model, also inside of `model` where that carries adapters."""

    model: Any
    base: Any
    encoder_decoder: bool
    why_not: str  # examples can't share a row; empty where they can
    quantized: bool = False
    taken_out: Mapping[str, Tensor] = field(default_factory=dict)  # of the base, by the adapters' names (PiSSA, OLoRA)

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


def load(
    folder: Path, *, dtype: torch.dtype, longest: int, outline: bool = False, quantized: Quantized | None = None
) -> Loaded:
    """The base model on the CPU, in evaluation mode. `longest` is the longest row in tokens.

    `quantized`: with linear layers of few bits, on the device that it names. `outline`: without the weights (on
    PyTorch's meta device), for a rank that gets its part from another.
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
                **(quantized.options(dtype) if quantized else {}),
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
    keep_packed(model)
    return Loaded(model, model, encoder_decoder, why_not, quantized is not None)


def keep_packed(model: Any) -> None:
    """On CPUs with fast bfloat16, bitsandbytes lays 4-bit weights out anew at the first evaluation, and rounds their
    scales to bfloat16 for good: training would go on from another base than it began with."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def check_tokens(loaded: Loaded, highest: int) -> None:
    """Raises Failed where rows hold a token that the model has no embedding for: its tokenizer has grown."""
    rows = int(loaded.base.get_input_embeddings().num_embeddings)
    if highest >= rows:
        raise Failed(
            "ModelInvalid",
            f"model.uri: the rows hold token {highest} of the folder's tokenizer, but the model has embeddings for "
            f"{rows} only; give the tokenizer that belongs to it, or resize the embeddings and save both",
        )


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


def _size(parameter: Any) -> int:
    packed = getattr(parameter, "quant_state", None)  # two 4-bit values in a byte
    return math.prod(packed.shape) if packed is not None else int(getattr(parameter, "ds_numel", parameter.numel()))


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
