"""The learning rate, compared with its closed forms and with Transformers' schedulers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import optimization

from finetune_api.resource import TrainingSpec
from finetune_trainer.training import lr_schedule

_FALLING = ["linear", "cosine", "wsd"]


def _rates(total: int, **recipe: Any) -> list[float]:
    spec = TrainingSpec(**{"learning_rate": 1.0, "warmup_ratio": 0.0, **recipe})
    return [lr_schedule.learning_rate(step, total, spec) for step in range(1, total + 1)]


@given(
    st.sampled_from(["constant", "inverse_sqrt", *_FALLING]),
    st.integers(1, 300),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_the_rate_rises_to_its_peak_then_falls_and_is_never_zero(
    kind: str, total: int, warmup: float, decay: float, floor: float
) -> None:
    floor = floor if kind in _FALLING else 0.0
    rates = _rates(total, scheduler=kind, warmup_ratio=warmup, decay_ratio=decay, min_learning_rate_ratio=floor)
    top = rates.index(max(rates))
    assert max(rates) == pytest.approx(1)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == pytest.approx(sorted(rates[top:], reverse=True))
    assert min(rates) > 0
    assert min(rates[top:]) >= floor - 1e-12


def test_the_rate_is_its_closed_form() -> None:
    warm = [1 / 3, 2 / 3]
    assert _rates(10, scheduler="constant", warmup_ratio=0.2) == pytest.approx([*warm, *[1.0] * 8])
    assert _rates(10, scheduler="linear", warmup_ratio=0.2) == pytest.approx([*warm, *[1 - k / 8 for k in range(8)]])
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)]
    assert _rates(10, scheduler="cosine", warmup_ratio=0.2, min_learning_rate_ratio=0.1) == pytest.approx(
        [*warm, *cosine]
    )
    wsd = [*[1.0] * 4, *[1 - math.sqrt(k / 4) for k in range(4)]]
    assert _rates(10, scheduler="wsd", warmup_ratio=0.2, decay_ratio=0.4) == pytest.approx([*warm, *wsd])
    assert _rates(10, scheduler="inverse_sqrt", warmup_ratio=0.2) == pytest.approx(
        [*warm, *[math.sqrt(2 / (k + 2)) for k in range(8)]]
    )


_THEIRS: dict[str, tuple[dict[str, Any], Any]] = {
    "constant": ({}, lambda o, w, n: optimization.get_constant_schedule_with_warmup(o, w)),
    "linear": ({}, optimization.get_linear_schedule_with_warmup),
    "cosine": ({}, optimization.get_cosine_schedule_with_warmup),
    "cosine with a floor": (
        {"scheduler": "cosine", "min_learning_rate_ratio": 0.1},
        lambda o, w, n: optimization.get_cosine_with_min_lr_schedule_with_warmup(o, w, n, min_lr_rate=0.1),
    ),
    "wsd": (
        {"decay_ratio": 0.25, "min_learning_rate_ratio": 0.2},
        lambda o, w, n: optimization.get_wsd_schedule(
            o, w, num_decay_steps=n // 4, num_training_steps=n, decay_type="1-sqrt", min_lr_ratio=0.2
        ),
    ),
    "inverse_sqrt": ({}, lambda o, w, n: optimization.get_inverse_sqrt_schedule(o, w)),
}


@pytest.mark.parametrize("warmup", [0.0, 0.1])
@pytest.mark.parametrize("name", _THEIRS)
def test_after_warmup_the_rate_is_that_of_transformers_and_no_warmup_step_has_rate_zero(
    name: str, warmup: float
) -> None:
    total = 60
    recipe, make = _THEIRS[name]
    ours = _rates(total, **{"scheduler": name, "warmup_ratio": warmup, **recipe})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    steps = math.ceil(warmup * total)
    scheduler = make(optimizer, steps, total)
    theirs = []
    for _ in range(total):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert ours[steps:] == pytest.approx(theirs[steps:], abs=1e-12)
    assert ours[:steps] == pytest.approx([(n + 1) / (steps + 1) for n in range(steps)])
