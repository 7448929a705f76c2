"""Exports metrics of every FineTuneJob, computed from the cache and the reports at each scrape.

They outlive the job's pods: a finished job's last loss is exported for a while, so that a late
scrape still gets it. Nothing is stored here, so the metrics of a deleted job disappear with it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from finetune_api.messages.progress import Progress
from finetune_api.reasons import REASONS
from finetune_api.status import (
    CONDITION_CHECKPOINTS_STORED,
    CONDITION_COMPLETE,
    CONDITION_FAILED,
    CONDITION_RECONCILING,
    CONDITION_STALLED,
    CONDITION_SUSPENDED,
    TERMINAL_PHASES,
    ProgressStatus,
    Status,
    read,
)
from finetune_api.untrusted import line, seconds
from finetune_operator.controller.cache import Cache
from finetune_operator.controller.progress_store import ProgressStore
from finetune_operator.core.objects import Report, seconds_between

log = logging.getLogger(__name__)

_JOB = ["namespace", "job"]
_MAX_LABEL_CHARACTERS = 80
_CONDITIONS = (
    CONDITION_COMPLETE, CONDITION_FAILED, CONDITION_SUSPENDED, CONDITION_RECONCILING, CONDITION_STALLED,
    CONDITION_CHECKPOINTS_STORED,
)  # fmt: skip
_SCORES = ("rouge1", "rouge2", "rougeL", "bleu", "exactMatch", "f1", "perplexity")

_Value = Callable[[ProgressStatus, Progress | None], float | None]

_PROGRESS: tuple[tuple[str, str, _Value], ...] = (
    ("finetune_job_train_loss", "Mean loss per supervised token of the last step.", lambda s, p: s.train_loss),
    ("finetune_job_eval_loss", "Mean loss per supervised token of the validation rows.", lambda s, p: s.eval_loss),
    ("finetune_job_train_reward_margin", "DPO: mean reward margin of the last step.", lambda s, p: s.reward_margin),
    ("finetune_job_train_reward_accuracy_ratio", "DPO: reward accuracy of the last step, 0 to 1.",
     lambda s, p: s.reward_accuracy),
    ("finetune_job_eval_reward_margin", "DPO: mean reward margin of the validation pairs.",
     lambda s, p: s.eval_reward_margin),
    ("finetune_job_eval_reward_accuracy_ratio", "DPO: reward accuracy of the validation pairs, 0 to 1.",
     lambda s, p: s.eval_reward_accuracy),
    ("finetune_job_learning_rate", "Learning rate of the last step.", lambda s, p: p.learning_rate if p else None),
    ("finetune_job_grad_norm", "Gradient norm before clipping.", lambda s, p: p.grad_norm if p else None),
    ("finetune_job_tokens_per_second", "Tokens per second, all ranks together.", lambda s, p: s.tokens_per_second),
    ("finetune_job_step", "Finished optimizer steps.", lambda s, p: s.step),
    ("finetune_job_total_steps", "Total number of optimizer steps.", lambda s, p: s.total_steps),
    ("finetune_job_epoch", "Finished passes over the data.", lambda s, p: s.epoch),
    ("finetune_job_eta_seconds", "Estimated seconds of training left.", lambda s, p: s.eta_seconds),
    ("finetune_job_skipped_steps", "Steps that were skipped or rolled back.", lambda s, p: s.skipped_steps),
    ("finetune_job_progress_ratio", "Finished share of the steps, 0 to 1.", lambda s, p: _ratio(s)),
    ("finetune_job_last_progress_timestamp_seconds", "When the job last reported.", lambda s, p: _epoch(s.update_time)),
)  # fmt: skip


class JobCollector(Collector):
    """Computes the metrics of all jobs at each scrape."""

    def __init__(self, cache: Cache, progress: ProgressStore, retention_seconds: float) -> None:
        self._cache = cache
        self._progress = progress
        self._retention = retention_seconds
        self._statuses: dict[str, tuple[str, Status]] = {}  # by uid, with the version of the object

    def describe(self) -> Iterable[Metric]:
        """Returns nothing, so that registering the collector doesn't collect."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Returns the metrics of all jobs, except those that ended before the retention period."""
        families = _Families()
        now = datetime.now(UTC)
        statuses: dict[str, tuple[str, Status]] = {}
        for body in self._cache.bodies():
            uid, version = str(body["metadata"]["uid"]), str(body["metadata"].get("resourceVersion"))
            parsed = self._statuses.get(uid)
            statuses[uid] = parsed if parsed and parsed[0] == version else (version, read(body.get("status")))
            status = statuses[uid][1]
            if self._is_expired(status, now):
                continue
            try:
                families.add(body, status, self._progress.get(uid))
            except Exception:  # whatever one job contains, the others are exported
                log.exception("metrics of a job can't be exported", extra={"job": body["metadata"].get("name")})
        self._statuses = statuses
        return families.all()

    def _is_expired(self, status: Status, now: datetime) -> bool:
        ended = status.completion_time if status.phase in TERMINAL_PHASES else None
        return ended is not None and seconds_between(ended, now) > self._retention


