"""Reads what a model's folder determines about text: tokenizer, end tokens, chat template.

The module uses neither torch nor the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune_trainer import limits, model_config, refusals
from finetune_trainer.errors import RunError


def load(folder: Path, added: tuple[str, ...] = ()) -> Any:
    """Load the folder's fast tokenizer and add the job's tokens `added` to it.

    Torch isn't imported if the folder has a tokenizer.json. Raises RunError ModelInvalid.
    """
    tokenizer = _load(folder)
    if added:
        add(tokenizer, added)
    return tokenizer


def _load(folder: Path) -> Any:
    import transformers  # its absence isn't the model's fault

    remedy = "use the tokenizer files that were published with the model"
    with refusals.raising("ModelInvalid", "model.uri: no tokenizer can be loaded from the folder", remedy):
        if (folder / "tokenizer.json").is_file():
            return transformers.PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Return the ids of each text, without special tokens. Raises RunError ModelInvalid if the
    tokenizer gives up."""
    try:
        return list(tokenizer(texts, add_special_tokens=False).input_ids)
    except BaseException as error:
        if not limits.is_rust_panic(error):
            raise
        cause = " ".join(str(error).split())[:200]
        raise RunError("ModelInvalid", f"model.uri: the tokenizer can't read one of the rows ({cause})") from None


def is_encoder_decoder(folder: Path) -> bool:
    """Whether config.json declares an encoder-decoder model.

    Raises RunError ModelInvalid if it can't be read.
    """
    path = folder / model_config.CONFIG
    if not path.is_file():
        return False
    return bool(model_config.read(path.name, path.read_bytes(), "the folder").get("is_encoder_decoder"))


def stop_tokens(tokenizer: Any, folder: Path) -> frozenset[int]:
    """Return the tokens that end an answer, according to the tokenizer and the generation
    configuration.

    Raises RunError ModelInvalid if there is none.
    """
    stops: set[int] = set()
    if tokenizer.eos_token_id is not None:
        stops.add(int(tokenizer.eos_token_id))
    path = folder / "generation_config.json"
    if path.is_file():
        stops.update(model_config.stop_tokens(path.read_bytes(), "the folder"))
    if not stops:
        raise RunError(
            "ModelInvalid",
            "model.uri: neither the tokenizer nor generation_config.json names an end-of-sequence token, so an answer "
            "could never end; set eos_token in tokenizer_config.json",
        )
    return frozenset(stops)


def chat_template(folder: Path, setting: str | None) -> str | None:
    """Return the template that `setting` (dataset.chatTemplate) holds or names, or None for the
    tokenizer's own. An empty text stands for no template at all.

    Raises RunError InvalidConfig if it names a file that is missing or isn't UTF-8.
    """
    if setting is None or "{" in setting:
        return setting
    if setting == "none":
        return ""
    path = folder / setting
    if path.parent != folder or not path.is_file():
        raise RunError("InvalidConfig", f"dataset.chatTemplate: the model's folder has no file {setting!r}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RunError("InvalidConfig", f"dataset.chatTemplate: {setting!r} isn't UTF-8") from None


def own_templates(folder: Path) -> list[str]:
    """Return the texts of the files of a model's folder that may hold its chat templates."""
    files = [
        folder / "tokenizer_config.json",
        *folder.glob("*.jinja"),
        *folder.glob("additional_chat_templates/*.jinja"),
    ]
    return [path.read_text(encoding="utf-8", errors="replace") for path in files if path.is_file()]


def add(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Add tokens to a tokenizer. Tokens that it already has don't change."""
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])


def ids(tokenizer: Any, tokens: Sequence[str]) -> tuple[int, ...]:
    """Return the ids of tokens in ascending order, each of them once."""
    return tuple(sorted({int(number) for number in tokenizer.convert_tokens_to_ids(list(tokens))}))
