"""Serves the metrics that Prometheus scrapes from a trainer pod.

The supervisor serves them, so they outlive a rank that was killed. A series exists once its
value is known. No label holds a step, a URI or a UID, so the number of series stays small.
"""

from __future__ import annotations

from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from finetune_api.messages import events as e
from finetune_api.messages.events import SkipReason
from finetune_api.messages.run import JobRef
from finetune_trainer.log import Log
from finetune_trainer.reporting.gpus.collector import GpuCollector, ObservedGpus
from finetune_trainer.reporting.gpus.speed import Speed

_LABELS = ("namespace", "job", "attempt")
_STEP_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 150.0, 600.0)


class Metrics:
    """Holds the metrics of one attempt, in a registry of their own."""

    def __init__(self, job: JobRef, gpus: ObservedGpus, gpu_count: int = 0) -> None:
        """`gpu_count` is the number of GPUs of all pods, one for each rank; 0 without GPUs."""
        self.registry = CollectorRegistry(auto_describe=True)
        self._speed = Speed(gpu_count)
        self._job = {"namespace": job.namespace, "job": job.name, "attempt": str(job.attempt)}
        self._total_steps = 0
        self.registry.register(GpuCollector(gpus, self._job))
        self._define_losses()
        self._define_steps()
        self._define_ranks()
        self._define_checkpoints()
        self._phase_seconds = self._counter(
            "finetune_phase_seconds",
            "Time in each phase: fetching, checking, loading, tokenizing, training and so on.",
            "phase",
        )

    def _define_losses(self) -> None:
        self._train_loss = self._gauge(
            "finetune_train_loss", "Mean loss of the last step per supervised token (DPO: per pair)."
        )
        self._eval_loss = self._gauge(
            "finetune_eval_loss", "Mean loss of a held-out split per supervised token (DPO: per pair).", "split"
        )
        self._reward = self._gauge(
            "finetune_train_reward",
            "DPO: beta times the log-probability gain of an answer over the reference, in the last step.",
            "answer",
        )
        self._log_p = self._gauge(
            "finetune_train_log_probability", "DPO: log-probability of a full answer, in the last step.", "answer"
        )
        self._margin = self._gauge(
            "finetune_train_reward_margin", "DPO: chosen reward minus rejected reward, in the last step."
        )
        self._accuracy = self._gauge(
            "finetune_train_reward_accuracy_ratio",
            "DPO: share of pairs whose chosen reward is larger, in the last step, 0 to 1.",
        )
        self._eval_margin = self._gauge(
            "finetune_eval_reward_margin", "DPO: chosen reward minus rejected reward, on a held-out split.", "split"
        )
        self._eval_accuracy = self._gauge(
            "finetune_eval_reward_accuracy_ratio",
            "DPO: share of pairs whose chosen reward is larger, on a held-out split, 0 to 1.",
            "split",
        )
        self._score = self._gauge(
            "finetune_eval_score", "Score of the base model and of the result on the test rows.", "metric", "model"
        )

    def _define_steps(self) -> None:
        self._learning_rate = self._gauge("finetune_learning_rate", "Learning rate of the last step.")
        self._grad_norm = self._gauge("finetune_grad_norm", "Global L2 norm of the gradient before clipping.")
        self._steps = self._counter("finetune_train_steps", "Optimizer steps of this attempt.")
        self._tokens = self._counter("finetune_train_tokens", "Tokens trained on by all ranks, without padding.")
        self._samples = self._counter("finetune_train_samples", "Examples trained on by all ranks.")
        self._skipped = self._counter(
            "finetune_train_skipped_steps", "Steps that changed nothing, by reason (see docs/guide.md).", "reason"
        )
        self._spikes = self._counter("finetune_train_loss_spikes", "Loss spikes.")
        self._halvings = self._gauge(
            "finetune_train_micro_batch_halvings", "How often micro-batches were halved for lack of memory."
        )
        self._step_seconds = Histogram(
            "finetune_train_step_duration_seconds",
            "Wall time of a step, by part (phase=total is the full step).",
            (*_LABELS, "phase"),
            registry=self.registry,
            buckets=_STEP_BUCKETS,
        )
        self._ratio = self._gauge("finetune_train_progress_ratio", "Share of all steps that are done, 0 to 1.")
        self._last_step = self._gauge(
            "finetune_train_last_step_timestamp_seconds", "Unix time at which the last step ended."
        )
        self._padding = self._gauge("finetune_train_padding_ratio", "Share of computed positions that hold no token.")

    def _define_ranks(self) -> None:
        self._slowest = self._gauge(
            "finetune_train_slowest_rank_seconds",
            "Time that the slowest rank needed for its own part of the last step, before the ranks met.",
        )
        self._fastest = self._gauge("finetune_train_fastest_rank_seconds", "The same of the fastest rank.")
        self._slowest_rank = self._gauge("finetune_train_slowest_rank", "Number of the slowest rank of the last step.")
        self._straggler = self._gauge(
            "finetune_train_straggler_ratio",
            "Time per token of a rank that stays slower than the others, divided by their median; 1 if there is none.",
        )
        self._network = self._gauge(
            "finetune_network_bytes_per_second", "Bandwidth of each node in an all-reduce at the start."
        )
        self._gpu_tokens = self._gauge(
            "finetune_train_tokens_per_second_per_gpu",
            "Tokens per second and GPU over the last 20 steps, without evaluations and checkpoints.",
        )
        self._mfu = self._gauge(
            "finetune_train_mfu_ratio",
            "Model FLOPs utilization over the last 20 steps, 0 to 1: the share of the GPUs' bfloat16 peak that the "
            "model's necessary operations use. Absent for other dtypes, unknown GPUs and MIG slices.",
        )

    def _define_checkpoints(self) -> None:
        self._checkpoint_seconds = self._gauge(
            "finetune_checkpoint_duration_seconds", "Duration of the last checkpoint, by tier (local, remote).", "tier"
        )
        self._checkpoint_stall = self._counter(
            "finetune_checkpoint_stall_seconds", "Time for which checkpoints paused training."
        )
        self._checkpoint_bytes = self._counter("finetune_checkpoint_bytes", "Bytes of checkpoints, by tier.", "tier")
        self._checkpoint_time = self._gauge(
            "finetune_checkpoint_last_success_timestamp_seconds",
            "Unix time at which the last checkpoint was complete, by tier.",
            "tier",
        )
        self._checkpoint_failures = self._counter(
            "finetune_checkpoint_upload_failures", "Checkpoints that could not be uploaded."
        )
        # Exported as 0 from the start, since increase() doesn't see the step from absent to 1.
        self._checkpoint_failures.labels(**self._job)

    def serve(self, port: int, log: Log) -> None:
        """Serves /metrics from a thread, unless `port` is 0.

        If the port is in use, there are no metrics, but training continues.
        """
        if port == 0:
            return
        try:
            start_http_server(port, registry=self.registry)
        except OSError as error:
            log.warning("metrics can't be served; training continues", port=port, detail=str(error))

    def observe(self, event: e.Event) -> None:
        """Updates the metrics from one of rank 0's events."""
        match event:
            case e.PlanEvent():
                self._total_steps = event.total_steps
                self._set(self._padding, event.padding_share)
                self._set(self._halvings, event.halvings)
                self._spikes.labels(**self._job)
                self._set(self._straggler, 1.0)
                self._speed.plan = event
                # A counter starts at 0, or Prometheus would see no increase at the first step.
                for reason in get_args(SkipReason):
                    self._skipped.labels(**self._job, reason=reason)
            case e.StepEvent():
                self._set(self._train_loss, event.loss)
                self._set(self._learning_rate, event.learning_rate)
                self._set_rewards(event.rewards)
                self._set(self._grad_norm, event.grad_norm)
                self._set(self._last_step, event.time)
                self._steps.labels(**self._job).inc()
                self._tokens.labels(**self._job).inc(event.tokens)
                self._samples.labels(**self._job).inc(event.samples)
                for phase, seconds in event.seconds.items():
                    self._step_seconds.labels(**self._job, phase=phase).observe(seconds)
                self._set_ratio(event.step)
                self._observe_speed(event)
            case e.NetworkEvent():
                self._set(self._network, event.bytes_per_second)
            case e.StragglerEvent():
                self._set(self._straggler, 1.0 if event.ended else event.ratio)
            case e.SkippedEvent():
                self._skipped.labels(**self._job, reason=event.reason).inc(event.step - event.first + 1)
                self._set_ratio(event.step)
            case e.SpikeEvent():
                self._spikes.labels(**self._job).inc()
            case e.BackoffEvent():
                self._set(self._halvings, event.halvings)
            case e.EvalEvent():
                self._set(self._eval_loss, event.loss, split=event.split)
                if event.rewards is not None:
                    self._set(self._eval_margin, event.rewards.margins, split=event.split)
                    self._set(self._eval_accuracy, event.rewards.accuracies, split=event.split)
            case e.ScoresEvent():
                for score in event.evaluation.scores:
                    self._set(self._score, score.base, metric=score.name, model="base")
                    self._set(self._score, score.tuned, metric=score.name, model="tuned")
            case e.CheckpointEvent():
                self.record_checkpoint(tier="local", seconds=event.seconds, size=event.bytes, at=event.time)
                self._checkpoint_stall.labels(**self._job).inc(event.stall_seconds)
            case _:
                return

    def _observe_speed(self, event: e.StepEvent) -> None:
        self._speed.add(event)
        if self._speed.tokens_per_gpu is not None:
            self._set(self._gpu_tokens, self._speed.tokens_per_gpu)
        if self._speed.mfu is not None:
            self._set(self._mfu, self._speed.mfu)
        if event.ranks is not None:
            self._set(self._slowest, event.ranks.slowest)
            self._set(self._fastest, event.ranks.fastest)
            self._set(self._slowest_rank, event.ranks.slowest_rank)

    def _set_rewards(self, rewards: e.Rewards | None) -> None:
        if rewards is None:
            return
        self._set(self._margin, rewards.margins)
        self._set(self._accuracy, rewards.accuracies)
        self._set(self._reward, rewards.chosen, answer="chosen")
        self._set(self._reward, rewards.rejected, answer="rejected")
        self._set(self._log_p, rewards.logps_chosen, answer="chosen")
        self._set(self._log_p, rewards.logps_rejected, answer="rejected")

    def _set_ratio(self, step: int) -> None:
        if self._total_steps:
            self._set(self._ratio, step / self._total_steps)

    def record_checkpoint(self, *, tier: str, seconds: float, size: int, at: float) -> None:
        """Records a complete checkpoint.

        `tier` is "local" (this node's disk) or "remote" (the output), `seconds` its duration,
        `size` its bytes and `at` the Unix time of its completion.
        """
        self._set(self._checkpoint_seconds, seconds, tier=tier)
        self._set(self._checkpoint_time, at, tier=tier)
        self._checkpoint_bytes.labels(**self._job, tier=tier).inc(size)

    def count_failed_checkpoint(self) -> None:
        """Counts a checkpoint that could not be uploaded."""
        self._checkpoint_failures.labels(**self._job).inc()

    def add_phase_seconds(self, phase: str, seconds: float) -> None:
        """Adds time that was spent in a phase since the last call."""
        self._phase_seconds.labels(**self._job, phase=phase).inc(seconds)

    def _set(self, gauge: Gauge, value: float, **labels: str) -> None:
        gauge.labels(**self._job, **labels).set(value)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, (*_LABELS, *labels), registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, (*_LABELS, *labels), registry=self.registry)
