"""How many rows a rank computes at once where the user says `auto`: sizes → a number and its reason. Pure.

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


def rows_at_once(
    size: ModelSize, *, row_tokens: int, global_rows: int, device: str, free_bytes: int
) -> tuple[int, str]:
    """(rows, reason): at least 1, at most what a rank's share of the global batch needs."""
    enough = max(1, _ENOUGH_TOKENS[device] // row_tokens)
    per_row = activation_bytes_per_token(size) * row_tokens
    fitting = max(1, int(free_bytes * _SHARE_OF_FREE) // per_row)
    rows = min(enough, fitting, max(1, global_rows))
    return rows, (
        f"a row of {row_tokens} tokens keeps about {per_row / 2**20:.0f} MiB of activations and "
        f"{free_bytes / 2**30:.1f} GiB are free"
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
