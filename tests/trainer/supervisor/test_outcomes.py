"""What a pod says of its end: it names a step only if it knows it."""

from __future__ import annotations

import pytest

from finetune_api.status import CheckpointStatus
from finetune_trainer.reporting.run_state import RunState
from finetune_trainer.supervisor.outcomes import preempted

_CHECKPOINT = CheckpointStatus(step=40, uri="s3://outputs/result/checkpoints/step-40", time="2026-01-01T00:00:00Z")


@pytest.mark.parametrize(
    ("step", "checkpoint", "message"),
    [
        (0, None, "asked to stop"),
        (47, None, "asked to stop at step 47"),
        (47, _CHECKPOINT, "asked to stop at step 47; the next attempt resumes from step 40"),
        (0, _CHECKPOINT, "asked to stop; the next attempt resumes from step 40"),
    ],
    ids=["neither is known", "no checkpoint", "both", "before the first step of a resumed attempt"],
)
def test_only_known_steps_are_named(step: int, checkpoint: CheckpointStatus | None, message: str) -> None:
    assert preempted(RunState(step=step), checkpoint, None).message == message
