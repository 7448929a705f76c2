"""Computes how well a run uses its GPUs from its plan and its last steps. Pure."""

from __future__ import annotations

from collections import deque

from finetune_api.messages.events import PlanEvent, StepEvent

_STEPS = 20


class Speed:
    """The speed over the last 20 steps. `plan` is None until it is known."""

    def __init__(self, gpu_count: int) -> None:
        self.plan: PlanEvent | None = None
        self._gpu_count = gpu_count
        self._recent: deque[tuple[int, float]] = deque(maxlen=_STEPS)

    def add(self, step: StepEvent) -> None:
        """Adds a step."""
        self._recent.append((step.tokens, step.seconds.get("total", 0.0)))

    @property
    def tokens_per_gpu(self) -> float | None:
        """Tokens per second and GPU; None without GPUs or steps."""
        seconds = sum(seconds for _, seconds in self._recent)
        if not self._gpu_count or seconds <= 0:
            return None
        return sum(tokens for tokens, _ in self._recent) / seconds / self._gpu_count

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization (the formula is in `finetune_trainer.model.flops`); None if the
        FLOPs of a token or the peak of the GPU aren't known."""
        tokens, plan = self.tokens_per_gpu, self.plan
        if tokens is None or plan is None or not plan.flops_per_token or not plan.peak_flops:
            return None
        return tokens * plan.flops_per_token / plan.peak_flops
