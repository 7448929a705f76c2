"""Loads the base model from a folder.

It reads only safetensors files, runs no code that comes with a model, and never uses the network.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune_trainer import model_folder, refusals, safetensors_header
from finetune_trainer.kernels import packed_attention, padding
from finetune_trainer.model import families
from finetune_trainer.model.check import weights
from finetune_trainer.model.quantization import Quantization, disable_repacking

_AS_PUBLISHED = "compare the folder with the one that was published"


@dataclass(frozen=True)
class LoadedModel:
    """Holds a loaded model. `base` is the Transformers model; `model` is the same or, if it has
    adapters, the PEFT model around it.

    `packing_obstacle` says why examples can't share a row; it is empty if they can. `window` is the
    attention window of its layers if it is shorter than the longest row, and otherwise 0.
    `residuals` are the matrices that PiSSA or OLoRA subtracted from the base, by the names of the
    adapters' tensors. If `mapped`, the base's weights are views of mapped files, in the number
    format of the files.
    """

    model: Any
    base: Any
    encoder_decoder: bool
    packing_obstacle: str
    quantized: bool = False
    mapped: bool = False
    residuals: Mapping[str, Tensor] = field(default_factory=dict)
    window: int = 0

    @property
    def parameters(self) -> int:
        """The number of weights, including adapters."""
        return sum(_size(p) for p in self.model.parameters())

    @property
    def trainable(self) -> int:
        """The number of weights that are trained."""
        return sum(_size(p) for p in self.model.parameters() if p.requires_grad)


def check(folder: Path) -> None:
    """Checks that a folder has a config.json and safetensors weights, and that its JSON files can
    be those of a model.

    Raises RunError(ModelInvalid) if it doesn't.
    """
    names = [path.name for path in folder.glob("*") if path.is_file()]
    model_folder.check_files(names, "the folder")
    model_folder.check_contents(folder, "the folder")
    index = folder / model_folder.WEIGHTS_INDEX
    for name in model_folder.weight_files(names, index.read_bytes() if index.is_file() else None, "the folder"):
        safetensors_header.check_formats(name, safetensors_header.read(folder / name)[1])


def load(
    folder: Path,
    *,
    dtype: torch.dtype,
    longest: int,
    outline: bool = False,
    headers_only: bool = False,
    mapped: bool = False,
    quantized: Quantization | None = None,
) -> LoadedModel:
    """Loads the base model in evaluation mode, on the CPU, or quantized where `quantized` says.

    `longest` is the number of tokens in the longest row. With `outline`, the weights stay on
    PyTorch's meta device: the rank receives its shards from another rank. With `headers_only`, they
    do too, but the names and shapes in the files are compared with those of the model. With
    `mapped`, weights stay in the number format of their files, so that nothing is copied. Raises
    RunError if the model can't be used.
    """
    check(folder)
    packed_attention.register()
    config = families.read_config(folder)
    encoder_decoder = bool(config.is_encoder_decoder)
    auto, model_class = families.auto_class(config)
    name = packed_attention.name_for(model_class)
    obstacle = _packing_obstacle(config, encoder_decoder, name)
    config._attn_implementation = None  # a configuration could name code that is downloaded
    options: dict[str, Any] = {} if obstacle else {"attn_implementation": name}
    loading_info: Mapping[str, Any] = {}
    with refusals.raising("ModelInvalid", "model.uri: the model can't be loaded", _AS_PUBLISHED, config.to_dict()):
        if outline:
            model = _outline(auto, folder, config, dtype, options)
            if quantized:
                quantized.outline(model, dtype)
        elif headers_only:
            options["device_map"] = {"": "meta"}
            model, loading_info = _with_weights(auto, folder, config, dtype, options)
        elif quantized:
            with quantized.computing():
                model, loading_info = _with_weights(auto, folder, config, dtype, options | quantized.options(dtype))
        else:
            with _as_stored() if mapped else nullcontext():
                model, loading_info = _with_weights(auto, folder, config, dtype, options)
    weights.check(loading_info, model)
    if not encoder_decoder:
        model_folder.check_positions(families.position_limits(config)[1], longest, "dataset")
    disable_repacking(model)
    padding.guard(model, layers(model))
    window = families.short_window(config, longest)
    return LoadedModel(model, model, encoder_decoder, obstacle, quantized is not None, mapped, window=window)


def layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Returns the layers of decoder and encoder, identified by the class names that Transformers'
    models declare."""
    names = {name for module in model.modules() for name in (getattr(module, "_no_split_modules", None) or ())}
    return [module for module in model.modules() if type(module).__name__ in names]


def _with_weights(
    auto: Any, folder: Path, config: Any, dtype: torch.dtype, options: dict[str, Any]
) -> tuple[Any, Mapping[str, Any]]:
    """Returns (the model, what Transformers says of its tensors)."""
    model, info = auto.from_pretrained(
        str(folder),
        config=config,
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # check.weights refuses them, by their names
        **options,
    )
    return model, info


@contextmanager
def _as_stored() -> Iterator[None]:
    """Makes Transformers keep the weights that it loads inside as they are stored: views of mapped
    files. Everything else is as in a model of the requested number format."""
    from transformers import core_model_loading

    convert = core_model_loading._materialize_copy

    def view(tensor: Any, device: Any = None, dtype: Any = None) -> Tensor:
        stored: Tensor = convert(tensor, device)
        return stored

    core_model_loading._materialize_copy = view
    try:
        yield
    finally:
        core_model_loading._materialize_copy = convert


def _outline(auto: Any, folder: Path, config: Any, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    from transformers import GenerationConfig

    with torch.device("meta"):
        model = auto.from_config(config, dtype=dtype, trust_remote_code=False, **options)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    return model.eval()


def _packing_obstacle(config: Any, encoder_decoder: bool, attention: str) -> str:
    """Returns why examples can't share a row in a model with this configuration, or "" if they can.

    `attention` is the name of the attention that supports packed rows in it, or empty. What the
    configuration doesn't reveal is detected when packing is tried on the loaded model.
    """
    if encoder_decoder:
        return "an encoder-decoder reads one example per row"
    if not attention:
        return "its attention can't be replaced"
    kinds = families.layer_kinds(config)
    if kinds - {"full_attention", "sliding_attention"}:
        names = ", ".join(sorted(kinds - {"full_attention", "sliding_attention"}))
        return f"layers of type {names} carry state from token to token"
    return ""


def _size(parameter: Any) -> int:
    """Returns the number of weights before packing (4-bit weights are stored two to a byte) and
    before partitioning by ZeRO-3."""
    packed = getattr(parameter, "quant_state", None)
    return math.prod(packed.shape) if packed is not None else int(getattr(parameter, "ds_numel", parameter.numel()))
