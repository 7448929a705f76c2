"""Defines the configurations of a peer that are measured, and selects the fastest. Pure.

They are TRL's documented options: micro-batches of 1 to 16, rows in random order or grouped by
length, padding-free batches, bfd packing at several lengths, weights and arithmetic in float32 and
bfloat16. Activation checkpointing is always off, since it costs time. Gradient accumulation gives
all of them the same global batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MICRO_BATCHES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Dtype:
    """The dtype of the weights, and whether autocast computes products in bfloat16."""

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
    """Returns the dtypes that can be fast.

    A machine whose bfloat16 products are slower than those in float32 uses no bfloat16.
    """
    return (FLOAT32, *BFLOAT16) if fast_bfloat16 else (FLOAT32,)


@dataclass(frozen=True)
class Times:
    """Seconds of a measurement and its warm-up, each with at least `least` micro-batches."""

    warm_up: float
    seconds: float
    least: int = 2


def default(fast_bfloat16: bool, times: Times) -> dict[str, Any]:
    """Returns SFTConfig's defaults: batch 8, activation checkpointing on, bf16 on.

    If bfloat16 is slow, it is off, in TRL's favor.
    """
    return {
        "name": "default" if fast_bfloat16 else "default, bf16 off",
        "micro_batch": 8,
        "arguments": {} if fast_bfloat16 else {"bf16": False},
        **_times(times),
    }


def formats(chosen: Sequence[Dtype], times: Times) -> list[dict[str, Any]]:
    """Returns micro-batch 1, which has no padding, in every dtype, to find the fastest dtype."""
    return [_config(f"micro-batch 1, {dtype.name}", dtype, 1, times) for dtype in chosen]


def families(dtype: Dtype, mean_length: float, longest: int, times: Times) -> list[dict[str, Any]]:
    """Returns all other configurations in one dtype, from small to large within a family."""
    configs = [_config(f"micro-batch {m}, {dtype.name}", dtype, m, times, family="random") for m in MICRO_BATCHES]
    for micro in MICRO_BATCHES[1:]:
        name = f"micro-batch {micro} grouped by length, {dtype.name}"
        configs.append(_config(name, dtype, micro, times, family="grouped", grouped=True))
    for micro in MICRO_BATCHES[1:]:
        name = f"micro-batch {micro} padding-free, {dtype.name}"
        arguments = {"padding_free": True, "max_length": None}
        configs.append(_config(name, dtype, micro, times, family="padding-free", arguments=arguments))
    for length in (512, 1024, 2048):
        if length < longest or length > 16 * mean_length:
            continue
        arguments = {"packing": True, "packing_strategy": "bfd", "max_length": length}
        config = _config(f"packed bfd {length}, {dtype.name}", dtype, 1, times, arguments=arguments)
        configs.append({**config, "family": "packed", "rows_per_batch": max(1, int(length / mean_length))})
    return configs


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
    """Returns the same configuration with other times and without its family."""
    return {**{key: value for key, value in config.items() if key != "family"}, **_times(times)}


def fastest(
    configs: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]], count: int
) -> list[Mapping[str, Any]]:
    """Returns the configurations with the most tokens per second, fastest first."""
    rates = {answer["name"]: rate(answer) for answer in answers}
    measured = [config for config in configs if rates.get(config["name"], 0.0) > 0]
    return sorted(measured, key=lambda config: -rates[config["name"]])[:count]


def rate(answer: Mapping[str, Any]) -> float:
    """Returns the tokens per second, without padding; 0 if nothing was measured."""
    return answer["tokens"] / answer["seconds"] if "seconds" in answer else 0.0


def few(dtype: Dtype, times: Times) -> list[dict[str, Any]]:
    """Returns only small micro-batches, for a peer without a full search."""
    return [_config(f"micro-batch {m}, {dtype.name}", dtype, m, times, family=dtype.name) for m in (1, 2, 4)]
