"""Knows which models can be computed by several ranks that share each row. It needs no weights.

Everything except attention must compute a token by itself: attention is the only place where the
ranks exchange anything. What the configuration doesn't reveal is detected when a divided row is
compared with a whole one on the loaded model.
"""

from __future__ import annotations

from typing import Any

from finetune_trainer.errors import RunError
from finetune_trainer.model.check import rotary_positions

_FIELD = "distribution.sequenceParallelSize"


def check(config: Any, size: int, packing_obstacle: str) -> None:
    """Raises RunError(InvalidConfig) if `size` ranks can't share the rows of a model with this
    configuration. `packing_obstacle` says why examples can't share a row; it is usually empty."""
    obstacle = _obstacle(config, size, packing_obstacle) if size > 1 else ""
    if obstacle:
        raise RunError("InvalidConfig", f"{_FIELD} {size}: {obstacle}")


def _obstacle(config: Any, size: int, packing_obstacle: str) -> str:
    if packing_obstacle:
        return f"only packed rows can be shared, and in this model {packing_obstacle}; set it to 1"
    text = config.get_text_config()
    for heads in _head_counts(text):
        if heads % size:
            return (
                f"the model's {heads} attention heads can't be divided among {size} processes; use a divisor of both "
                f"{heads} and the number of processes"
            )
    kinds = rotary_positions.by_longest_position(text)
    if kinds:
        return (
            f"the model's rotary positions ({', '.join(kinds)}) depend on the longest position that a process "
            "computes, which differs between processes that share a row; set it to 1"
        )
    return ""


def _head_counts(config: Any) -> tuple[int, ...]:
    """Returns the numbers of query heads of the layers that read text; none if they aren't
    known."""
    value = getattr(config, "num_attention_heads", None)
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(dict.fromkeys(heads for heads in values if isinstance(heads, int)))
