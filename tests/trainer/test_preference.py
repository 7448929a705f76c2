"""DPO: the loss and the gradients of pairs whose prompt is computed once, beside the formula written out in float64."""

from __future__ import annotations

import json
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
from finetune_trainer import adapters, layout, model, preference, split
from finetune_trainer.batch import Batch, Collator
from finetune_trainer.learner import trained
from finetune_trainer.loss import LossSum
from finetune_trainer.preference import PreferenceSum
from testkit import tiny_models
from trainer import reload
from trainer.ranks import Ended, Job, finish_all, prepare
from trainer.ranks import pairs as drawn

_BETA = 0.7
_BUILDERS: dict[str, Callable[[Path], Path]] = {
    "llama": tiny_models.tiny_llama,
    "gpt2": tiny_models.tiny_gpt2,
    "gemma2": tiny_models.tiny_gemma2,  # its rows can't be packed, and its logits are squashed
    "t5": tiny_models.tiny_t5,
}
_TARGETS = {"gpt2": ("c_attn",), "t5": ("q", "v")}


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
            ids += [prompt, chosen, rejected]
            flags = np.ones(len(prompt) + len(chosen) + len(rejected), dtype=bool)
            flags[: len(prompt)] = False
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


def _written_out(network: Any, pairs: Pairs, reference: np.ndarray[Any, Any]) -> tuple[Tensor, list[float]]:
    """One answer at a time, whole logits, every token of it: the formulas as in the paper and in TRL."""
    total = torch.zeros((), dtype=torch.float64)
    figures = np.zeros(6)
    for (prompt, *answers), told in zip(pairs.listed, reference, strict=True):
        log_p = [_log_p(network, prompt, answer) for answer in answers]
        gains = [now - before for now, before in zip(log_p, told, strict=True)]
        total = total - torch.log(torch.sigmoid(_BETA * (gains[0] - gains[1])))
        chosen, rejected = (_BETA * float(gain.detach()) for gain in gains)
        figures += [chosen, rejected, chosen - rejected, chosen > rejected, *(float(p.detach()) for p in log_p)]
    return total, list(figures)


def _log_p(network: Any, prompt: Any, answer: Any) -> Tensor:
    if network.config.is_encoder_decoder:
        source, target = (torch.tensor(ids.astype(np.int64))[None] for ids in (prompt, answer))
        logits = network(input_ids=source, labels=target).logits[0].log_softmax(-1)
        return logits[torch.arange(len(answer)), target[0]].sum()
    ids = torch.tensor(np.concatenate([prompt, answer]).astype(np.int64))
    logits = network(input_ids=ids[None], attention_mask=torch.ones_like(ids[None])).logits[0].log_softmax(-1)
    at = torch.arange(len(prompt), len(ids))
    return logits[at - 1, ids[at]].sum()


def _loaded(family: str, folder: Path) -> model.Loaded:
    base = _BUILDERS[family](folder)
    lora = LoraSpec(rank=4, alpha=8, dropout=0, target_modules=_TARGETS.get(family, ("q_proj", "v_proj")))
    loaded = adapters.adapt(model.load(base, dtype=torch.float64, longest=64), lora, 1)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trained(loaded.model).values():
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64) * 0.3
    loaded.model.eval()
    return loaded


def _laid(batch: Batch) -> int:
    """Tokens of the six pairs' twelve answers."""
    assert batch.layout is not None
    return sum(end - begin for begin, end in batch.layout.pieces[:12])


