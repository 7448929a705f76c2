"""Builds report.html: one self-contained page about a run, for people.

The module turns the text of files into a page, and is otherwise pure. The template escapes
everything that comes from users' data. The page's policy allows our script and style by their
hashes only, and the page loads nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune_api import names
from finetune_api.messages import events
from finetune_api.messages.data_report import DataReport
from finetune_api.messages.evaluation import Evaluation
from finetune_api.messages.manifest import Manifest
from finetune_api.messages.result import Result
from finetune_trainer.errors import RunError
from finetune_trainer.reporting import history
from finetune_trainer.reporting.html import charts
from finetune_trainer.reporting.html.charts import Bar, Chart, Interval
from finetune_trainer.reporting.overfitting import Point, signal

_SHOWN_SAMPLES = 20  # unless the job sets a number
_HERE = Path(__file__).parent
_LABELS = {
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "bleu": "BLEU (of 100)",
    "exactMatch": "Exact match",
    "f1": "F1",
    "perplexity": "Perplexity",
}


@dataclass(frozen=True)
class ReportData:
    """Holds the content of a page. `failure` is set for a run that failed, which has no files."""

    job: str
    namespace: str
    uid: str
    created: str
    step: int
    provenance: Mapping[str, Any]
    metrics: Mapping[str, float]
    history: tuple[history.Line, ...] = ()
    samples: tuple[events.SampleEvent, ...] = ()
    evaluation: Evaluation | None = None
    data: DataReport | None = None
    files: tuple[tuple[str, int], ...] = ()
    failure: Result | None = None
    hint: str = ""
    attempt: int = 1


@dataclass(frozen=True)
class Curves:
    """Holds the curves of a run, and sums over its steps.

    `seconds` and `tokens` are sums over all steps. `reward_rows` holds, for objective dpo, (name of
    the rows, step, rewards) of the last step and of each held-out split.
    """

    chart: Chart | None
    overfitting: str = ""
    seconds: float = 0.0
    tokens: int = 0
    rewards: Chart | None = None
    reward_rows: tuple[tuple[str, int, events.Rewards], ...] = ()


@dataclass(frozen=True)
class Histogram:
    """Holds the bars that show the lengths of a split's rows."""

    split: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class _View:
    """Holds what the template gets besides the report data."""

    curves: Curves
    intervals: dict[str, Interval] = field(default_factory=dict)
    histograms: tuple[Histogram, ...] = ()
    samples: tuple[events.SampleEvent, ...] = ()


def read(manifest: Manifest, file: Callable[[str], bytes | None]) -> ReportData:
    """Collects the data of a result.

    `file` returns the content of a file by its path in the result, or None.
    """

    def text(path: str) -> str:
        """Returns the content of a file as text; empty if the file is missing."""
        return (file(path) or b"").decode("utf-8", "replace")

    samples = [events.decode(line) for line in text(names.SAMPLES_PATH).split("\n") if line.strip()]
    return ReportData(
        job=manifest.job.name,
        namespace=manifest.job.namespace,
        uid=manifest.job.uid,
        created=manifest.created,
        step=manifest.step,
        provenance=manifest.provenance,
        metrics=manifest.metrics,
        history=history.parse(text(names.HISTORY_PATH)),
        samples=tuple(sample for sample in samples if isinstance(sample, events.SampleEvent)),
        evaluation=_parsed(Evaluation, file(names.EVALUATION_PATH)),
        data=_parsed(DataReport, file(names.DATA_REPORT_PATH)),
        files=tuple((entry.path, entry.size) for entry in manifest.files if entry.path != names.REPORT_PATH),
        attempt=manifest.job.attempt,
    )


def read_result(file: Callable[[str], bytes | None], folder: str) -> ReportData:
    """Collects the data of a finished result, as `read` does.

    `folder` names the result in messages. Raises RunError(InvalidConfig) if it has no valid
    manifest.
    """
    data = file(names.MANIFEST_PATH)
    if data is None:
        raise RunError("InvalidConfig", f"{folder} has no {names.MANIFEST_PATH}; give the folder of a finished result")
    try:
        return read(Manifest.model_validate_json(data), file)
    except ValidationError:
        raise RunError(
            "InvalidConfig",
            f"{folder}/{names.MANIFEST_PATH} isn't a manifest of a result; give the folder of a finished result",
        ) from None


def page(data: ReportData) -> str:
    """Renders the page as HTML."""
    from markupsafe import Markup

    script, style = ((_HERE / name).read_text() for name in ("report.js", "report.css"))
    html: str = _template().render(
        report=data,
        view=_view(data),
        configuration=data.provenance.get("configuration") or {},
        script=Markup(script),  # noqa: S704  our own file
        style=Markup(style),  # noqa: S704  our own file
        script_hash=_hash(script),
        style_hash=_hash(style),
        key=f"finetune-report/{data.uid}/{data.step}",
    )
    return html


@cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["figure"] = _figure
    environment.filters["signed"] = _signed
    environment.filters["bytes"] = _bytes
    environment.filters["duration"] = _duration
    environment.filters["pretty"] = _pretty
    environment.filters["label"] = lambda name: _LABELS.get(name, name)
    environment.filters["moment"] = lambda text: re.sub(r"T(\d\d:\d\d).*Z$", r" \1 UTC", text)
    return environment.get_template("report.html.j2")


def _view(data: ReportData) -> _View:
    scores = data.evaluation.scores if data.evaluation else ()
    configured = (data.provenance.get("configuration") or {}).get("evaluation", {}).get("samples")
    count = min(int(configured or _SHOWN_SAMPLES), len(data.samples))
    shown = tuple(data.samples[index * len(data.samples) // count] for index in range(count))
    histograms = [
        Histogram(split.split, charts.bars(split.lengths.edges, split.lengths.counts))
        for split in (data.data.splits if data.data else ())
    ]
    return _View(
        _curves(data),
        {score.name: charts.interval(score.low, score.high, score.difference) for score in scores},
        tuple(histogram for histogram in histograms if histogram.bars),
        shown,
    )


def _curves(data: ReportData) -> Curves:
    """Computes the curves. If a step was rolled back and repeated, its last occurrence counts."""
    steps = {line.step: line for line in data.history if isinstance(line, events.StepEvent)}
    evals: dict[tuple[str, int], events.EvalEvent] = {
        (line.split, line.step): line for line in data.history if isinstance(line, events.EvalEvent)
    }
    train = [(float(step), line.loss) for step, line in sorted(steps.items())]
    validation = {step: line.loss for (split, step), line in evals.items() if split == "validation"}
    series = [("train", train), ("smooth", charts.smoothed(train))]
    series.append(("validation", [(float(step), loss) for step, loss in sorted(validation.items())]))
    written = None if data.failure else data.step
    status = signal(_points(train, validation))
    overfitting = ""
    if status is not None:
        overfitting = (
            f"The model overfits: the validation loss rose from {status.best_loss:g} (step {status.best_step}) to "
            f"{status.loss:g} (step {status.step}) while the training loss fell."
        )
    return Curves(
        charts.chart([(name, points) for name, points in series if points], written),
        overfitting,
        sum(line.seconds.get("total", 0.0) for line in data.history if isinstance(line, events.StepEvent)),
        sum(line.tokens for line in steps.values()),
        *_rewards(steps, evals, written),
    )


def _rewards(
    steps: Mapping[int, events.StepEvent], evals: Mapping[tuple[str, int], events.EvalEvent], written: int | None
) -> tuple[Chart | None, tuple[tuple[str, int, events.Rewards], ...]]:
    """Returns the chart of the reward margins, and the rows of `Curves.reward_rows`.

    A held-out split is shown as of the step that was written if it was evaluated there, else as of
    its last evaluation.
    """
    train = [(float(step), line.rewards.margins) for step, line in sorted(steps.items()) if line.rewards]
    held_out = [(step, split, line.rewards) for (split, step), line in sorted(evals.items()) if line.rewards]
    validation = [(float(step), rewards.margins) for step, split, rewards in held_out if split == "validation"]
    series = [("train", train), ("smooth", charts.smoothed(train)), ("validation", validation)]
    last = [("training", step, line.rewards) for step, line in sorted(steps.items()) if line.rewards][-1:]
    for name in ("validation", "test"):
        rows = [(name, step, rewards) for step, split, rewards in held_out if split == name]
        last += [row for row in rows if row[1] == written] or rows[-1:]
    return charts.chart([(name, points) for name, points in series if points], written), tuple(last)


def _points(train: list[charts.Point], validation: Mapping[int, float]) -> list[Point]:
    """Pairs each evaluation with the mean training loss since the previous one."""
    points, previous = [], 0
    for step, loss in sorted(validation.items()):
        since = [value for at, value in train if previous < at <= step]
        points.append(Point(step, loss, sum(since) / len(since) if since else float("inf")))
        previous = step
    return points


def _parsed(kind: type[Any], data: bytes | None) -> Any:
    try:
        return kind.model_validate_json(data) if data is not None else None
    except ValidationError:
        return None  # written by another version; the page leaves it out


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _figure(value: float | None) -> str:
    """Formats a number with as many digits as people compare."""
    if value is None:
        return "–"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if size >= 10 or 0 < size < 0.01 else f"{value:.3f}"


def _signed(value: float) -> str:
    return ("+" if value >= 0 else "−") + _figure(abs(value))


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
