"""Rows → aims (met or missed), and the table for people. Pure; called by `__main__` and by tests."""

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
    """`wanted` says "at least" or "at most"; `value` is None where it wasn't measured."""

    name: str
    wanted: str
    limit: float
    value: float | None

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.limit if self.wanted == "at least" else self.value <= self.limit

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "wanted": f"{self.wanted} {self.limit:g}", "value": self.value, "met": self.met}


def find(rows: Sequence[Row], system: str, config: str, dataset: str) -> Row | None:
    """The measured row, or None where there is none or it failed."""
    same = (row for row in rows if (row["system"], row["config"], row["dataset"]) == (system, config, dataset))
    return next((row for row in same if row.get("tokens_per_second")), None)


def aims(rows: Sequence[Row], extras: Mapping[str, Any]) -> list[Aim]:
    """All of them, measured or not."""
    found = []
    ours = find(rows, "finetune", "default", "mixed")
    dtype = "bfloat16" if ours and ours.get("dtype") == "bfloat16" else "float32"
    found.append(Aim(f"share of the GEMM roof, mixed, {dtype}", "at least", ROOF[dtype], _value(ours, "roof_share")))
    for dataset, limit in AGAINST_BEST.items():
        best = find(rows, "trl", "best", dataset)
        speed = _ratio(find(rows, "finetune", "default", dataset), best, "tokens_per_second")
        found.append(Aim(f"speed against TRL's searched best, {dataset}", "at least", limit, speed))
    default = find(rows, "trl", "default", "mixed")
    found.append(
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
        found.append(Aim(f"peak memory against TRL's searched best, {dataset}", "at most", 1.0, memory))
    two = extras.get("two_ranks", {}).get("ratio")
    found.append(Aim("two ranks against one with two threads", "at least", TWO_RANKS, two))
    start = extras.get("start", {}).get("seconds_over_model_load")
    found.append(Aim("start to first step over model load, warm cache, seconds", "at most", START, start))
    share = extras.get("overhead", {}).get("share")
    found.append(Aim("share of evaluation, checkpoints and upload in a run", "at most", OVERHEAD, share))
    return found


def _value(row: Row | None, name: str) -> float | None:
    return None if row is None else row.get(name)


def _ratio(ours: Row | None, theirs: Row | None, name: str) -> float | None:
    a, b = _value(ours, name), _value(theirs, name)
    return a / b if a and b else None


def render(rows: Sequence[Row], found: Sequence[Aim]) -> str:
    """Rows grouped by data set, ratios against ours, then the aims."""
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
    lines += ["", f"{'aim':62} {'wanted':>14} {'measured':>9}"]
    for aim in found:
        verdict = {True: "met", False: "MISSED", None: "not measured"}[aim.met]
        lines.append(f"{aim.name:62} {aim.wanted + f' {aim.limit:g}':>14} {_shown(aim.value, '{:.3f}'):>9}  {verdict}")
    return "\n".join(lines)


def _shown(value: float | None, pattern: str) -> str:
    return "" if value is None else pattern.format(value)
