"""Converts measurements into rows of the result file, in the same way for all systems. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.trainer import flops, ours
from benchmarks.trainer.data import Statistics
from benchmarks.trainer.flops import Dimensions, Roof, Work

RANK = 16


@dataclass(frozen=True)
class Scale:
    """What speeds are compared with: the model's dimensions, and the roofs by dtype."""

    size: Dimensions
    roofs: Mapping[str, Sequence[Roof]]

    def share(self, work: Work, seconds: float, dtype: str) -> tuple[float, float]:
        """Returns the share of the roof (0 if none was measured) and the FLOP/s."""
        counted = flops.needed(self.size, RANK, work)
        roofs = list(self.roofs.get(dtype, ()))
        if not roofs:
            return 0.0, counted.total / seconds
        return flops.highest(roofs, counted).seconds(counted) / seconds, counted.total / seconds


def of_peer(
    system: str, config: str, dataset: str, request: Mapping[str, Any], answer: Mapping[str, Any], scale: Scale
) -> dict[str, Any]:
    """Returns the row of a peer's configuration, or one with its error."""
    row = {"system": system, "config": config, "dataset": dataset, "what": answer.get("name", "")}
    if "seconds" not in answer:
        return {**row, "error": answer.get("error") or answer.get("skipped") or "no measurement"}
    dtype = "bfloat16" if request.get("autocast", True) or request.get("weights") == "bfloat16" else "float32"
    if request.get("arguments", {}).get("bf16") is False and request.get("weights", "float32") == "float32":
        dtype = "float32"
    work = Work(answer["tokens"], answer["labels"], answer["pairs"])
    share, achieved = scale.share(work, answer["seconds"], dtype)
    return {
        **row,
        "tokens_per_second": answer["tokens"] / answer["seconds"],
        "peak_rss_bytes": answer["peak_rss_bytes"],
        "roof_share": share,
        "padding_share": 1 - answer["tokens"] / answer["positions"],
        "computed_per_seen": answer["positions"] / answer["tokens"],
        "spread": spread(answer["thirds"]),
        "dtype": dtype,
        "details": {
            "label_tokens_per_second": answer["labels"] / answer["seconds"],
            "flops_per_second": achieved,
            "seconds": answer["seconds"],
            "steps": answer["steps"],
            "micro_batches": answer["micro_batches"],
            "tokens_per_second_by_third": answer["thirds"],
            "peak_anonymous_bytes": answer.get("anonymous_bytes"),
            "stored_as": answer.get("dtype"),
            "losses": answer.get("losses", []),
            "request": dict(request),
            "versions": answer.get("versions", {}),
        },
    }


def of_ours(dataset: str, statistics: Statistics, record: ours.RunRecord, scale: Scale) -> dict[str, Any]:
    """Returns the row of our trainer's run."""
    speed = ours.speed(record)
    dtype = record.choices.get("dtype", "float32")
    # Padding isn't useful work, and a shared prefix that was computed once counts once.
    useful = min(1.0, speed.computed_per_seen)
    work_of_rows = Work(speed.tokens, speed.labels, statistics.attended_pairs_per_token * speed.tokens)
    work = flops.computed(work_of_rows, useful, statistics.common_prefix)
    share, achieved = scale.share(work, speed.seconds, dtype)
    return {
        "system": "finetune",
        "config": "default",
        "dataset": dataset,
        "what": f"all auto: {record.choices.get('microBatchSize', '')}, {dtype}",
        "tokens_per_second": speed.tokens / speed.seconds,
        "peak_rss_bytes": record.ended.rss,
        "roof_share": share,
        "padding_share": speed.padding_share,
        "computed_per_seen": speed.computed_per_seen,
        "spread": spread(speed.by_step),
        "dtype": dtype,
        "details": {
            "label_tokens_per_second": speed.labels / speed.seconds,
            "flops_per_second": achieved,
            "seconds": speed.seconds,
            "steps": speed.steps,
            "tokens_per_second_by_step": speed.by_step,
            "share_of_step_by_part": dict(speed.parts),
            "peak_anonymous_bytes": sum(peak.anonymous for peak in record.ended.peaks),
            "losses": [step["loss"] for step in record.all("step")],
            "decisions": record.decisions,
        },
    }


def spread(rates: Sequence[float]) -> float:
    """Returns (fastest - slowest) / mean of the rates in a window; 0 if there are none."""
    return (max(rates) - min(rates)) / (sum(rates) / len(rates)) if rates else 0.0


def of_roofs(scale: Scale, statistics: Mapping[str, Statistics]) -> dict[str, Any]:
    """Returns the roofs by dtype for the result file.

    They are in FLOP/s and in tokens per second for each data set, with the rate of every product.
    """
    answer: dict[str, Any] = {}
    for dtype, roofs in scale.roofs.items():
        by_set = {}
        for name, known in statistics.items():
            a_token = flops.needed(scale.size, RANK, Work(1, known.label_share, known.attended_pairs_per_token))
            highest = flops.highest(list(roofs), a_token)
            by_set[name] = {
                "flops_per_second": highest.rate(a_token),
                "flops_per_token": a_token.total,
                "tokens_per_second": 1 / highest.seconds(a_token),
                "at_rows": highest.rows,
            }
        answer[dtype] = {"by_dataset": by_set, "products": [asdict(roof) for roof in roofs]}
    return answer
