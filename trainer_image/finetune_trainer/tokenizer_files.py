"""What a model's folder says about text: its tokenizer, its end tokens, its chat template. No torch.

Called by `render`, and wherever a tokenizer is needed by itself. Never reaches for the network.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune_trainer import vocabulary
from finetune_trainer.failure import Failed


def load(folder: Path, added: tuple[str, ...] = ()) -> Any:
    """The folder's fast tokenizer with the job's `added` tokens; no torch where there is a tokenizer.json."""
    tokenizer = _load(folder)
    if added:
        vocabulary.add(tokenizer, added)
    return tokenizer


def _load(folder: Path) -> Any:
    try:
        if (folder / "tokenizer.json").is_file():
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, json.JSONDecodeError) as error:
        raise Failed("ModelInvalid", f"model.uri: no tokenizer can be loaded from the folder ({error})") from None


def is_encoder_decoder(folder: Path) -> bool:
    """Read from config.json alone."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise Failed("ModelInvalid", f"model.uri: config.json can't be read ({error})") from None
    return bool(config.get("is_encoder_decoder", False)) if isinstance(config, dict) else False


def stop_tokens(tokenizer: Any, folder: Path) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's and the generation configuration's."""
    found: set[int] = set()
    if tokenizer.eos_token_id is not None:
        found.add(int(tokenizer.eos_token_id))
    path = folder / "generation_config.json"
    if path.is_file():
        declared = json.loads(path.read_text()).get("eos_token_id")
        found.update(declared if isinstance(declared, list) else [] if declared is None else [declared])
    if not found:
        raise Failed(
            "ModelInvalid",
            "model.uri: neither the tokenizer nor generation_config.json names an end-of-sequence token, so an answer "
            "could never end; set eos_token in tokenizer_config.json",
        )
    return frozenset(found)


def chat_template(folder: Path, given: str | None) -> str | None:
    """The text of dataset.chatTemplate, or None where the tokenizer's own counts. Raises Failed InvalidConfig."""
    if given is None or "{" in given:
        return given
    path = folder / given
    if path.parent != folder or not path.is_file():
        raise Failed("InvalidConfig", f"dataset.chatTemplate: the model's folder has no file {given!r}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise Failed("InvalidConfig", f"dataset.chatTemplate: {given!r} isn't UTF-8") from None
