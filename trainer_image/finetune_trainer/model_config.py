"""Reads the JSON files of a model's folder, and refuses what can never be trained. It is pure.

Everything that a file says is checked here before a library reads it: what a library raises for a
wrong value seldom names the file or the setting.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from finetune_trainer.errors import RunError

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
_GIT_LFS = b"version https://git-lfs.github.com/spec/"
_MAX_JSON_BYTES = 64 << 20
_MAX_LAYERS = 10_000
_MAX_NUMBER = 2**40  # Python's numbers have no limit, but those of tensors' shapes do
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")
_SIZES = (
    "vocab_size", "hidden_size", "n_embd", "d_model", "intermediate_size", "num_attention_heads", "n_head",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "n_positions", "d_ff", "num_heads",
    "num_local_experts", "num_experts", "n_routed_experts",
)  # fmt: skip
_TOKEN_IDS = ("eos_token_id", "bos_token_id", "pad_token_id")
_DTYPE = re.compile(r"(torch\.)?(auto|float|half|bfloat16|float(16|32|64)|float8_\w+)")
_OTHER_HEADS = (
    "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice", "RewardModel",
    "ForReward", "ForRewardModel",
)  # fmt: skip
_QUANTIZATIONS = ("quantization_config", "compression_config", "quantization")
"""Keys that describe a quantization: of Transformers, of older compressed-tensors, and of MLX."""
_REMEDIES = {
    "mxfp4": "use a copy of the model whose weights are in bfloat16",
    "bitsandbytes": "use the model that it was made from, with model.quantization: nf4 or int8",
}


def is_git_lfs_pointer(head: bytes) -> bool:
    """Returns whether a file that begins with `head` is what Git LFS leaves in place of a large
    file."""
    return head.startswith(_GIT_LFS)


def git_lfs_error(name: str, at: str) -> RunError:
    """Returns the error for a file that is only a pointer of Git LFS."""
    return RunError(
        "ModelInvalid",
        f"model.uri: {at}/{name} is a Git LFS pointer and not the file itself; run git lfs pull where the model was "
        "cloned, and upload the files again",
    )


def read(name: str, content: bytes, at: str) -> dict[str, Any]:
    """Returns the object in a JSON file of a model's folder. `at` is what messages call the folder.

    Raises RunError(ModelInvalid).
    """
    if is_git_lfs_pointer(content):
        raise git_lfs_error(name, at)
    if content.startswith(codecs.BOM_UTF8):
        raise _invalid(at, name, "begins with a byte order mark, which Transformers can't read")
    if len(content) > _MAX_JSON_BYTES:
        raise _invalid(at, name, f"has more than {_MAX_JSON_BYTES >> 20} MiB")
    try:
        body: Any = json.loads(content)
    except RecursionError:
        raise _invalid(at, name, "is nested too deeply") from None
    except ValueError as error:
        problem = str(error) if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) else "a number is too long"
        raise _invalid(at, name, f"isn't JSON: {problem[:200]}") from None
    if not isinstance(body, dict):
        raise _invalid(at, name, f"holds {_kind(body)} instead of an object")
    if name == CONFIG and _has_nan(body):
        raise _invalid(at, name, "has a value that is NaN")
    return body


def _has_nan(value: Any) -> bool:
    remaining = [value]  # not a recursion, since JSON may be nested as deeply as Python's stack is
    while remaining:
        inner = remaining.pop()
        if isinstance(inner, dict | list):
            remaining.extend(inner.values() if isinstance(inner, dict) else inner)
        elif isinstance(inner, float) and math.isnan(inner):
            return True
    return False


def check(config: Mapping[str, Any], at: str) -> None:
    """Refuses a config.json that has no model type, that describes weights which can't be trained,
    or whose numbers can't be those of a model.

    Raises RunError(ModelInvalid).
    """
    if not isinstance(config.get("model_type"), str):
        raise _invalid(at, CONFIG, "has no model_type; use the folder of a Transformers model", remedy=False)
    _check_architectures(config.get("architectures"), at)
    for prefix, section in (("", config), ("text_config.", config.get("text_config"))):
        if isinstance(section, dict):
            for name in _QUANTIZATIONS:
                _check_quantization(section.get(name), name, at)
            _check_numbers(section, prefix, at)
            _check_rope(section, prefix, at)
            _check_dtype(section, prefix, at)
        elif section is not None:
            raise _invalid(at, CONFIG, f"has text_config {_short(section)}, which isn't an object")


def check_generation(content: bytes, at: str) -> None:
    """Refuses a generation_config.json whose token ids aren't token ids.

    Raises RunError(ModelInvalid).
    """
    body = read(GENERATION_CONFIG, content, at)
    for name in _TOKEN_IDS:
        value = body.get(name)
        for token in value if isinstance(value, list) else [value]:
            if token is not None and not _is_count(token):
                raise _invalid(at, GENERATION_CONFIG, f"has {name} {_short(token)}, which isn't the number of a token")


def stop_tokens(content: bytes, at: str) -> frozenset[int]:
    """Returns the end tokens that a generation_config.json names. Raises RunError(ModelInvalid)."""
    check_generation(content, at)
    declared = read(GENERATION_CONFIG, content, at).get("eos_token_id")
    return frozenset(declared if isinstance(declared, list) else [] if declared is None else [declared])


def _check_architectures(names: Any, at: str) -> None:
    """Refuses a model whose head isn't that of a language model, because the head would be left
    out."""
    name = (
        next((n for n in names if isinstance(n, str) and n.endswith(_OTHER_HEADS)), None)
        if isinstance(names, list)
        else None
    )
    if name is not None:
        raise RunError(
            "ModelInvalid",
            f"model.uri: {at} is a {name[:80]} (architectures in {CONFIG}), which classifies texts and generates none; "
            "use the language model that it was made from",
        )


def _check_quantization(value: Any, name: str, at: str) -> None:
    if not value and value != {}:
        return
    method = str(value.get("quant_method") or "quantized") if isinstance(value, dict) else _short(value)
    remedy = _REMEDIES.get(method, "use the model that it was made from; model.quantization: nf4 saves as much memory")
    raise RunError(
        "ModelInvalid",
        f"model.uri: the weights of {at} are stored as {method[:40]} ({name} in {CONFIG}), which can't be "
        f"trained; {remedy}",
    )


def _check_numbers(config: Mapping[str, Any], prefix: str, at: str) -> None:
    for name in (*_LAYERS, *_SIZES):
        value = config.get(name)
        if value is None or isinstance(value, list):  # some families have one for each layer
            continue
        limit = _MAX_LAYERS if name in _LAYERS else _MAX_NUMBER
        if not _is_count(value, limit) or (value == 0 and "experts" not in name):
            raise _invalid(at, CONFIG, f"has {prefix}{name} {_short(value)}, which can't be the size of a model")
    vocabulary, padding = config.get("vocab_size"), config.get("pad_token_id")
    if (
        isinstance(vocabulary, int)
        and padding is not None
        and not (_is_count(padding, vocabulary - 1) or padding == -1)
    ):
        raise _invalid(
            at, CONFIG, f"has {prefix}pad_token_id {_short(padding)}, which isn't below its vocab_size of {vocabulary}"
        )


def _check_rope(config: Mapping[str, Any], prefix: str, at: str) -> None:
    """Refuses settings of rotary positions that aren't numbers; their lists have one for each of
    them."""
    for field in ("rope_parameters", "rope_scaling"):
        section = config.get(field)
        if not isinstance(section, dict):
            continue
        for name, value in {
            **section,
            **{f"{k}.{n}": v for k, inner in section.items() if isinstance(inner, dict) for n, v in inner.items()},
        }.items():
            numbers = value if isinstance(value, list) else [value]
            if name.endswith("type") or value is None or isinstance(value, dict | bool):
                continue
            if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
                raise _invalid(at, CONFIG, f"has {prefix}{field}.{name} {_short(value)}, which isn't a number")
            if name.endswith(("theta", "factor")) and not all(number > 0 for number in numbers):
                raise _invalid(at, CONFIG, f"has {prefix}{field}.{name} {_short(value)}, which must be above 0")
    theta = config.get("rope_theta")
    if theta is not None and not (isinstance(theta, int | float) and theta > 0 and math.isfinite(theta)):
        raise _invalid(at, CONFIG, f"has {prefix}rope_theta {_short(theta)}, which must be a number above 0")


def _check_dtype(config: Mapping[str, Any], prefix: str, at: str) -> None:
    for field in ("dtype", "torch_dtype"):
        value = config.get(field)
        if value is None or isinstance(value, dict):  # a model of several parts may have one for each
            continue
        if not isinstance(value, str) or not _DTYPE.fullmatch(value):
            raise _invalid(at, CONFIG, f"has {prefix}{field} {_short(value)}, which is no number format")


def _is_count(value: Any, largest: int = 2**31 - 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= largest


def _kind(value: Any) -> str:
    return {list: "a list", str: "a text", bool: "a boolean", type(None): "null"}.get(type(value), "a number")


def _short(value: Any) -> str:
    """Returns a value as JSON, in at most 60 characters. A number of thousands of digits isn't
    converted."""
    if isinstance(value, int) and abs(value) > 10**30:
        return "a number of more than 30 digits"
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _invalid(at: str, name: str, problem: str, *, remedy: bool = True) -> RunError:
    advice = "; use the file that was published with the model" if remedy else ""
    return RunError("ModelInvalid", f"model.uri: {at}/{name} {problem}{advice}")
