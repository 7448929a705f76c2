"""How many tokens a rank computes at once where the user says `auto`: sizes → a number and its reason. Pure.

A rough estimate on the safe side, of what the micro-batch alone decides: activations. It never changes the result.
"""

from __future__ import annotations

from dataclasses import dataclass

# Beyond about a thousand tokens a CPU's matrix products get no faster, and on GPUs some thousands fill them.
_ENOUGH_TOKENS = {"cpu": 1024, "cuda": 16384}
_SHARE_OF_FREE = 0.6


@dataclass(frozen=True)
class ModelSize:
    """Read from a model's configuration; `bytes_per_value` of the activations."""

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    bytes_per_value: int


def activation_bytes_per_token(size: ModelSize) -> int:
    """What a decoder layer keeps for its backward pass (norms, q k v o, gate, up, product), and the logits."""
    layer = 12 * size.hidden + 5 * size.intermediate
    return size.layers * layer * size.bytes_per_value + 12 * size.vocabulary


def tokens_at_once(size: ModelSize, *, longest: int, device: str, free_bytes: int) -> tuple[int, str]:
    """(tokens, reason): what helps, if it fits, and at least the longest row."""
    per_token = activation_bytes_per_token(size)
    fitting = int(free_bytes * _SHARE_OF_FREE) // per_token
    tokens = max(longest, min(_ENOUGH_TOKENS[device], fitting))
    return tokens, (
        f"a token keeps about {per_token / 2**20:.2f} MiB of activations, {free_bytes / 2**30:.1f} GiB are free, and "
        f"the longest row has {longest} tokens"
    )


def from_config(config: object, bytes_per_value: int) -> ModelSize:
    """By the names that Transformers' configurations use; what is missing is taken from what is there."""
    hidden = _first(config, 512, "hidden_size", "n_embd", "d_model")
    return ModelSize(
        layers=_first(config, 12, "num_hidden_layers", "n_layer", "num_layers"),
        hidden=hidden,
        intermediate=_first(config, 4 * hidden, "intermediate_size", "n_inner", "d_ff"),
        vocabulary=_first(config, 32000, "vocab_size"),
        bytes_per_value=bytes_per_value,
    )


def _first(config: object, otherwise: int, *names: str) -> int:
    values = (getattr(config, name, None) for name in names)
    return next((int(value) for value in values if value), otherwise)
