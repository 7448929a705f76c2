"""Loads the base model from a folder.

It reads only safetensors files, runs no code that comes with a model, and never uses the network.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from finetune_trainer import model_folder
from finetune_trainer.errors import RunError
from finetune_trainer.kernels import packed_attention, padding
from finetune_trainer.model.quantization import Quantization, disable_repacking


@dataclass(frozen=True)
class LoadedModel:
    """Holds a loaded model. `base` is the Transformers model; `model` is the same or, if it has
    adapters, the PEFT model around it.

    `packing_obstacle` says why examples can't share a row; it is empty if they can. `residuals` are
    the matrices that PiSSA or OLoRA subtracted from the base, by the names of the adapters'
    tensors.
    """

    model: Any
    base: Any
    encoder_decoder: bool
    packing_obstacle: str
    quantized: bool = False
    residuals: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """The number of weights, including adapters."""
        return sum(_size(p) for p in self.model.parameters())

    @property
    def trainable(self) -> int:
        """The number of weights that are trained."""
        return sum(_size(p) for p in self.model.parameters() if p.requires_grad)


def check(folder: Path) -> None:
    """Checks that a folder has a config.json and safetensors weights.

    Raises RunError(ModelInvalid) if it doesn't.
    """
    model_folder.check_files([path.name for path in folder.glob("*") if path.is_file()], "the folder")


def load(
    folder: Path, *, dtype: torch.dtype, longest: int, outline: bool = False, quantized: Quantization | None = None
) -> LoadedModel:
    """Loads the base model in evaluation mode, on the CPU, or quantized where `quantized` says.

    `longest` is the number of tokens in the longest row. With `outline`, the weights stay on
    PyTorch's meta device: the rank receives its shards from another rank. Raises RunError if the
    model can't be used.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    check(folder)
    packed_attention.register()
    missing: list[str] = []
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        encoder_decoder = bool(config.is_encoder_decoder)
        auto = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
        model_class = auto._model_mapping[type(config)]
        usual_attention = bool(getattr(model_class, "_supports_sdpa", True))
        obstacle = _packing_obstacle(config, encoder_decoder, longest, usual_attention)
        options: dict[str, Any] = {} if obstacle else {"attn_implementation": packed_attention.NAME}
        if outline:
            model = _outline(auto, folder, config, dtype, options)
            if quantized:
                quantized.outline(model, dtype)
        elif quantized:
            with quantized.computing():
                model, missing = _with_weights(auto, folder, config, dtype, options | quantized.options(dtype))
        else:
            model, missing = _with_weights(auto, folder, config, dtype, options)
    except (OSError, ValueError, KeyError, json.JSONDecodeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and "memory" in str(error):
            raise
        raise RunError("ModelInvalid", f"model.uri: the model can't be loaded: {_short(error)}") from error
    _check_complete(missing)
    if not encoder_decoder:
        model_folder.check_positions(getattr(config, "max_position_embeddings", None), longest, "dataset")
    disable_repacking(model)
    padding.guard(model, layers(model))
    return LoadedModel(model, model, encoder_decoder, obstacle, quantized is not None)


def check_tokens(loaded: LoadedModel, highest: int) -> None:
    """Checks that `highest`, the largest token id of all rows, has an embedding.

    Raises RunError(ModelInvalid) if it doesn't.
    """
    rows = int(loaded.base.get_input_embeddings().num_embeddings)
    if highest >= rows:
        raise RunError(
            "ModelInvalid",
            f"model.uri: the dataset contains token {highest} of the folder's tokenizer, but the model has only {rows} "
            "embeddings; use the tokenizer that belongs to the model, or resize the embeddings and save both",
        )


def layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Returns the layers of decoder and encoder, identified by the class names that Transformers'
    models declare."""
    names = {name for module in model.modules() for name in (getattr(module, "_no_split_modules", None) or ())}
    return [module for module in model.modules() if type(module).__name__ in names]


def _with_weights(
    auto: Any, folder: Path, config: Any, dtype: torch.dtype, options: dict[str, Any]
) -> tuple[Any, list[str]]:
    """Returns (the model, the names of the tensors that its files lack)."""
    model, info = auto.from_pretrained(
        str(folder),
        config=config,
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    return model, sorted(info["missing_keys"])


def _outline(auto: Any, folder: Path, config: Any, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    from transformers import GenerationConfig

    with torch.device("meta"):
        model = auto.from_config(config, dtype=dtype, trust_remote_code=False, **options)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    return model.eval()


def _check_complete(missing: list[str]) -> None:
    if missing:
        raise RunError(
            "ModelInvalid",
            f"model.uri: the weights lack {len(missing)} tensors that the model needs, such as {missing[0]}; use the "
            "folder of a complete model, not of an adapter",
        )


def _packing_obstacle(config: Any, encoder_decoder: bool, longest: int, usual_attention: bool) -> str:
    """Returns why examples can't share a row in a model with this configuration, or "" if they can.

    What the configuration doesn't reveal is detected when packing is tried on the loaded model.
    """
    if encoder_decoder:
        return "an encoder-decoder reads one example per row"
    if not usual_attention or getattr(config, "attn_logit_softcapping", None):
        return "its attention isn't a plain softmax over scores"
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention"}:
        names = ", ".join(sorted(kinds - {"full_attention", "sliding_attention"}))
        return f"layers of type {names} carry state from token to token"
    window = getattr(config, "sliding_window", None)
    if window is not None and window < longest and (kinds - {"full_attention"} or not kinds):
        return f"the attention window of {window} tokens is shorter than the longest row ({longest})"
    return ""


def _size(parameter: Any) -> int:
    """Returns the number of weights before packing (4-bit weights are stored two to a byte) and
    before partitioning by ZeRO-3."""
    packed = getattr(parameter, "quant_state", None)
    return math.prod(packed.shape) if packed is not None else int(getattr(parameter, "ds_numel", parameter.numel()))


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
