"""The figures of preference tuning, from a rank's event to the places where they are shown."""

from __future__ import annotations

import json
from typing import Any

from prometheus_client import CollectorRegistry

from finetune_api import names
from finetune_api.messages import events
from finetune_api.messages.manifest import Manifest, ManifestJob
from finetune_api.messages.run import JobRef
from finetune_cli import screen
from finetune_trainer.reporting import run_state
from finetune_trainer.reporting.gpus.watch import Gpus
from finetune_trainer.reporting.html import page
from finetune_trainer.reporting.progress import Stored, progress_of
from finetune_trainer.reporting.prometheus import Metrics
from finetune_trainer.reporting.trackers import scalars
from finetune_trainer.supervisor import provenance

_REWARDS = events.Rewards(
    chosen=0.25, rejected=-0.5, margins=0.75, accuracies=0.875, logps_chosen=-20.0, logps_rejected=-32.5
)


def _step(step: int, rewards: events.Rewards | None = _REWARDS) -> events.StepEvent:
    return events.StepEvent(
        time=0, step=step, epoch=1, loss=0.5, learning_rate=1, grad_norm=1, tokens=10, label_tokens=8, samples=8,
        seconds={"total": 0.5}, rewards=rewards,
    )  # fmt: skip


def _eval(step: int, split: Any, **other: float) -> events.EvalEvent:
    rewards = _REWARDS.model_copy(update=other)
    return events.EvalEvent(time=0, step=step, split=split, loss=0.4, label_tokens=8, rewards=rewards)


_LINES = (
    _step(1), _step(2), _eval(2, "validation", accuracies=0.75, margins=0.6), _eval(0, "test"), _step(3),
    _eval(3, "validation", accuracies=0.625, margins=0.5), _eval(3, "test", accuracies=0.7, margins=0.9),
)  # fmt: skip


def _folded() -> run_state.RunState:
    now = run_state.RunState()
    for event in (*_LINES, events.SavedEvent(time=1, path="/x", step=2)):
        now = run_state.after(now, event)
    return now


def test_the_lines_of_the_history_round_trip_and_have_no_rewards_without_preferences() -> None:
    for event in _LINES:
        assert events.decode(events.encode(event)) == event
    assert json.loads(events.encode(_step(1)))["rewards"]["logpsChosen"] == -20.0
    assert "rewards" not in json.loads(events.encode(_step(1, None)))


def test_trackers_get_the_figures_by_trls_names() -> None:
    (point,) = scalars.points(_eval(2, "validation"))
    assert point.values == {
        "validation/loss": 0.4, "validation/rewards/chosen": 0.25, "validation/rewards/rejected": -0.5,
        "validation/rewards/margins": 0.75, "validation/rewards/accuracies": 0.875, "validation/logps/chosen": -20.0,
        "validation/logps/rejected": -32.5,
    }  # fmt: skip
    (train,), (without,) = scalars.points(_step(1)), scalars.points(_step(1, None))
    assert {name for name in train.values if name not in without.values} == {
        name.replace("validation", "train") for name in point.values if name != "validation/loss"
    }


def test_prometheus_gets_the_figures() -> None:
    metrics = Metrics(JobRef(namespace="n", name="j", uid="u", attempt=1), Gpus())
    for event in _LINES:
        metrics.observe(event)

    def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, {"namespace": "n", "job": "j", "attempt": "1", **labels})

    values = {
        (name, *labels.values()): value(metrics.registry, f"finetune_{name}", **labels)
        for name, labels in (
            ("train_reward", {"answer": "chosen"}), ("train_reward", {"answer": "rejected"}),
            ("train_log_probability", {"answer": "chosen"}), ("train_log_probability", {"answer": "rejected"}),
            ("train_reward_margin", {}), ("train_reward_accuracy_ratio", {}),
            ("eval_reward_margin", {"split": "validation"}), ("eval_reward_accuracy_ratio", {"split": "validation"}),
            ("eval_reward_accuracy_ratio", {"split": "test"}),
        )
    }  # fmt: skip
    assert list(values.values()) == [0.25, -0.5, -20.0, -32.5, 0.75, 0.875, 0.5, 0.625, 0.7]


def test_progress_has_the_latest_figures_and_the_result_those_of_the_written_weights() -> None:
    now = _folded()
    progress = progress_of(now, attempt=1, phase="training", message="", stored=Stored(), model=None)
    assert (progress.reward_margin, progress.reward_accuracy) == (0.75, 0.875)
    assert (progress.eval_reward_margin, progress.eval_reward_accuracy) == (0.5, 0.625)
    assert (progress.test_reward_margin, progress.test_reward_accuracy) == (0.9, 0.7)
    assert "accuracy 0.875  margin 0.7500" in screen.figures(progress)
    ended = now.evaluation
    assert ended is not None
    assert (ended.eval_reward_margin, ended.eval_reward_accuracy) == (0.6, 0.75)
    figures = provenance.metrics(now)
    assert (figures["evalRewardAccuracy"], figures["testRewardMargin"]) == (0.75, 0.9)
    assert "validation pairs: 75.0% ranked correctly, reward margin 0.6000" in screen.losses(figures)


def test_the_report_shows_the_curves_and_the_last_figures() -> None:
    manifest = Manifest(
        kind="adapter", job=ManifestJob(namespace="d", name="n", uid="u", attempt=1), step=2, created="", files=(),
        provenance={"configuration": {"training": {"objective": "dpo"}}}, metrics=provenance.metrics(_folded()),
    )  # fmt: skip
    history = "".join(events.encode(line) + "\n" for line in _LINES).encode()
    html = page.page(page.read(manifest, {names.HISTORY_PATH: history}.get))
    for text in ("75.0%", "per pair", "Reward margin by optimizer step", ">-32.5<", "Test pairs"):
        assert text in html, text
    supervised = "".join(events.encode(_step(n, None)) + "\n" for n in (1, 2)).encode()
    html = page.page(page.read(manifest, {names.HISTORY_PATH: supervised}.get))
    assert "Reward margin by optimizer step" not in html
