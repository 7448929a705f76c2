"""Compares rows with the targets, and formats the table for people. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]

AGAINST_BEST = {"mixed": 1.6, "short": 2.0, "long": 1.2, "shared": 8.0}
AGAINST_DEFAULT = 9.0
ROOF = {"float32": 0.80, "bfloat16": 0.55}
TWO_RANKS = 0.9
START = 2.0
OVERHEAD = 0.03


@dataclass(frozen=True)
class Aim:
    """A target: `value` has to be `target` ("at least" or "at most") `limit`.

    `value` is None if it wasn't measured.
    """

    name: str
    target: str
    limit: float
    value: float | None

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None if it wasn't measured."""
        if self.value is None:
            return None
        return self.value >= self.limit if self.target == "at least" else self.value <= self.limit

    def to_json(self) -> dict[str, Any]:
        """Returns its entry in the result file."""
        return {"name": self.name, "wanted": f"{self.target} {self.limit:g}", "value": self.value, "met": self.met}


def find(rows: Sequence[Row], system: str, config: str, dataset: str) -> Row | None:
    """Returns the measured row, None if there is none or it failed."""
    matching = (row for row in rows if (row["system"], row["config"], row["dataset"]) == (system, config, dataset))
    return next((row for row in matching if row.get("tokens_per_second")), None)


def aims(rows: Sequence[Row], extras: Mapping[str, Any]) -> list[Aim]:
    """Returns all targets, measured or not."""
    aims = []
    ours = find(rows, "finetune", "default", "mixed")
    dtype = "bfloat16" if ours and ours.get("dtype") == "bfloat16" else "float32"
    aims.append(Aim(f"share of the GEMM roof, mixed, {dtype}", "at least", ROOF[dtype], _value(ours, "roof_share")))
    for dataset, limit in AGAINST_BEST.items():
        best = find(rows, "trl", "best", dataset)
        speed = _ratio(find(rows, "finetune", "default", dataset), best, "tokens_per_second")
        aims.append(Aim(f"speed against TRL's searched best, {dataset}", "at least", limit, speed))
    default = find(rows, "trl", "default", "mixed")
    aims.append(
        Aim(
            "speed against TRL's default, mixed",
            "at least",
            AGAINST_DEFAULT,
            _ratio(ours, default, "tokens_per_second"),
        )
    )
    for dataset in AGAINST_BEST:
        best = find(rows, "trl", "best", dataset)
        memory = _ratio(find(rows, "finetune", "default", dataset), best, "peak_rss_bytes")
        aims.append(Aim(f"peak memory against TRL's searched best, {dataset}", "at most", 1.0, memory))
    two = extras.get("two_ranks", {}).get("ratio")
    aims.append(Aim("two ranks against one with two threads", "at least", TWO_RANKS, two))
    start = extras.get("start", {}).get("seconds_over_model_load")
    aims.append(Aim("start to first step over model load, warm cache, seconds", "at most", START, start))
    share = extras.get("overhead", {}).get("share")
    aims.append(Aim("share of evaluation, checkpoints and upload in a run", "at most", OVERHEAD, share))
    return aims


def _value(row: Row | None, name: str) -> float | None:
    return None if row is None else row.get(name)


def _ratio(ours: Row | None, theirs: Row | None, name: str) -> float | None:
    a, b = _value(ours, name), _value(theirs, name)
    return a / b if a and b else None


def render(rows: Sequence[Row], aims: Sequence[Aim]) -> str:
    """Returns the table: all rows with our speed relative to theirs, then the targets."""
    lines = [
        f"{'data set':8} {'system':13} {'config':8} {'tokens/s':>9} {'ours is':>8} {'peak RSS':>9} {'roof':>6} "
        f"{'padding':>8} {'computed':>9} {'spread':>7}  what"
    ]
    for row in rows:
        if "error" in row:
            what = " ".join(str(row["error"]).split())[:60]
            lines.append(f"{row['dataset']:8} {row['system']:13} {row['config']:8} failed: {what}")
            continue
        ours = find(rows, "finetune", "default", row["dataset"])
        ratio = _ratio(ours, row, "tokens_per_second")
        lines.append(
            f"{row['dataset']:8} {row['system']:13} {row['config']:8} {row['tokens_per_second']:9.0f} "
            f"{_shown(ratio, '{:.2f}x'):>8} {row['peak_rss_bytes'] / 2**30:6.2f} GiB {row['roof_share']:6.1%} "
            f"{row['padding_share']:8.1%} {row['computed_per_seen']:9.3f} {row.get('spread', 0.0):7.1%}  "
            f"{row.get('what', '')}"
        )
    lines += ["", f"{'target':62} {'required':>14} {'measured':>9}"]
    for aim in aims:
        verdict = {True: "met", False: "MISSED", None: "not measured"}[aim.met]
        lines.append(f"{aim.name:62} {aim.target + f' {aim.limit:g}':>14} {_shown(aim.value, '{:.3f}'):>9}  {verdict}")
    return "\n".join(lines)


def _shown(value: float | None, pattern: str) -> str:
    return "" if value is None else pattern.format(value)
