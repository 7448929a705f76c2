"""Writes the result in the form that PEFT, Transformers and vLLM load: weights, configuration,
tokenizer and model card.

Only rank 0 writes. Nothing is requested from a model hub.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune_api.messages.run import RunConfig
from finetune_trainer.data import tokenizer
from finetune_trainer.errors import RunError
from finetune_trainer.model import lora
from finetune_trainer.model.loading import LoadedModel
from finetune_trainer.model.result import adapter_merge, weight_files
from finetune_trainer.model.result.weight_files import Gather

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "spiece.model", "chat_template.jinja",
)  # fmt: skip


def write(folder: Path, loaded: LoadedModel, gather: Gather, *, run: RunConfig, model: Path, card: str) -> None:
    """Writes the result to `folder`, which appears only when it is complete. Only rank 0 calls it,
    while the other ranks call `send`.

    `gather` returns a weight of the model that is trained; `model` is the base's folder. Raises
    RuntimeError if there are no weights or one is empty, and RunError(ResultMismatch) if a written
    adapter reads back differently.
    """
    partial = folder.with_name(f"{folder.name}.tmp")
    for old in (partial, folder):
        shutil.rmtree(old, ignore_errors=True)
    partial.mkdir(parents=True)
    if run.method == "lora":
        _write_adapter(partial, loaded, _trained_weights(loaded, gather), base_name(run))
    else:
        _write_model(partial, loaded, gather, model)
    for name in _TOKENIZER_FILES:
        if (model / name).is_file():
            shutil.copyfile(model / name, partial / name)
    if run.added_tokens:
        tokenizer.load(model, run.added_tokens).save_pretrained(str(partial))
    template = tokenizer.chat_template(model, run.data.chat_template)
    if template is not None:  # it takes precedence over the one in tokenizer_config.json
        (partial / "chat_template.jinja").write_text(template)
    (partial / "README.md").write_text(card)
    os.replace(partial, folder)


def send(loaded: LoadedModel, gather: Gather, *, run: RunConfig, model: Path) -> None:
    """Takes part in gathering what rank 0 writes with `write`."""
    if run.method == "full":
        weight_files.send(loaded.base, gather, stored_dtype(model))
        return
    for name, parameter in loaded.model.named_parameters():
        if parameter.requires_grad:
            gather(name, torch.float32)


def write_merged(folder: Path, model: Path, *, card: str, heartbeat: Callable[[], None]) -> None:
    """Writes base and adapter as one model to a folder inside `folder`, which already contains the
    adapter."""
    partial = folder.with_name(f"{folder.name}-{adapter_merge.FOLDER}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    adapter_merge.write(partial, model, folder, heartbeat)
    (partial / "README.md").write_text(card)
    os.replace(partial, folder / adapter_merge.FOLDER)


def base_name(run: RunConfig) -> str:
    """Returns the value of `base_model_name_or_path`: the id of a model on the hub, or the location
    as the user wrote it."""
    return run.model.location.display.removeprefix("hf://")


def _write_adapter(folder: Path, loaded: LoadedModel, weights: Mapping[str, Tensor], base: str) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    tensors = get_peft_model_state_dict(
        loaded.model, state_dict=_under_every_name(loaded.model, weights), save_embedding_layers=False
    )
    config = copy.deepcopy(loaded.model.peft_config["default"])
    if loaded.residuals:
        tensors, config = lora.for_original_base(tensors, loaded.residuals, config)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    file = folder / "adapter_model.safetensors"
    save_file(contiguous, file, metadata={"format": "pt"})
    _check_written(file, contiguous)
    config.base_model_name_or_path = base
    config.inference_mode = True
    for field in ("target_modules", "modules_to_save"):  # a set's order differs between processes
        if isinstance(getattr(config, field), set):
            setattr(config, field, sorted(getattr(config, field)))
    config.save_pretrained(str(folder))


def _check_written(file: Path, expected: Mapping[str, Tensor]) -> None:
    from safetensors.torch import load_file

    written = load_file(str(file))
    wrong = [name for name, tensor in expected.items() if name not in written or not torch.equal(written[name], tensor)]
    if wrong or len(written) != len(expected):
        raise RunError(
            "ResultMismatch", f"{file.name} reads back differently: {', '.join(wrong[:3]) or 'too many tensors'}"
        )


def _under_every_name(model: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights, with a copy under each additional name of a tied weight, since PEFT
    looks for all of them."""
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    return {
        name: weights[known] if name == known else weights[known].clone()
        for names in aliases.values()
        for known in names
        if known in weights
        for name in names
    }


def _trained_weights(loaded: LoadedModel, gather: Gather) -> dict[str, Tensor]:
    """Returns the trained weights in float32, by the model's parameter names."""
    names = [name for name, parameter in loaded.model.named_parameters() if parameter.requires_grad]
    weights = {name: tensor for name in names if (tensor := gather(name, torch.float32)) is not None}
    empty = [name for name in names if name not in weights or weights[name].numel() == 0]
    if empty or not weights:
        raise RuntimeError(f"refusing to write empty weights ({', '.join(empty[:3]) or 'none at all'})")
    return weights


def _write_model(folder: Path, loaded: LoadedModel, gather: Gather, base: Path) -> None:
    """Writes the full model in the number format of the base's files."""
    dtype = stored_dtype(base)
    config = copy.deepcopy(loaded.base.config)
    config.dtype = dtype
    config._attn_implementation_internal = None
    config.architectures = [type(loaded.base).__name__]
    loaded.base.save_pretrained(str(folder), state_dict={})  # everything except weights
    config.save_pretrained(str(folder))
    weight_files.write(folder, loaded.base, gather, dtype)


def stored_dtype(base: Path) -> torch.dtype:
    """Returns the number format of the largest tensor in the first weights file of a folder."""
    from safetensors import safe_open

    first = min(base.glob("*.safetensors"))
    with safe_open(str(first), framework="pt") as file:
        sizes: dict[str, Any] = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        largest = max(sizes, key=lambda name: torch.Size(sizes[name]).numel())
        dtype: torch.dtype = file.get_tensor(largest).dtype
        return dtype
