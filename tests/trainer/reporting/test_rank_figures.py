"""What is shown of the ranks' speed and of the network: metrics, status and the log."""

from __future__ import annotations

import json

import pytest
from prometheus_client import CollectorRegistry

from finetune_api.messages import events
from finetune_api.messages.run import JobRef
from finetune_api.status import StragglerStatus
from finetune_trainer.log import Log
from finetune_trainer.reporting import event_log, run_state
from finetune_trainer.reporting.gpus.watch import Gpus
from finetune_trainer.reporting.progress import Stored, progress_of
from finetune_trainer.reporting.prometheus import Metrics

_PLAN = events.PlanEvent(
    time=0, total_steps=9, epochs=1, rows=9, tokens_per_epoch=9, label_tokens_per_epoch=9, padding_share=0,
    parameters=1, trainable_parameters=1, flops_per_token=50e9, peak_flops=1000e12,
)  # fmt: skip
_STEP = events.StepEvent(
    time=0, step=1, epoch=1, loss=1, learning_rate=1, grad_norm=1, tokens=32_000, label_tokens=1, samples=1,
    seconds={"total": 1.0}, ranks=events.RankSeconds(fastest=0.5, slowest=0.9, slowest_rank=3),
)  # fmt: skip
_SLOW = events.StragglerEvent(time=0, step=21, rank=3, node=1, ratio=1.234)
_RECOVERED = _SLOW.model_copy(update={"ended": True})
_NETWORK = events.NetworkEvent(time=0, bytes_per_second=3e9, backend="NCCL", warning="too slow for fsdp")


def _value(registry: CollectorRegistry, name: str) -> float | None:
    return registry.get_sample_value(name, {"namespace": "n", "job": "j", "attempt": "1"})


def _metrics(gpu_count: int, *observed: events.Event) -> CollectorRegistry:
    metrics = Metrics(JobRef(namespace="n", name="j", uid="u", attempt=1), Gpus(), gpu_count)
    for event in observed:
        metrics.observe(event)
    return metrics.registry


def test_speed_is_shown_by_gpu_and_as_a_share_of_the_peak() -> None:
    registry = _metrics(4, _PLAN, _STEP, _NETWORK)
    assert _value(registry, "finetune_train_tokens_per_second_per_gpu") == 8000
    assert _value(registry, "finetune_train_mfu_ratio") == pytest.approx(0.4)
    assert _value(registry, "finetune_train_slowest_rank_seconds") == 0.9
    assert _value(registry, "finetune_train_fastest_rank_seconds") == 0.5
    assert _value(registry, "finetune_train_slowest_rank") == 3
    assert _value(registry, "finetune_train_straggler_ratio") == 1
    assert _value(registry, "finetune_network_bytes_per_second") == 3e9


def test_without_gpus_there_is_no_speed_by_gpu() -> None:
    registry = _metrics(0, _PLAN, _STEP.model_copy(update={"ranks": None}))
    for name in ("train_tokens_per_second_per_gpu", "train_mfu_ratio", "train_slowest_rank"):
        assert _value(registry, f"finetune_{name}") is None


def test_a_straggler_is_shown_until_it_has_recovered() -> None:
    assert _value(_metrics(0, _PLAN, _SLOW), "finetune_train_straggler_ratio") == 1.234
    assert _value(_metrics(0, _PLAN, _SLOW, _RECOVERED), "finetune_train_straggler_ratio") == 1
    state = run_state.after(run_state.RunState(), _SLOW)
    posted = progress_of(state, attempt=1, phase="training", message="", stored=Stored(), model=None)
    assert posted.straggler == StragglerStatus(rank=3, node=1, ratio=1.23)
    assert run_state.after(state, _RECOVERED).straggler is None


@pytest.mark.parametrize(
    ("event", "level", "text"),
    [
        (_SLOW, "warning", "rank 3 is slower than the others"),
        (_RECOVERED, "info", "rank 3 is no longer slower than the others"),
        (_NETWORK, "warning", "network: too slow for fsdp"),
    ],
    ids=["straggler", "recovered", "network"],
)
def test_the_log_has_what_people_look_for(
    event: events.Event, level: str, text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    event_log.log_event(Log(), event)
    (line,) = capfd.readouterr().out.splitlines()
    record = json.loads(line)
    assert (record["level"], record["message"]) == (level, text)
