"""Which configurations of a peer are tried. Pure: what is known of rows and machine → requests; answers → the best.

TRL's own knobs, as its documentation offers them: micro-batch 1 to 16, rows in random order or grouped by length,
padding-free batches, bfd packing at several lengths, weights and arithmetic in float32 and bfloat16; never activation
checkpointing, which costs time. Accumulation makes the same global batch of all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MICRO_BATCHES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Dtype:
    """What weights are stored in, and whether products are computed in bfloat16 by autocast."""

    name: str
    weights: str
    autocast: bool


FLOAT32 = Dtype("fp32", "float32", False)
BFLOAT16 = (
    Dtype("bf16 autocast", "float32", True),
    Dtype("bf16 weights", "bfloat16", False),
    Dtype("bf16 weights + autocast", "bfloat16", True),
)


def dtypes(fast_bfloat16: bool) -> tuple[Dtype, ...]:
    """Those that can be fast: no bfloat16 on a machine whose bfloat16 products are slower than its float32 ones."""
    return (FLOAT32, *BFLOAT16) if fast_bfloat16 else (FLOAT32,)


@dataclass(frozen=True)
class Times:
    """Seconds of a window and of the warm-up before it; micro-batches that each must at least hold."""

    warm_up: float
    seconds: float
    least: int = 2


def default(fast_bfloat16: bool, times: Times) -> dict[str, Any]:
    """SFTConfig as it comes: batch 8, activation checkpointing on, bf16 on.

    Where bfloat16 is slow it is off here, in TRL's favour.
    """
    return {
        "name": "default" if fast_bfloat16 else "default, bf16 off",
        "micro_batch": 8,
        "arguments": {} if fast_bfloat16 else {"bf16": False},
        **_times(times),
    }


def formats(chosen: Sequence[Dtype], times: Times) -> list[dict[str, Any]]:
    """Micro-batch 1, no padding at all, in every format: which one is fast."""
    return [_config(f"micro-batch 1, {dtype.name}", dtype, 1, times) for dtype in chosen]


def families(dtype: Dtype, mean_length: float, longest: int, times: Times) -> list[dict[str, Any]]:
    """Everything else, in one format. Within a family from small to large."""
    found = [_config(f"micro-batch {m}, {dtype.name}", dtype, m, times, family="random") for m in MICRO_BATCHES]
    for micro in MICRO_BATCHES[1:]:
        name = f"micro-batch {micro} grouped by length, {dtype.name}"
        found.append(_config(name, dtype, micro, times, family="grouped", grouped=True))
    for micro in MICRO_BATCHES[1:]:
        name = f"micro-batch {micro} padding-free, {dtype.name}"
        arguments = {"padding_free": True, "max_length": None}
        found.append(_config(name, dtype, micro, times, family="padding-free", arguments=arguments))
    for length in (512, 1024, 2048):
        if length < longest or length > 16 * mean_length:
            continue
        arguments = {"packing": True, "packing_strategy": "bfd", "max_length": length}
        config = _config(f"packed bfd {length}, {dtype.name}", dtype, 1, times, arguments=arguments)
        found.append({**config, "family": "packed", "rows_per_batch": max(1, int(length / mean_length))})
    return found


def _config(
    name: str, dtype: Dtype, micro: int, times: Times, *, arguments: Mapping[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    return {
        "name": name,
        "micro_batch": micro,
        "weights": dtype.weights,
        "autocast": dtype.autocast,
        "arguments": {"activation_checkpointing": False, "bf16": dtype.autocast, **(arguments or {})},
        **more,
        **_times(times),
    }


def _times(times: Times) -> dict[str, Any]:
    return {"warm_up": times.warm_up, "seconds": times.seconds, "least": times.least}


def again(config: Mapping[str, Any], times: Times) -> dict[str, Any]:
    """The same configuration, measured longer and for itself."""
    return {**{key: value for key, value in config.items() if key != "family"}, **_times(times)}


def fastest(
    configs: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]], count: int
) -> list[Mapping[str, Any]]:
    """The configurations with the most tokens a second, best first."""
    rates = {answer["name"]: rate(answer) for answer in answers}
    measured = [config for config in configs if rates.get(config["name"], 0.0) > 0]
    return sorted(measured, key=lambda config: -rates[config["name"]])[:count]


def rate(answer: Mapping[str, Any]) -> float:
    """Tokens without padding a second; 0 where nothing was measured."""
    return answer["tokens"] / answer["seconds"] if "seconds" in answer else 0.0


def few(dtype: Dtype, times: Times) -> list[dict[str, Any]]:
    """Small micro-batches only: for a peer that isn't searched in full."""
    return [_config(f"micro-batch {m}, {dtype.name}", dtype, m, times, family=dtype.name) for m in (1, 2, 4)]