@pytest.mark.parametrize("family", _BUILDERS)
def test_pairs_give_the_loss_and_gradients_of_the_formula_however_they_share_rows(family: str, tmp_path: Path) -> None:
    loaded, pairs = _loaded(family, tmp_path), Pairs()
    with torch.no_grad(), loaded.model.disable_adapter():
        reference = np.array([[float(_log_p(loaded.model, p, a)) for a in answers] for p, *answers in pairs.listed])
    rows = replace(pairs.split(), reference=reference)
    exact, figures = _written_out(loaded.model, pairs, reference)
    assert 0 < figures[3] < len(rows)  # some pairs are preferred the wrong way round
    exact.backward()
    slopes = {name: p.grad.clone() for name, p in trained(loaded.model).items()}
    assert any(bool(slope.abs().max() > 1e-6) for slope in slopes.values())
    plain = Collator(False, False, loaded.encoder_decoder, 0, 0, torch.device("cpu"))
    ordered = tuple(rows.prefixes.sorted(range(len(rows))))
    ways = {"padded": (plain, [tuple(range(6))]), "two": (plain, [(0, 1, 2), (3, 4, 5)])}
    if not loaded.why_not:
        ways["packed"] = (replace(plain, packed=True), [tuple(range(6))])
        ways["shared"] = (replace(plain, packed=True, shared=True), [ordered[:3], ordered[3:]])
        packed, shared = (collate(rows, ordered) for collate in (ways["packed"][0], ways["shared"][0]))
        assert packed.inputs["input_ids"].numel() == layout.filled(int(rows.lengths.sum()))  # a prompt lies there once
        assert _laid(shared) < _laid(packed) == int(rows.lengths.sum())
    chunked = LossSum.of(loaded.base, None, "cpu")
    close = 1e-9 if family in ("gpt2", "t5") else 2e-6  # the others' norms are float32 whatever comes in
    for whole in (True, False):
        if not whole and family == "gemma2":
            continue  # packing.head finds that logits are changed after the output layer
        loss_sum = PreferenceSum.over(chunked.plain if whole else chunked, _BETA)
        for way, (collate, micros) in ways.items():
            loaded.model.zero_grad(set_to_none=True)
            told, tally = 0.0, loss_sum.tally()
            for micro in micros:
                batch = collate(rows, micro)
                with loss_sum.room(batch):
                    loss = loss_sum(loaded.model, batch, tally=tally)
                    loss.backward()
                told += float(loss.detach())
            assert told == pytest.approx(float(exact.detach()), rel=close), (way, whole)
            assert tally.tolist() == pytest.approx(figures, rel=10 * close), (way, whole)
            for name, parameter in trained(loaded.model).items():
                assert (parameter.grad - slopes[name]).abs().max() < 10 * close, (way, whole, name)


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
        "pissa": {"lora": {"init": "pissa"}},
        "full": {"full": True, "training": {"learning_rate": 1e-3}},
        "t5": {"lora": {"target_modules": ("q", "v")}},
        **{f"two, {name}": {"world": 2, "strategy": name} for name in ("ddp", "zero2", "zero3", "fsdp")},
    }
    jobs = {
        name: _job(root / name.replace(", ", "-"), models["t5" if name == "t5" else "llama"], **how)
        for name, how in ways.items()
    }
    done: dict[str, Ended] = {}
    for world in (1, 2):
        own = [name for name, job in jobs.items() if job.run.world.size == world]
        done.update(zip(own, finish_all([jobs[name] for name in own]), strict=True))
    again = [  # in folders of their own, so that what the reference says isn't known there
        _job(root / f"again-{name}", models["llama"], resume=done[name].paths.checkpoints / "step-2", **ways[name])
        for name in ("dropout", "pissa", "full")
    ]
    done.update(zip(("dropout resumed", "pissa resumed", "full resumed"), finish_all(again), strict=True))
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


@pytest.mark.parametrize("way", ["pissa", "full", "t5"])
def test_methods_that_change_the_base_and_encoder_decoders_prefer_more_and_more(
    way: str, runs: dict[str, Ended]
) -> None:
    run = runs[way]
    assert run.losses[0] == pytest.approx(float(np.log(2)), abs=2e-6)
    assert run.losses[-1] < 0.98 * run.losses[0]
    assert run.decision("objective").reason.endswith(
        "the base without adapters is the reference"
        if way == "t5"
        else "the model before its first step is the reference"
    )


@pytest.mark.parametrize("way", ["dropout", "pissa", "full"])
def test_a_resumed_run_goes_on_to_the_bit(way: str, runs: dict[str, Ended]) -> None:
    """Its reference is what the first attempt's was, though it wasn't there."""
    assert runs[f"{way} resumed"].losses == runs[way].losses[2:]
    name = "model.safetensors" if way == "full" else "adapter_model.safetensors"
    written = [(runs[run].paths.export / name).read_bytes() for run in (way, f"{way} resumed")]
    assert written[0] == written[1]


@pytest.mark.parametrize("way", ["one", "full", "t5", "two, ddp", "two, fsdp"])
def test_every_step_and_evaluation_tells_the_rewards(way: str, runs: dict[str, Ended]) -> None:
    steps, evals = (runs[way].events(kind) for kind in (events.StepEvent, events.EvalEvent))
    for event in (*steps, *evals):
        told = event.rewards
        assert told is not None
        assert told.margins == pytest.approx(told.chosen - told.rejected, abs=1e-6)
        assert 0 <= told.accuracies <= 1
        assert told.logps_chosen < 0 > told.logps_rejected
        assert event.loss >= float(np.log1p(np.exp(-told.margins))) - 1e-6  # Jensen's inequality
    assert steps[0].rewards.chosen == pytest.approx(0, abs=2e-5)  # type: ignore[union-attr]
    assert steps[-1].rewards.margins > 0.05  # type: ignore[union-attr]
    if way.startswith("two"):
        one = runs["one"].events(events.EvalEvent)
        assert [e.rewards.margins for e in evals] == pytest.approx([e.rewards.margins for e in one], abs=1e-4)  # type: ignore[union-attr]


def test_perplexity_is_that_of_the_chosen_answers(runs: dict[str, Ended], tmp_path: Path) -> None:
    run = runs["one"]
    (told,) = (score for score in run.events(events.ScoresEvent)[0].evaluation.scores if score.name == "perplexity")
    assert told.how == "exp(mean loss per token of the chosen answers of all test rows)"
    chosen = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in _rows(5, 1)]
    run.paths.data("test").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    assert told.tuned == pytest.approx(float(np.exp(reload.loss(reload.result(run), run, tmp_path))), rel=1e-4)


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
