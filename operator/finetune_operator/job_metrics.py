"""job_metrics: the series of each FineTuneJob, computed from cache and reports whenever they are scraped.

Registered by the door. They outlive the job's pods: a finished job's last loss is exported for a while, so that a
scrape that came too late still finds it. Nothing is kept here, so a deleted job's series vanish with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import ValidationError

from finetune_api.progress import Progress
from finetune_api.status import TERMINAL_PHASES, ProgressStatus, Status
from finetune_operator.cache import Cache
from finetune_operator.observe import seconds_between
from finetune_operator.reports import Reports

_JOB = ["namespace", "job"]
_LONGEST_LABEL = 80

Value = Callable[[ProgressStatus, Progress | None], float | None]

_PROGRESS: tuple[tuple[str, str, Value], ...] = (
    ("finetune_job_train_loss", "Mean loss per supervised token of the last step.", lambda s, p: s.train_loss),
    ("finetune_job_eval_loss", "Mean loss per supervised token of the validation rows.", lambda s, p: s.eval_loss),
    ("finetune_job_train_reward_margin", "Of dpo: chosen less rejected reward.", lambda s, p: s.reward_margin),
    ("finetune_job_train_reward_accuracy_ratio", "Of dpo: pairs whose chosen answer has the larger reward, last step.",
     lambda s, p: s.reward_accuracy),
    ("finetune_job_eval_reward_margin", "Of dpo: the same of the validation pairs.", lambda s, p: s.eval_reward_margin),
    ("finetune_job_eval_reward_accuracy_ratio", "Of dpo: the same of the validation pairs, 0 to 1.",
     lambda s, p: s.eval_reward_accuracy),
    ("finetune_job_learning_rate", "Learning rate of the last step.", lambda s, p: p.learning_rate if p else None),
    ("finetune_job_grad_norm", "Gradient norm before clipping.", lambda s, p: p.grad_norm if p else None),
    ("finetune_job_tokens_per_second", "Tokens a second, all ranks.", lambda s, p: s.tokens_per_second),
    ("finetune_job_step", "Optimizer steps done.", lambda s, p: s.step),
    ("finetune_job_total_steps", "Optimizer steps in all.", lambda s, p: s.total_steps),
    ("finetune_job_epoch", "Passes over the data done.", lambda s, p: s.epoch),
    ("finetune_job_eta_seconds", "Seconds of training left.", lambda s, p: s.eta_seconds),
    ("finetune_job_skipped_steps", "Steps that changed nothing.", lambda s, p: s.skipped_steps),
    ("finetune_job_progress_ratio", "Share of the steps that is done, 0 to 1.", lambda s, p: _ratio(s)),
    ("finetune_job_last_progress_timestamp_seconds", "When it last reported.", lambda s, p: _epoch(s.update_time)),
)  # fmt: skip


class JobCollector(Collector):
    """Called at each scrape."""

    def __init__(self, cache: Cache, reports: Reports, retention_seconds: float) -> None:
        self._cache = cache
        self._reports = reports
        self._retention = retention_seconds

    def describe(self) -> Iterable[Metric]:
        """Empty: registering must not scrape."""
        return ()

    def collect(self) -> Iterable[Metric]:
        families = _Families()
        now = datetime.now(UTC)
        for body in self._cache.bodies():
            status = _status(body)
            if status is not None and not self._is_history(status, now):
                report = self._reports.get(str(body["metadata"]["uid"]))
                families.add(body, status, report.progress if report else None, report.time if report else None)
        return families.all()

    def _is_history(self, status: Status, now: datetime) -> bool:
        ended = status.completion_time if status.phase in TERMINAL_PHASES else None
        return ended is not None and seconds_between(ended, now) > self._retention


class _Families:
    """The metrics of one scrape, being filled."""

    def __init__(self) -> None:
        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        info = [*_JOB, "method", "base_model", "strategy"]
        self._info = gauge("finetune_job_info", "What is trained, and how.", labels=info)
        self._phase = gauge("finetune_job_phase", "1 for the phase that the job is in.", labels=[*_JOB, "phase"])
        self._condition = gauge(
            "finetune_job_status_condition", "1 where the condition is True.", labels=[*_JOB, "condition"]
        )
        self._restarts = counter("finetune_job_restarts", "Restarts of the whole group.", labels=[*_JOB, "cause"])
        self._gpus = gauge("finetune_job_gpus", "GPUs of all pods.", labels=_JOB)
        self._start = gauge("finetune_job_start_timestamp_seconds", "When the first attempt began.", labels=_JOB)
        self._end = gauge("finetune_job_completion_timestamp_seconds", "When it ended.", labels=_JOB)
        self._checkpoint = gauge("finetune_job_checkpoint_timestamp_seconds", "Of the newest.", labels=_JOB)
        self._checkpoint_step = gauge("finetune_job_checkpoint_step", "Step of the newest.", labels=_JOB)
        self._score = gauge("finetune_job_eval_score", "Score on the test rows.", labels=[*_JOB, "metric", "model"])
        self._tokens = counter("finetune_job_tokens", "Tokens trained on.", labels=[*_JOB, "attempt"])
        self._samples = counter("finetune_job_samples", "Examples trained on.", labels=[*_JOB, "attempt"])
        self._gpu_use = gauge("finetune_job_gpu_utilization_ratio", "0 to 1.", labels=[*_JOB, "gpu"])
        self._gpu_memory = gauge("finetune_job_gpu_memory_used_bytes", "Of one GPU.", labels=[*_JOB, "gpu"])
        self._progress = {name: gauge(name, text, labels=_JOB) for name, text, _ in _PROGRESS}

    def add(self, body: Mapping[str, Any], status: Status, progress: Progress | None, time: str | None) -> None:
        meta = body["metadata"]
        job = [str(meta["namespace"]), str(meta["name"])]
        self._info.add_metric([*job, *_description(body)], 1)
        self._phase.add_metric([*job, status.phase], 1)
        for condition in status.conditions:
            self._condition.add_metric([*job, condition.type], float(condition.status == "True"))
        for cause in ("application", "infrastructure", "preemption"):
            self._restarts.add_metric([*job, cause], getattr(status.restarts, cause))
        self._gpus.add_metric(job, status.gpus)
        _add(self._start, job, _epoch(status.start_time))
        _add(self._end, job, _epoch(status.completion_time))
        checkpoint = (progress.checkpoint if progress else None) or status.checkpoint
        if checkpoint and status.phase != "Succeeded":
            _add(self._checkpoint, job, _epoch(checkpoint.time))
            _add(self._checkpoint_step, job, checkpoint.step)
        for score in status.evaluation.scores if status.evaluation else ():
            self._score.add_metric([*job, score.name, "base"], score.base)
            self._score.add_metric([*job, score.name, "tuned"], score.tuned)
        self._add_progress(job, status, progress, time)

    def all(self) -> list[Metric]:
        own = [value for value in vars(self).values() if isinstance(value, Metric)]
        return [*own, *self._progress.values()]

    def _add_progress(self, job: list[str], status: Status, progress: Progress | None, time: str | None) -> None:
        """What is in memory is newer than status, but for a finished job's last word."""
        known = status.progress
        if progress is not None and status.phase not in TERMINAL_PHASES:
            known = _as_status(progress, time)
        if known is not None:
            for name, _, value in _PROGRESS:
                _add(self._progress[name], job, value(known, progress))
        if progress is None:
            return
        attempt = [*job, str(progress.attempt)]
        self._tokens.add_metric(attempt, progress.tokens)
        self._samples.add_metric(attempt, progress.samples)
        for gpu in progress.gpus:
            _add(self._gpu_use, [*job, str(gpu.index)], gpu.utilization_ratio)
            _add(self._gpu_memory, [*job, str(gpu.index)], gpu.memory_used_bytes)


