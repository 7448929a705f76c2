"""report.html: one self-contained page about a run, for people. Called by the supervisor before the result's upload,
and by `finetune report` for a result that lies somewhere.

Pure: files as text in, a page out. All that comes from users' data is escaped by the template; scripts and styles are
allowed by their hashes alone, and nothing is ever loaded.
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

from finetune_api import events, names
from finetune_api.data_report import DataReport
from finetune_api.evaluation import Evaluation
from finetune_api.manifest import Manifest
from finetune_api.result import Result
from finetune_trainer import curves, history
from finetune_trainer.curves import Bar, Chart, Interval
from finetune_trainer.failure import Failed
from finetune_trainer.overfitting import Point, signal

_SHOWN = 20  # samples, where the job doesn't say how many
_HERE = Path(__file__).parent
_EVERY_STEP = 1 << 62
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
class Facts:
    """What a page is made of. `failure` is set for a run that failed; it has no files then."""

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
    chart: Chart | None
    overfitting: str = ""
    seconds: float = 0.0
    tokens: int = 0
    rewards: Chart | None = None
    told: tuple[tuple[str, int, events.Rewards], ...] = ()  # of pairs: which, after which step, what


@dataclass(frozen=True)
class Histogram:
    split: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class _View:
    """What the template gets besides the facts."""

    curves: Curves
    intervals: dict[str, Interval] = field(default_factory=dict)
    histograms: tuple[Histogram, ...] = ()
    samples: tuple[events.SampleEvent, ...] = ()


def read(manifest: Manifest, file: Callable[[str], bytes | None]) -> Facts:
    """The facts of a result. `file` gives a file of its folder by path, or None."""

    def text(path: str) -> str:
        return (file(path) or b"").decode("utf-8", "replace")

    samples = [events.decode(line) for line in text(names.SAMPLES_PATH).split("\n") if line.strip()]
    return Facts(
        job=manifest.job.name,
        namespace=manifest.job.namespace,
        uid=manifest.job.uid,
        created=manifest.created,
        step=manifest.step,
        provenance=manifest.provenance,
        metrics=manifest.metrics,
        history=history.parse(text(names.HISTORY_PATH), _EVERY_STEP),
        samples=tuple(sample for sample in samples if isinstance(sample, events.SampleEvent)),
        evaluation=_parsed(Evaluation, file(names.EVALUATION_PATH)),
        data=_parsed(DataReport, file(names.DATA_REPORT_PATH)),
        files=tuple((entry.path, entry.size) for entry in manifest.files if entry.path != names.REPORT_PATH),
        attempt=manifest.job.attempt,
    )


def read_result(file: Callable[[str], bytes | None], where: str) -> Facts:
    """The facts of a finished folder. Raises Failed where it has no manifest of ours."""
    data = file(names.MANIFEST_PATH)
    if data is None:
        raise Failed("InvalidConfig", f"{where} has no {names.MANIFEST_PATH}; give the folder of a finished result")
    try:
        return read(Manifest.model_validate_json(data), file)
    except ValidationError:
        raise Failed("InvalidConfig", f"{where}/{names.MANIFEST_PATH} isn't a manifest of a result") from None


def page(facts: Facts) -> str:
    """HTML."""
    from markupsafe import Markup

    script, style = ((_HERE / name).read_text() for name in ("report.js", "report.css"))
    html: str = _template().render(
        f=facts,
        view=_view(facts),
        configuration=facts.provenance.get("configuration") or {},
        script=Markup(script),  # noqa: S704  our own file
        style=Markup(style),  # noqa: S704  our own file
        script_hash=_hash(script),
        style_hash=_hash(style),
        key=f"finetune-report/{facts.uid}/{facts.step}",
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


def _view(facts: Facts) -> _View:
    scores = facts.evaluation.scores if facts.evaluation else ()
    wanted = int((facts.provenance.get("configuration") or {}).get("evaluation", {}).get("samples") or _SHOWN)
    count = min(wanted, len(facts.samples))
    chosen = tuple(facts.samples[index * len(facts.samples) // count] for index in range(count))
    histograms = [
        Histogram(split.split, curves.bars(split.lengths.edges, split.lengths.counts))
        for split in (facts.data.splits if facts.data else ())
    ]
    return _View(
        _curves(facts),
        {score.name: curves.interval(score.low, score.high, score.difference) for score in scores},
        tuple(histogram for histogram in histograms if histogram.bars),
        chosen,
    )


def _curves(facts: Facts) -> Curves:
    """Of steps that were undone, the last time they were done counts."""
    steps = {line.step: line for line in facts.history if isinstance(line, events.StepEvent)}
    evals: dict[tuple[str, int], events.EvalEvent] = {
        (line.split, line.step): line for line in facts.history if isinstance(line, events.EvalEvent)
    }
    train = [(float(step), line.loss) for step, line in sorted(steps.items())]
    validation = {step: line.loss for (split, step), line in evals.items() if split == "validation"}
    series = [("train", train), ("smooth", curves.smoothed(train))]
    series.append(("validation", [(float(step), loss) for step, loss in sorted(validation.items())]))
    drawn = curves.chart([one for one in series if one[1]], None if facts.failure else facts.step)
    found = signal(_points(train, validation))
    said = ""
    if found is not None:
        said = (
            f"The validation loss rose from {found.best_loss:g} (step {found.best_step}) to {found.loss:g} (step "
            f"{found.step}) while the training loss fell: it learns its rows by heart."
        )
    return Curves(
        drawn,
        said,
        sum(line.seconds.get("total", 0.0) for line in facts.history if isinstance(line, events.StepEvent)),
        sum(line.tokens for line in steps.values()),
        *_rewards(steps, evals, None if facts.failure else facts.step),
    )


def _rewards(
    steps: Mapping[int, events.StepEvent], evals: Mapping[tuple[str, int], events.EvalEvent], written: int | None
) -> tuple[Chart | None, tuple[tuple[str, int, events.Rewards], ...]]:
    """The margins' curve, and the last figures of each kind; of the validation rows those of what was written."""
    train = [(float(step), line.rewards.margins) for step, line in sorted(steps.items()) if line.rewards]
    held_out = [(step, split, line.rewards) for (split, step), line in sorted(evals.items()) if line.rewards]
    validation = [(float(step), told.margins) for step, split, told in held_out if split == "validation"]
    series = [("train", train), ("smooth", curves.smoothed(train)), ("validation", validation)]
    last = [("training", step, line.rewards) for step, line in sorted(steps.items()) if line.rewards][-1:]
    for name in ("validation", "test"):
        found = [(name, step, told) for step, split, told in held_out if split == name]
        last += [one for one in found if one[1] == written] or found[-1:]
    return curves.chart([one for one in series if one[1]], written), tuple(last)


def _points(train: list[curves.Point], validation: Mapping[int, float]) -> list[Point]:
    points, before = [], 0
    for step, loss in sorted(validation.items()):
        since = [value for at, value in train if before < at <= step]
        points.append(Point(step, loss, sum(since) / len(since) if since else float("inf")))
        before = step
    return points


def _parsed(kind: type[Any], data: bytes | None) -> Any:
    try:
        return kind.model_validate_json(data) if data is not None else None
    except ValidationError:
        return None  # another version's; the page does without


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _figure(value: float | None) -> str:
    """As many digits as a person compares."""
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