class _Families:
    """Collects the metrics of one scrape."""

    def __init__(self) -> None:
        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        info = [*_JOB, "method", "base_model", "strategy"]
        self._info = gauge("finetune_job_info", "Method, base model and strategy of the job; always 1.", labels=info)
        self._phase = gauge("finetune_job_phase", "1 for the phase that the job is in.", labels=[*_JOB, "phase"])
        self._reason = gauge(
            "finetune_job_reason", "1 for why the job waits, was last restarted, or failed.", labels=[*_JOB, "reason"]
        )
        self._trainer_phase = gauge(
            "finetune_job_trainer_phase",
            "1 for what the trainer does: fetching, loading, training, evaluating and so on.",
            labels=[*_JOB, "phase"],
        )
        self._condition = gauge(
            "finetune_job_status_condition", "1 if the condition is True.", labels=[*_JOB, "condition"]
        )
        self._restarts = counter("finetune_job_restarts", "Restarts of the whole group.", labels=[*_JOB, "cause"])
        self._gpus = gauge("finetune_job_gpus", "GPUs of all pods.", labels=_JOB)
        self._start = gauge("finetune_job_start_timestamp_seconds", "When the first attempt was created.", labels=_JOB)
        self._end = gauge("finetune_job_completion_timestamp_seconds", "When the job ended.", labels=_JOB)
        self._checkpoint = gauge(
            "finetune_job_checkpoint_timestamp_seconds", "When the newest checkpoint was completed.", labels=_JOB
        )
        self._checkpoint_step = gauge(
            "finetune_job_checkpoint_step", "Optimizer step of the newest checkpoint.", labels=_JOB
        )
        self._steps_at_risk = gauge(
            "finetune_job_steps_at_risk",
            "Steps that would be lost if the pods ended now, while checkpoints can't be stored; else 0.",
            labels=_JOB,
        )
        self._score = gauge("finetune_job_eval_score", "Score on the test rows.", labels=[*_JOB, "metric", "model"])
        self._tokens = counter("finetune_job_tokens", "Tokens trained on.", labels=[*_JOB, "attempt"])
        self._samples = counter("finetune_job_samples", "Examples trained on.", labels=[*_JOB, "attempt"])
        self._gpu_use = gauge(
            "finetune_job_gpu_utilization_ratio", "Utilization of one GPU, 0 to 1.", labels=[*_JOB, "gpu"]
        )
        self._gpu_memory = gauge("finetune_job_gpu_memory_used_bytes", "Used memory of one GPU.", labels=[*_JOB, "gpu"])
        self._progress = {name: gauge(name, text, labels=_JOB) for name, text, _ in _PROGRESS}

    def add(self, body: Mapping[str, Any], status: Status, report: Report | None) -> None:
        """Adds the metrics of one job."""
        progress = report.progress if report else None
        meta = body["metadata"]
        job = [str(meta["namespace"]), str(meta["name"])]
        self._info.add_metric([*job, *_description(body)], 1)
        self._phase.add_metric([*job, status.phase], 1)
        if status.reason:
            self._reason.add_metric([*job, _known_reason(status)], 1)
        for condition in (c for c in status.conditions if c.type in _CONDITIONS):
            self._condition.add_metric([*job, condition.type], float(condition.status == "True"))
        for cause in ("application", "memory", "infrastructure", "preemption"):
            self._restarts.add_metric([*job, cause], getattr(status.restarts, cause))
        self._gpus.add_metric(job, status.gpus or 0)
        _add_if_set(self._start, job, _epoch(status.start_time))
        _add_if_set(self._end, job, _epoch(status.completion_time))
        checkpoint = (progress.checkpoint if progress else None) or status.checkpoint
        if checkpoint and status.phase != "Succeeded":
            _add_if_set(self._checkpoint, job, _epoch(checkpoint.time))
            _add_if_set(self._checkpoint_step, job, checkpoint.step)
        if progress and progress.storing and status.phase not in TERMINAL_PHASES:
            self._steps_at_risk.add_metric(job, progress.storing.steps_at_risk)
        scores = {score.name: score for score in (status.evaluation.scores if status.evaluation else ())}
        for score in (scores[name] for name in _SCORES if name in scores):
            self._score.add_metric([*job, score.name, "base"], score.base)
            self._score.add_metric([*job, score.name, "tuned"], score.tuned)
        self._add_progress(job, status, report)

    def all(self) -> list[Metric]:
        """Returns all metrics that have been added."""
        families = [value for value in vars(self).values() if isinstance(value, Metric)]
        return [*families, *self._progress.values()]

    def _add_progress(self, job: list[str], status: Status, report: Report | None) -> None:
        """Adds the figures of the report, or of status once the job has ended."""
        progress = report.progress if report else None
        current = status.progress
        if report is not None and status.phase not in TERMINAL_PHASES:
            current = _as_status(report)
        if current is not None:
            for name, _, value in _PROGRESS:
                _add_if_set(self._progress[name], job, value(current, progress))
        if progress is None:
            return
        if status.phase == "Running":
            self._trainer_phase.add_metric([*job, progress.phase], 1)
        attempt = [*job, str(progress.attempt)]
        self._tokens.add_metric(attempt, progress.tokens)
        self._samples.add_metric(attempt, progress.samples)
        for gpu in progress.gpus:
            _add_if_set(self._gpu_use, [*job, str(gpu.index)], gpu.utilization_ratio)
            _add_if_set(self._gpu_memory, [*job, str(gpu.index)], gpu.memory_used_bytes)