def register(registry: CollectorRegistry, cache: Cache, reports: Reports, retention_seconds: float) -> None:
    """From now on every scrape has the jobs' series."""
    registry.register(JobCollector(cache, reports, retention_seconds))


def _as_status(progress: Progress, time: str | None) -> ProgressStatus:
    return ProgressStatus(
        step=progress.step,
        total_steps=progress.total_steps,
        epoch=progress.epoch,
        train_loss=progress.train_loss,
        eval_loss=progress.eval_loss,
        reward_margin=progress.reward_margin,
        reward_accuracy=progress.reward_accuracy,
        eval_reward_margin=progress.eval_reward_margin,
        eval_reward_accuracy=progress.eval_reward_accuracy,
        tokens_per_second=progress.tokens_per_second,
        eta_seconds=progress.eta_seconds,
        skipped_steps=progress.skipped_steps,
        update_time=time,
    )


def _description(body: Mapping[str, Any]) -> list[str]:
    """Method, base model without its place, strategy; from the raw body, which the API server has checked."""
    spec = body.get("spec", {})
    model = str(spec.get("model", {}).get("uri", "")).rstrip("/").rpartition("/")[2]
    strategy = str(spec.get("distribution", {}).get("strategy", "auto"))
    return [str(spec.get("method", {}).get("type", "")), model[:_LONGEST_LABEL], strategy]


def _status(body: Mapping[str, Any]) -> Status | None:
    try:
        return Status.model_validate(body.get("status") or {})
    except ValidationError:
        return None


def _add(family: GaugeMetricFamily, labels: list[str], value: float | None) -> None:
    if value is not None:
        family.add_metric(labels, value)


def _ratio(progress: ProgressStatus) -> float | None:
    return progress.step / progress.total_steps if progress.total_steps else None


def _epoch(time: str | None) -> float | None:
    return datetime.fromisoformat(time).timestamp() if time else None
