"""One by one = padded = packed = shared prefix: the loss and the gradient of every weight are
equal, in many model families.

They are equal to 1e-9 in float64 and to rounding in float32, with the chunked head and with full
logits.
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

from finetune_trainer.data import splits, token_cache
from finetune_trainer.data.batching import packed_layout
from finetune_trainer.data.batching.batch_plan import MicroBatch
from finetune_trainer.data.batching.collator import Collator
from finetune_trainer.data.chat_rendering import Renderer
from finetune_trainer.data.preparation import ReadOptions
from finetune_trainer.model import freezing, loading
from finetune_trainer.model.loss import LossSum
from finetune_trainer.parallel.strategy import trained
from testkit import tiny_models
from testkit.rows import pairs
from trainer.support.poisoned_padding import poisoned
from trainer.support.rank_runs import prepare

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
    "gemma2-window": partial(tiny_models.tiny_gemma2, window=16),
    "mistral-window": partial(tiny_models.tiny_mistral, window=16),
    "phi3-window": partial(tiny_models.tiny_phi3, window=16),
    "qwen2-window": partial(tiny_models.tiny_qwen2, window=16),
    "gpt-oss": tiny_models.tiny_gpt_oss,
    "gemma": tiny_models.tiny_gemma,
    "t5": tiny_models.tiny_t5,
    "flan-t5": tiny_models.tiny_flan_t5,
}
_TEXTS = ("move the tower light ship again and aim about: ", "define the noun, quick lazy dog: ", "", "")
_ROWS = [{**row, "prompt": _TEXTS[index % 4] + row["prompt"]} for index, row in enumerate(pairs(11))]


@dataclass(frozen=True)
class LossAndGradients:
    """The loss and gradients that a way of computing gives for all rows."""

    loss: float
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    loaded: loading.LoadedModel
    rows: splits.Split
    collate: Collator
    loss_sum: LossSum

    def compute(self, collate: Collator, micros: list[MicroBatch], *, full_logits: bool = False) -> LossAndGradients:
        loss_sum = self.loss_sum.unchunked if full_logits else self.loss_sum
        self.loaded.model.zero_grad(set_to_none=True)
        losses = []
        for micro in micros:
            batch = collate(self.rows, micro)
            with loss_sum.packed_context(batch):
                loss = loss_sum(self.loaded.model, batch)
                loss.backward()
            losses.append(float(loss.detach()))
        gradients = {name: p.grad.double() for name, p in trained(self.loaded.model).items() if p.grad is not None}
        return LossAndGradients(sum(losses), gradients)

    @property
    def one_by_one(self) -> LossAndGradients:
        return self.compute(self.collate, [(index,) for index in range(len(self.rows))], full_logits=True)

    @property
    def ways(self) -> dict[str, LossAndGradients]:
        together = [tuple(range(len(self.rows)))]
        by_way = {"padded, full logits": self.compute(self.collate, together, full_logits=True)}
        whole = bool(getattr(self.loaded.base.config, "final_logit_softcapping", None))  # see choose_head
        if not whole:
            by_way["padded"] = self.compute(self.collate, together)
        if self.loaded.packing_obstacle:
            return by_way
        packed, ordered = replace(self.collate, packed=True), self.rows.prefixes.sorted(range(len(self.rows)))
        shared = replace(packed, shared=True)
        halves = [tuple(ordered[:5]), tuple(ordered[5:])]
        assert shared(self.rows, together[0]).inputs["input_ids"].numel() <= packed_layout.rounded_up(
            int(self.rows.lengths.sum())
        )
        assert shared(self.rows, tuple(ordered)).inputs["input_ids"].numel() < 0.9 * int(self.rows.lengths.sum())
        return by_way | {
            "packed": self.compute(packed, together, full_logits=whole),
            "packed, full logits": self.compute(packed, together, full_logits=True),
            "shared": self.compute(shared, [tuple(ordered)], full_logits=whole),
            "shared, two rows": self.compute(shared, halves, full_logits=True),
        }


def _norm(module: Any, hidden: Tensor) -> Tensor:
    """RMSNorm in float64: Transformers computes it in float32 for any input, and here everything
    must be float64."""
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
        rows = splits.all_rows(
            token_cache.build(
                folder / "tokens", "k", job.paths.data("train"),
                ReadOptions("dataset.uri", Renderer.load(base, 128), "fail"),
            )
        )  # fmt: skip
        loaded = freezing.unfreeze(loading.load(base, dtype=dtype, longest=int(rows.lengths.max())))
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
        # The softmax of Gemma 2 is float32, and the experts' product doesn't support float64.
        if not (family in ("gemma2", "gemma2-window", "gpt-oss") and dtype == torch.float64)
    ],
)
def test_every_way_of_sharing_a_row_gives_the_same_loss_and_gradients(
    family: str, dtype: torch.dtype, cases: Callable[[str, torch.dtype], Case]
) -> None:
    """Bug 9: examples in one row attend to each other."""
    case = cases(family, dtype)
    exact = case.one_by_one
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    assert len(exact.gradients) == len(trained(case.loaded.model))
    for way, gradients in case.ways.items():
        assert gradients.loss == pytest.approx(exact.loss, rel=1e-12 if dtype == torch.float64 else 1e-6), way
        assert gradients.gradients.keys() == exact.gradients.keys(), way
        for name, gradient in exact.gradients.items():
            scale = max(1.0, float(gradient.abs().max()))
            assert (gradients.gradients[name] - gradient).abs().max() < tolerance * scale, (way, name)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("gemma3", ""),
        ("gemma2", ""),
        ("gpt-oss", ""),
        ("t5", "an encoder-decoder reads one example per row"),
        ("llama", ""),
        ("mistral", ""),
        ("phi3", ""),
    ],
)
def test_a_family_whose_examples_cant_share_a_row_reports_why(
    family: str, why: str, cases: Callable[[str, torch.dtype], Case]
) -> None:
    obstacle = cases(family, torch.float32).loaded.packing_obstacle
    assert why in obstacle
    assert bool(why) == bool(obstacle)


@pytest.mark.parametrize(
    "build",
    [tiny_models.tiny_mistral, tiny_models.tiny_phi3, tiny_models.tiny_qwen2, tiny_models.tiny_gemma3],
    ids=lambda build: build.__name__,
)
def test_a_window_matters_if_it_is_shorter_than_the_longest_row(build: Callable[..., Path], tmp_path: Path) -> None:
    narrow = build(tmp_path / "narrow", window=16)
    for longest, window in ((64, 16), (17, 16), (16, 0)):
        loaded = loading.load(narrow, dtype=torch.float32, longest=longest)
        assert (loaded.window, loaded.packing_obstacle) == (window, "")


# Padding is routed to experts, too: which ones changes the order in which their tokens are summed.
_ROUTED = ("gpt-oss",)


@pytest.mark.parametrize("family", _FAMILIES)
def test_what_is_computed_for_padding_reaches_no_loss_and_no_gradient(
    family: str, cases: Callable[[str, torch.dtype], Case]
) -> None:
    """Rows are padded with a token whose embedding is infinite, NaN or very large."""
    case = cases(family, torch.float32)
    pad = tiny_models.SPECIAL_TOKENS.index("<|endoftext|>")
    assert not any(pad in ids for ids, *_ in map(case.rows.example, range(len(case.rows))))
    case = replace(case, collate=replace(case.collate, pad_token=pad))
    expected = case.ways
    for poison in (float("nan"), float("inf"), 1e30):
        restore = poisoned(case.loaded.base, pad, poison)
        try:
            by_way = case.ways
        finally:
            restore()
        for way, gradients in by_way.items():
            assert gradients.loss == expected[way].loss, (way, poison)
            for name, gradient in gradients.gradients.items():
                routed = family in _ROUTED and "experts" in name
                same = _equal_but_for_rounding if routed else torch.equal
                assert same(gradient, expected[way].gradients[name]), (way, poison, name)


def _equal_but_for_rounding(gradient: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(gradient, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
