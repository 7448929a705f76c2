"""The result as PEFT, Transformers and vLLM load it: weights, configuration, tokenizer, model card. Rank 0 only.

Called by `rank` after the loop with whole weights. Never asks a model hub for anything.
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

from finetune_api.run import RunConfig
from finetune_trainer import adapters, merge, tokenizer_files, zero_config
from finetune_trainer.failure import Failed
from finetune_trainer.model import Loaded, load

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "spiece.model", "chat_template.jinja",
)  # fmt: skip


def write(
    folder: Path, loaded: Loaded, weights: Mapping[str, Tensor], *, run: RunConfig, model: Path, card: str
) -> None:
    """`weights` are the trained ones by the model's parameter names, float32. The folder appears whole."""
    empty = [name for name, tensor in weights.items() if tensor.numel() == 0]
    if empty or not weights:
        raise RuntimeError(f"refusing to write empty weights ({', '.join(empty[:3]) or 'none at all'})")
    aside = folder.with_name(f"{folder.name}.tmp")
    for old in (aside, folder):
        shutil.rmtree(old, ignore_errors=True)
    aside.mkdir(parents=True)
    if run.method == "lora":
        _write_adapter(aside, loaded, weights, base_name(run))
    else:
        _write_model(aside, loaded, weights, model)
    for name in _TOKENIZER_FILES:
        if (model / name).is_file():
            shutil.copyfile(model / name, aside / name)
    if run.added_tokens:
        tokenizer_files.load(model, run.added_tokens).save_pretrained(str(aside))
    template = tokenizer_files.chat_template(model, run.data.chat_template)
    if template is not None:  # it counts before the one in tokenizer_config.json
        (aside / "chat_template.jinja").write_text(template)
    (aside / "README.md").write_text(card)
    os.replace(aside, folder)


def write_merged(folder: Path, model: Path, *, card: str, alive: Callable[[], None]) -> None:
    """Base and adapter as one model, in a folder beside the adapter that is there already."""
    aside = folder.with_name(f"{folder.name}-{merge.FOLDER}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    merge.write(aside, model, folder, alive)
    (aside / "README.md").write_text(card)
    os.replace(aside, folder / merge.FOLDER)


def base_name(run: RunConfig) -> str:
    """What `base_model_name_or_path` says: a hub id as tools know it, any other place as the user wrote it."""
    return run.model.location.display.removeprefix("hf://")


def _write_adapter(folder: Path, loaded: Loaded, weights: Mapping[str, Tensor], base: str) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    tensors = get_peft_model_state_dict(
        loaded.model, state_dict=_under_every_name(loaded.model, weights), save_embedding_layers=False
    )
    config = copy.deepcopy(loaded.model.peft_config["default"])
    if loaded.taken_out:
        tensors, config = adapters.for_the_base_as_it_was(tensors, loaded.taken_out, config)
    apart = {name: tensor.contiguous() for name, tensor in tensors.items()}
    file = folder / "adapter_model.safetensors"
    save_file(apart, file, metadata={"format": "pt"})
    _read_back(file, apart)
    config.base_model_name_or_path = base
    config.inference_mode = True
    for field in ("target_modules", "modules_to_save"):  # a set's order changes from process to process
        if isinstance(getattr(config, field), set):
            setattr(config, field, sorted(getattr(config, field)))
    config.save_pretrained(str(folder))


def _read_back(file: Path, meant: Mapping[str, Tensor]) -> None:
    from safetensors.torch import load_file

    there = load_file(str(file))
    wrong = [name for name, tensor in meant.items() if name not in there or not torch.equal(there[name], tensor)]
    if wrong or len(there) != len(meant):
        raise Failed(
            "ResultMismatch", f"{file.name} reads back differently: {', '.join(wrong[:3]) or 'too many tensors'}"
        )


def _under_every_name(model: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PEFT asks for a tied weight by each of its names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {
        name: weights[known] if name == known else weights[known].clone()
        for same in names.values()
        for known in same
        if known in weights
        for name in same
    }


def _write_model(folder: Path, loaded: Loaded, weights: Mapping[str, Tensor], base: Path) -> None:
    """In the number format that the base was stored in."""
    stored = stored_dtype(base)
    whole = {**_frozen(loaded, weights, base, stored), **weights}
    tensors = {name: tensor.to(stored) for name, tensor in whole.items()}
    config = copy.deepcopy(loaded.base.config)
    config.dtype = stored
    config._attn_implementation_internal = None
    config.architectures = [type(loaded.base).__name__]
    loaded.base.save_pretrained(str(folder), state_dict=tensors, max_shard_size="5GB")
    config.save_pretrained(str(folder))


def _frozen(loaded: Loaded, weights: Mapping[str, Tensor], folder: Path, stored: torch.dtype) -> Mapping[str, Tensor]:
    """What didn't learn, read again from the base: where weights are split, no rank has it whole."""
    if {name for name, _ in loaded.base.named_parameters()} <= weights.keys():
        return {}
    with zero_config.loading_whole():
        again = load(folder, dtype=stored, longest=0).base
    return {name: parameter.detach() for name, parameter in again.named_parameters() if name not in weights}


def stored_dtype(base: Path) -> torch.dtype:
    """Of the largest tensor in the folder's first weights file."""
    from safetensors import safe_open

    first = min(base.glob("*.safetensors"))
    with safe_open(str(first), framework="pt") as file:
        sizes: dict[str, Any] = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        largest = max(sizes, key=lambda name: torch.Size(sizes[name]).numel())
        dtype: torch.dtype = file.get_tensor(largest).dtype
        return dtype
