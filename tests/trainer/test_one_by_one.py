"""One by one = padded = packed = shared beginning: the loss and the gradient of every weight, in many families.

In float64 to 1e-9 and in float32 to rounding; with the chunked head and with whole logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from finetune_trainer import freezing, layout, model, split, tokens
from finetune_trainer.batch import Collator
from finetune_trainer.learner import trained
from finetune_trainer.loss import LossSum
from finetune_trainer.plan import Micro
from finetune_trainer.render import Renderer
from testkit import tiny_models
from trainer.ranks import pairs, prepare

_FAMILIES: dict[str, Callable[[Path], Path]] = {
    "llama": tiny_models.tiny_llama,
    "llama3": tiny_models.tiny_llama3,
    "qwen2": tiny_models.tiny_qwen2,
    "qwen3": tiny_models.tiny_qwen3,
    "mistral": tiny_models.tiny_mistral,
    "phi3": tiny_models.tiny_phi3,
    "gpt2": tiny_models.tiny_gpt2,
    "gemma3": tiny_models.tiny_gemma3,
    "gemma2": tiny_models.tiny_gemma2,
    "gemma": tiny_models.tiny_gemma,
    "t5": tiny_models.tiny_t5,
    "flan-t5": tiny_models.tiny_flan_t5,
}
_TEXTS = ("move the tower light ship again and aim about: ", "define the noun, quick lazy dog: ", "", "")
_ROWS = [{**row, "prompt": _TEXTS[index % 4] + row["prompt"]} for index, row in enumerate(pairs(11))]


@dataclass(frozen=True)
class Told:
    """What a way of computing says of all rows."""

    loss: float
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    loaded: model.Loaded
    rows: split.Split
    collate: Collator
    loss_sum: LossSum

    def told(self, collate: Collator, micros: list[Micro], *, whole: bool = False) -> Told:
        loss_sum = self.loss_sum.plain if whole else self.loss_sum
        self.loaded.model.zero_grad(set_to_none=True)
        losses = []
        for micro in micros:
            batch = collate(self.rows, micro)
            with loss_sum.room(batch):
                loss = loss_sum(self.loaded.model, batch)
                loss.backward()
            losses.append(float(loss.detach()))
        gradients = {name: p.grad.double() for name, p in trained(self.loaded.model).items() if p.grad is not None}
        return Told(sum(losses), gradients)

    @property
    def one_by_one(self) -> Told:
        return self.told(self.collate, [(index,) for index in range(len(self.rows))], whole=True)

    @property
    def ways(self) -> dict[str, Told]:
        together = [tuple(range(len(self.rows)))]
        found = {"padded, whole logits": self.told(self.collate, together, whole=True)}
        if not getattr(self.loaded.base.config, "final_logit_softcapping", None):  # see packing.head
            found["padded"] = self.told(self.collate, together)
        if self.loaded.why_not:
            return found
        packed, ordered = replace(self.collate, packed=True), self.rows.prefixes.sorted(range(len(self.rows)))
        shared = replace(packed, shared=True)
        halves = [tuple(ordered[:5]), tuple(ordered[5:])]
        assert shared(self.rows, together[0]).inputs["input_ids"].numel() <= layout.filled(int(self.rows.lengths.sum()))
        assert shared(self.rows, tuple(ordered)).inputs["input_ids"].numel() < 0.9 * int(self.rows.lengths.sum())
        return found | {
            "packed": self.told(packed, together),
            "packed, whole logits": self.told(packed, together, whole=True),
            "shared": self.told(shared, [tuple(ordered)]),
            "shared, two rows": self.told(shared, halves, whole=True),
        }


def _norm(module: Any, hidden: Tensor) -> Tensor:
    """Transformers computes these in float32 whatever comes in; here everything shall be float64."""
    gemma = type(module).__name__.startswith("Gemma")
    scale = 1.0 + module.weight if gemma else module.weight
    return functional.rms_norm(hidden, scale.shape, scale, module.eps if gemma else module.variance_epsilon)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, torch.dtype], Case]:
    root = tmp_path_factory.mktemp("families")

    @cache
    def case(family: str, dtype: torch.dtype) -> Case:
        folder = root / f"{family}-{dtype}"
        base = _FAMILIES[family](folder / "base")
        config = json.loads((base / "config.json").read_text())
        still = {key: 0.0 for key, value in config.items() if "drop" in key and isinstance(value, float)}
        (base / "config.json").write_text(json.dumps({**config, **still}))
        job = prepare(folder / "job", base, _ROWS)
        rows = split.whole(
            tokens.build(
                folder / "tokens", "k", job.paths.data("train"), "dataset.uri",
                format="auto", on_invalid="fail", renderer=Renderer.load(base, 128),
            )
        )  # fmt: skip
        loaded = freezing.unfreeze(model.load(base, dtype=dtype, longest=int(rows.lengths.max())))
        for module in loaded.model.modules():
            if dtype == torch.float64 and type(module).__name__.endswith("RMSNorm"):
                module.forward = partial(_norm, module)
        padded = Collator(False, False, loaded.encoder_decoder, 0, 0, torch.device("cpu"))
        return Case(loaded, rows, padded, LossSum.of(loaded.base, None, "cpu"))

    return case


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        pytest.param(family, dtype, id=f"{family}-{str(dtype).removeprefix('torch.')}")
        for family in _FAMILIES
        for dtype in (torch.float64, torch.float32)
        if (family, dtype) != ("gemma2", torch.float64)  # its own softmax is float32
    ],
)
def test_every_way_of_sharing_a_row_gives_the_same_loss_and_gradients(
    family: str, dtype: torch.dtype, cases: Callable[[str, torch.dtype], Case]
) -> None:
    """Bug 9: examples in one row see each other."""
    case = cases(family, dtype)
    exact = case.one_by_one
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    assert len(exact.gradients) == len(trained(case.loaded.model))
    for way, told in case.ways.items():
        assert told.loss == pytest.approx(exact.loss, rel=1e-12 if dtype == torch.float64 else 1e-6), way
        assert told.gradients.keys() == exact.gradients.keys(), way
        for name, gradient in exact.gradients.items():
            most = max(1.0, float(gradient.abs().max()))
            assert (told.gradients[name] - gradient).abs().max() < tolerance * most, (way, name)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("gemma3", "the attention window of 8 tokens is shorter than the longest row"),
        ("gemma2", "isn't a plain softmax"),
        ("t5", "an encoder-decoder reads one example a row"),
        ("llama", ""),
        ("mistral", ""),
        ("phi3", ""),
    ],
)
def test_a_family_whose_examples_cant_share_a_row_says_why(
    family: str, why: str, cases: Callable[[str, torch.dtype], Case]
) -> None:
    told = cases(family, torch.float32).loaded.why_not
    assert why in told
    assert bool(why) == bool(told)


def test_a_sliding_window_in_every_layer_is_seen(tmp_path: Path) -> None:
    narrow = tiny_models.tiny_mistral(tmp_path / "narrow", window=16)
    assert "window of 16 tokens" in model.load(narrow, dtype=torch.float32, longest=64).why_not
    assert not model.load(narrow, dtype=torch.float32, longest=16).why_not
