"""DPO: the loss and the gradients of pairs whose prompt is computed once, beside the formula written out in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from finetune_api import events
from finetune_api.resource import DpoSpec, LoraSpec
from finetune_trainer import adapters, model, preference, split
from finetune_trainer.batch import Collator
from finetune_trainer.learner import trained
from finetune_trainer.loss import LossSum
from finetune_trainer.preference import PreferenceSum
from testkit import tiny_models
from trainer.ranks import Ended, Job, finish_all, prepare
from trainer.ranks import pairs as drawn

_BETA = 0.7
_BUILDERS: dict[str, Callable[[Path], Path]] = {
    "llama": tiny_models.tiny_llama,
    "gpt2": tiny_models.tiny_gpt2,
    "gemma2": tiny_models.tiny_gemma2,  # its rows can't be packed, and its logits are squashed
}


class Pairs:
    """Token lists (prompt, chosen, rejected), drawn; several prompts begin alike, and answers do too."""

    def __init__(self, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        system = draw.integers(6, 300, 20)
        self.listed: list[tuple[np.ndarray[Any, Any], ...]] = []
        for index in range(6):
            prompt = np.concatenate(
                [system if index % 3 else system[:0], draw.integers(6, 300, int(draw.integers(1, 12)))]
            )
            same = draw.integers(6, 300, index % 2)
            chosen = np.concatenate([same, [7], draw.integers(6, 300, int(draw.integers(1, 9)))])
            rejected = np.concatenate([same, [8], draw.integers(6, 300, int(draw.integers(1, 9)))])
            self.listed.append((prompt, chosen, rejected))

    def split(self) -> split.Split:
        from finetune_trainer import prefixes
        from finetune_trainer.tokens import Tokens

        ids, learnt, offsets, sources = [], [], [0], []
        for prompt, chosen, rejected in self.listed:
            same = next(i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
            ids += [prompt, chosen, rejected[same:]]
            flags = np.ones(len(prompt) + len(chosen) + len(rejected) - same, dtype=bool)
            flags[: len(prompt) + same] = False
            learnt.append(flags)
            offsets.append(offsets[-1] + len(flags))
            sources.append(len(prompt) + len(chosen))
        flat = np.concatenate(ids).astype(np.int32)
        bounds = np.array(offsets)
        rank, common = prefixes.find(flat, bounds)
        whole = dict.fromkeys(Tokens.__dataclass_fields__) | {
            "ids": flat, "learnt": np.concatenate(learnt), "offsets": bounds, "numbers": np.arange(len(sources)),
            "sources": np.array(sources, np.int32), "rank": rank, "common": common,
        }  # fmt: skip
        return replace(split.whole(Tokens(**whole)), pairs=True)


def _written_out(network: Any, pairs: Pairs, reference: np.ndarray[Any, Any]) -> Tensor:
    """One answer at a time, whole logits, every token of it: the formula as in the paper."""
    total = torch.zeros((), dtype=torch.float64)
    for (prompt, *answers), told in zip(pairs.listed, reference, strict=True):
        gains = [_log_p(network, prompt, answer) - before for answer, before in zip(answers, told, strict=True)]
        total = total - torch.log(torch.sigmoid(_BETA * (gains[0] - gains[1])))
    return total


def _log_p(network: Any, prompt: Any, answer: Any) -> Tensor:
    ids = torch.tensor(np.concatenate([prompt, answer]).astype(np.int64))
    logits = network(input_ids=ids[None], attention_mask=torch.ones_like(ids[None])).logits[0].log_softmax(-1)
    at = torch.arange(len(prompt), len(ids))
    return logits[at - 1, ids[at]].sum()


def _loaded(family: str, folder: Path) -> model.Loaded:
    base = _BUILDERS[family](folder)
    targets = ("c_attn",) if family == "gpt2" else ("q_proj", "v_proj")
    lora = LoraSpec(rank=4, alpha=8, dropout=0, target_modules=targets)
    loaded = adapters.adapt(model.load(base, dtype=torch.float64, longest=64), lora, 1)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trained(loaded.model).values():
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64) * 0.3
    loaded.model.eval()
    return loaded


@pytest.mark.parametrize("family", _BUILDERS)
def test_pairs_give_the_loss_and_gradients_of_the_formula_however_they_share_rows(family: str, tmp_path: Path) -> None:
    loaded, pairs = _loaded(family, tmp_path), Pairs()
    with torch.no_grad(), loaded.model.disable_adapter():
        reference = np.array([[float(_log_p(loaded.model, p, a)) for a in answers] for p, *answers in pairs.listed])
    rows = replace(pairs.split(), reference=_without_what_is_common(loaded, pairs, reference))
    exact = _written_out(loaded.model, pairs, reference)
    exact.backward()
    slopes = {name: p.grad.clone() for name, p in trained(loaded.model).items()}
    assert any(bool(slope.abs().max() > 1e-6) for slope in slopes.values())
    plain = Collator(False, False, False, 0, 0, torch.device("cpu"))
    ordered = tuple(rows.prefixes.sorted(range(len(rows))))
    ways = {"padded": (plain, [tuple(range(6))]), "two": (plain, [(0, 1, 2), (3, 4, 5)])}
    if not loaded.why_not:
        ways["packed"] = (replace(plain, packed=True), [tuple(range(6))])
        ways["shared"] = (replace(plain, packed=True, shared=True), [ordered[:3], ordered[3:]])
        packed, shared = (collate(rows, ordered) for collate in (ways["packed"][0], ways["shared"][0]))
        assert packed.inputs["input_ids"].numel() == int(rows.lengths.sum())  # a pair's prompt lies there once
        assert shared.inputs["input_ids"].numel() < packed.inputs["input_ids"].numel()
    chunked = LossSum.of(loaded.base, None, "cpu")
    close = 1e-9 if family == "gpt2" else 2e-6  # the others' norms are float32 whatever comes in
    for whole in (True, False):
        if not whole and family == "gemma2":
            continue  # packing.head finds that logits are changed after the output layer
        loss_sum = PreferenceSum.over(chunked.plain if whole else chunked, _BETA)
        for way, (collate, micros) in ways.items():
            loaded.model.zero_grad(set_to_none=True)
            told = 0.0
            for micro in micros:
                batch = collate(rows, micro)
                with loss_sum.room(batch):
                    loss = loss_sum(loaded.model, batch)
                    loss.backward()
                told += float(loss.detach())
            assert told == pytest.approx(float(exact.detach()), rel=close), (way, whole)
            for name, parameter in trained(loaded.model).items():
                assert (parameter.grad - slopes[name]).abs().max() < 10 * close, (way, whole, name)


def _without_what_is_common(loaded: model.Loaded, pairs: Pairs, reference: Any) -> Any:
    """Tokens that both answers begin with cancel out, so neither side of a difference has them."""
    told = reference.copy()
    with torch.no_grad(), loaded.model.disable_adapter():
        for row, (prompt, chosen, rejected) in enumerate(pairs.listed):
            same = next(i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
            if same:
                told[row] -= float(_log_p(loaded.model, prompt, chosen[:same]))
    return told


def test_the_loss_of_a_pair_is_its_formula_in_numbers() -> None:
    chosen, rejected = torch.tensor([1.5, -2.0]), torch.tensor([0.5, 1.0])
    told = preference.loss_of(chosen, rejected, 0.1)
    assert told.tolist() == pytest.approx([float(np.log1p(np.exp(-0.1))), float(np.log1p(np.exp(0.3)))])


def _rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    both = zip(drawn(count, seed), drawn(count, seed + 50), strict=True)
    return [
        {"prompt": one["prompt"], "chosen": one["completion"], "rejected": f"{other['completion']} no"}
        for one, other in both
    ]


def _job(folder: Path, base: Path, **how: Any) -> Job:
    training = {"objective": "dpo", "dpo": DpoSpec(beta=0.5), "max_steps": 4}
    return prepare(
        folder, base, _rows(12), test=_rows(5, 1), validation=_rows(5, 2), every=2,
        **{**how, "training": {**training, **how.get("training", {})}},
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> dict[str, Ended]:
    root = tmp_path_factory.mktemp("preference")
    ways: dict[str, dict[str, Any]] = {
        "one": {},
        "padded": {"data": {"packing": False}, "training": {"micro_batch_size": 3}},
        "dropout": {"lora": {"dropout": 0.2}},
        **{f"two, {name}": {"world": 2, "strategy": name} for name in ("ddp", "zero2", "zero3", "fsdp")},
    }
    jobs = {name: _job(root / name.replace(", ", "-"), models["llama"], **how) for name, how in ways.items()}
    done: dict[str, Ended] = {}
    for world in (1, 2):
        own = [name for name, job in jobs.items() if job.run.world.size == world]
        done.update(zip(own, finish_all([jobs[name] for name in own]), strict=True))
    resume = done["dropout"].paths.checkpoints / "step-2"
    (done["resumed"],) = finish_all([_job(root / "again", models["llama"], resume=resume, **ways["dropout"])])
    return done


def test_training_begins_at_log_two_and_prefers_more_and_more(runs: dict[str, Ended]) -> None:
    one = runs["one"]
    assert one.losses[0] == pytest.approx(float(np.log(2)), abs=1e-6)
    assert one.losses[-1] < 0.95 * one.losses[0]
    assert one.evals("test")[0] == pytest.approx(float(np.log(2)), abs=1e-6)
    assert one.events(events.StepEvent)[0].label_tokens == 8  # pairs
    assert one.decision("packing").choice == "on"
    assert one.decision("head").choice == "chunked"


@pytest.mark.parametrize("way", ["padded", "two, ddp", "two, zero2", "two, zero3", "two, fsdp"])
def test_pairs_weigh_alike_however_they_are_split(way: str, runs: dict[str, Ended]) -> None:
    assert runs[way].losses == pytest.approx(runs["one"].losses, abs=2e-5)
    assert runs[way].evals("validation") == pytest.approx(runs["one"].evals("validation"), abs=2e-5)


def test_a_resumed_run_goes_on_to_the_bit(runs: dict[str, Ended]) -> None:
    assert runs["resumed"].losses == runs["dropout"].losses[2:]
    written = [(runs[name].paths.export / "adapter_model.safetensors").read_bytes() for name in ("dropout", "resumed")]
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("rows", "objective", "message"),
    [
        (_rows(4), "supervised", "the rows have chosen and rejected answers; set training.objective: dpo"),
        (drawn(4), "dpo", "objective dpo needs rows with prompt, chosen and rejected"),
        ([{"prompt": "a", "chosen": " b", "rejected": " b"}], "dpo", "row 1: chosen and rejected are the same"),
        ([{"prompt": "a", "chosen": " b", "rejected": 7}], "dpo", "row 1: rejected isn't a string"),
    ],
    ids=["supervised", "no pairs", "the same answer", "no text"],
)
def test_rows_that_dont_go_with_the_objective_are_refused(
    rows: Any, objective: str, message: str, models: dict[str, Path], tmp_path: Path
) -> None:
    job = prepare(tmp_path, models["llama"], rows, training={"objective": objective, "global_batch_size": 2})
    assert message in job.finish().failure.message