def register(registry: CollectorRegistry, cache: Cache, progress: ProgressStore, retention_seconds: float) -> None:
    """Adds the jobs' metrics to every scrape of the registry."""
    registry.register(JobCollector(cache, progress, retention_seconds))


def _as_status(report: Report) -> ProgressStatus:
    """Returns a report's figures without the rounding of status.progress."""
    progress = report.progress
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
        update_time=report.time,
    )


def _description(body: Mapping[str, Any]) -> list[str]:
    """Returns method, base model (without its folder) and strategy of a raw body.

    The API server has validated the body.
    """
    spec = body.get("spec", {})
    model = str(spec.get("model", {}).get("uri", "")).rstrip("/").rpartition("/")[2]
    strategy = str(spec.get("distribution", {}).get("strategy", "auto"))
    method = str(spec.get("method", {}).get("type", ""))
    return [line(text, _MAX_LABEL_CHARACTERS) for text in (method, model, strategy)]


def _known_reason(status: Status) -> str:
    """Returns the reason of a status. That of a failure may be any name that a pod has made up, so
    one that isn't known is `Other`: a label has few values."""
    is_of_failure = status.failure is not None and status.reason == status.failure.reason
    return "Other" if is_of_failure and status.reason not in REASONS else status.reason


def _add_if_set(family: GaugeMetricFamily, labels: list[str], value: float | None) -> None:
    if value is not None:
        family.add_metric(labels, value)


def _ratio(progress: ProgressStatus) -> float | None:
    return progress.step / progress.total_steps if progress.total_steps else None


def _epoch(time: str | None) -> float | None:
    return seconds(time) if time else None
