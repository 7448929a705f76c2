"""DPO: the loss and the gradients of pairs whose prompt is computed once are those of the formula
written out in float64."""

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

from finetune_api.messages import events
from finetune_api.resource import DpoSpec, LoraSpec
from finetune_trainer.data import splits
from finetune_trainer.data.batching import packed_layout
from finetune_trainer.data.batching.collator import Batch, Collator
from finetune_trainer.model import dpo, loading
from finetune_trainer.model import lora as adapters
from finetune_trainer.model.dpo import PreferenceSum
from finetune_trainer.model.loss import LossSum
from finetune_trainer.parallel.strategy import trained
from testkit import tiny_models
from testkit.rows import pairs as drawn
from trainer.support import result_loading
from trainer.support.rank_runs import FinishedRun, Job, finish_all, prepare

_BETA = 0.7
_BUILDERS: dict[str, Callable[[Path], Path]] = {
    "llama": tiny_models.tiny_llama,
    "gpt2": tiny_models.tiny_gpt2,
    "gemma2": tiny_models.tiny_gemma2,  # its rows can't be packed, and its logits are soft-capped
    "t5": tiny_models.tiny_t5,
}
_TARGETS = {"gpt2": ("c_attn",), "t5": ("q", "v")}


class Pairs:
    """Random token lists (prompt, chosen, rejected). Several prompts have the same start, and so do
    answers."""

    def __init__(self, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        system = random.integers(6, 300, 20)
        self.token_lists: list[tuple[np.ndarray[Any, Any], ...]] = []
        for index in range(6):
            prompt = np.concatenate(
                [system if index % 3 else system[:0], random.integers(6, 300, int(random.integers(1, 12)))]
            )
            shared_start = random.integers(6, 300, index % 2)
            chosen = np.concatenate([shared_start, [7], random.integers(6, 300, int(random.integers(1, 9)))])
            rejected = np.concatenate([shared_start, [8], random.integers(6, 300, int(random.integers(1, 9)))])
            self.token_lists.append((prompt, chosen, rejected))

    def split(self) -> splits.Split:
        from finetune_trainer.data import shared_prefixes
        from finetune_trainer.data.token_cache import Tokens

        ids, loss_masks, offsets, sources = [], [], [0], []
        for prompt, chosen, rejected in self.token_lists:
            ids += [prompt, chosen, rejected]
            loss_mask = np.ones(len(prompt) + len(chosen) + len(rejected), dtype=bool)
            loss_mask[: len(prompt)] = False
            loss_masks.append(loss_mask)
            offsets.append(offsets[-1] + len(loss_mask))
            sources.append(len(prompt) + len(chosen))
        token_ids = np.concatenate(ids).astype(np.int32)
        offset_array = np.array(offsets)
        rank, common = shared_prefixes.find(token_ids, offset_array)
        tokens = dict.fromkeys(Tokens.__dataclass_fields__) | {
            "ids": token_ids, "loss_mask": np.concatenate(loss_masks), "offsets": offset_array,
            "line_numbers": np.arange(len(sources)),
            "sources": np.array(sources, np.int32), "rank": rank, "common": common,
        }  # fmt: skip
        return replace(splits.all_rows(Tokens(**tokens)), pairs=True)


def _written_out(network: Any, pairs: Pairs, reference: np.ndarray[Any, Any]) -> tuple[Tensor, list[float]]:
    """Returns the loss and the metrics with the formulas of the paper and of TRL: one answer at a
    time, unchunked logits, every token of it."""
    total = torch.zeros((), dtype=torch.float64)
    metrics = np.zeros(6)
    for (prompt, *answers), reference_log_p in zip(pairs.token_lists, reference, strict=True):
        log_p = [_log_p(network, prompt, answer) for answer in answers]
        gains = [now - before for now, before in zip(log_p, reference_log_p, strict=True)]
        total = total - torch.log(torch.sigmoid(_BETA * (gains[0] - gains[1])))
        chosen, rejected = (_BETA * float(gain.detach()) for gain in gains)
        metrics += [chosen, rejected, chosen - rejected, chosen > rejected, *(float(p.detach()) for p in log_p)]
    return total, list(metrics)


def _log_p(network: Any, prompt: Any, answer: Any) -> Tensor:
    if network.config.is_encoder_decoder:
        source, target = (torch.tensor(ids.astype(np.int64))[None] for ids in (prompt, answer))
        logits = network(input_ids=source, labels=target).logits[0].log_softmax(-1)
        return logits[torch.arange(len(answer)), target[0]].sum()
    ids = torch.tensor(np.concatenate([prompt, answer]).astype(np.int64))
    logits = network(input_ids=ids[None], attention_mask=torch.ones_like(ids[None])).logits[0].log_softmax(-1)
    positions = torch.arange(len(prompt), len(ids))
    return logits[positions - 1, ids[positions]].sum()


def _loaded(family: str, folder: Path) -> loading.LoadedModel:
    base = _BUILDERS[family](folder)
    lora = LoraSpec(rank=4, alpha=8, dropout=0, target_modules=_TARGETS.get(family, ("q_proj", "v_proj")))
    loaded = adapters.adapt(loading.load(base, dtype=torch.float64, longest=64), lora, 1)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trained(loaded.model).values():
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64) * 0.3
    loaded.model.eval()
    return loaded


def _answer_positions(batch: Batch) -> int:
    """Returns how many positions the twelve answers of the six pairs use."""
    assert batch.layout is not None
    return sum(end - begin for begin, end in batch.layout.segments[:12])


@pytest.mark.parametrize("family", _BUILDERS)
def test_pairs_give_the_loss_and_gradients_of_the_formula_with_any_sharing_of_rows(family: str, tmp_path: Path) -> None:
    loaded, pairs = _loaded(family, tmp_path), Pairs()
    with torch.no_grad(), loaded.model.disable_adapter():
        reference = np.array(
            [[float(_log_p(loaded.model, p, a)) for a in answers] for p, *answers in pairs.token_lists]
        )
    rows = replace(pairs.split(), reference=reference)
    exact, expected = _written_out(loaded.model, pairs, reference)
    assert 0 < expected[3] < len(rows)  # some pairs are preferred the wrong way round
    exact.backward()
    gradients = {name: p.grad.clone() for name, p in trained(loaded.model).items()}
    assert any(bool(gradient.abs().max() > 1e-6) for gradient in gradients.values())
    collator = Collator(False, False, loaded.encoder_decoder, 0, 0, torch.device("cpu"))
    ordered = tuple(rows.prefixes.sorted(range(len(rows))))
    ways = {"padded": (collator, [tuple(range(6))]), "two": (collator, [(0, 1, 2), (3, 4, 5)])}
    if not loaded.packing_obstacle:
        ways["packed"] = (replace(collator, packed=True), [tuple(range(6))])
        ways["shared"] = (replace(collator, packed=True, shared=True), [ordered[:3], ordered[3:]])
        packed, shared = (collate(rows, ordered) for collate in (ways["packed"][0], ways["shared"][0]))
        assert packed.inputs["input_ids"].numel() == packed_layout.rounded_up(
            int(rows.lengths.sum())
        )  # contains a prompt once
        assert _answer_positions(shared) < _answer_positions(packed) == int(rows.lengths.sum())
    chunked = LossSum.of(loaded.base, None, "cpu")
    tolerance = 1e-9 if family in ("gpt2", "t5") else 2e-6  # the other families' norms compute in float32 in any case
    for unchunked in (True, False):
        if not unchunked and family == "gemma2":
            continue  # its logits are changed after the output layer, so they can't be chunked
        loss_sum = PreferenceSum.over(chunked.unchunked if unchunked else chunked, _BETA)
        for way, (collate, micro_batches) in ways.items():
            loaded.model.zero_grad(set_to_none=True)
            loss_total, sums = 0.0, loss_sum.metric_sums()
            for micro_batch in micro_batches:
                batch = collate(rows, micro_batch)
                with loss_sum.packed_context(batch):
                    loss = loss_sum(loaded.model, batch, metric_sums=sums)
                    loss.backward()
                loss_total += float(loss.detach())
            assert loss_total == pytest.approx(float(exact.detach()), rel=tolerance), (way, unchunked)
            assert sums.tolist() == pytest.approx(expected, rel=10 * tolerance), (way, unchunked)
            for name, parameter in trained(loaded.model).items():
                assert (parameter.grad - gradients[name]).abs().max() < 10 * tolerance, (way, unchunked, name)


def test_the_loss_of_a_pair_is_its_formula_in_numbers() -> None:
    chosen, rejected = torch.tensor([1.5, -2.0]), torch.tensor([0.5, 1.0])
    losses = dpo.loss_of(chosen, rejected, 0.1)
    assert losses.tolist() == pytest.approx([float(np.log1p(np.exp(-0.1))), float(np.log1p(np.exp(0.3)))])


def _rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    drawn_pairs = zip(drawn(count, seed), drawn(count, seed + 50), strict=True)
    return [
        {"prompt": pair["prompt"], "chosen": pair["completion"], "rejected": f"{other['completion']} no"}
        for pair, other in drawn_pairs
    ]


def _job(folder: Path, base: Path, **options: Any) -> Job:
    training = {"objective": "dpo", "dpo": DpoSpec(beta=0.5), "max_steps": 4}
    return prepare(
        folder, base, _rows(12), test=_rows(5, 1), validation=_rows(5, 2), every=2,
        **{**options, "training": {**training, **options.get("training", {})}},
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> dict[str, FinishedRun]:
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
        name: _job(root / name.replace(", ", "-"), models["t5" if name == "t5" else "llama"], **options)
        for name, options in ways.items()
    }
    finished: dict[str, FinishedRun] = {}
    for world in (1, 2):
        names = [name for name, job in jobs.items() if job.run.world.size == world]
        finished.update(zip(names, finish_all([jobs[name] for name in names]), strict=True))
    resumed = [  # in separate folders, so that the reference's log probabilities aren't known there
        _job(root / f"again-{name}", models["llama"], resume=finished[name].paths.checkpoints / "step-2", **ways[name])
        for name in ("dropout", "pissa", "full")
    ]
    finished.update(zip(("dropout resumed", "pissa resumed", "full resumed"), finish_all(resumed), strict=True))
    return finished


def test_training_begins_at_log_two_and_its_loss_falls(runs: dict[str, FinishedRun]) -> None:
    one = runs["one"]
    assert one.losses[0] == pytest.approx(float(np.log(2)), abs=1e-6)
    assert one.losses[-1] < 0.95 * one.losses[0]
    assert one.evals("test")[0] == pytest.approx(float(np.log(2)), abs=1e-6)
    assert one.events(events.StepEvent)[0].label_tokens == 8  # pairs
    assert one.decision("packing").choice == "on"
    assert one.decision("head").choice == "chunked"


@pytest.mark.parametrize("way", ["padded", "two, ddp", "two, zero2", "two, zero3", "two, fsdp"])
def test_pairs_have_equal_weight_with_any_split(way: str, runs: dict[str, FinishedRun]) -> None:
    assert runs[way].losses == pytest.approx(runs["one"].losses, abs=2e-5)
    assert runs[way].evals("validation") == pytest.approx(runs["one"].evals("validation"), abs=2e-5)


@pytest.mark.parametrize("way", ["pissa", "full", "t5"])
def test_the_loss_falls_with_methods_that_change_the_base_and_with_encoder_decoders(
    way: str, runs: dict[str, FinishedRun]
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
def test_a_resumed_run_continues_to_the_bit(way: str, runs: dict[str, FinishedRun]) -> None:
    """Its reference is that of the first attempt, although its results aren't available."""
    assert runs[f"{way} resumed"].losses == runs[way].losses[2:]
    name = "model.safetensors" if way == "full" else "adapter_model.safetensors"
    written = [(runs[run].paths.export / name).read_bytes() for run in (way, f"{way} resumed")]
    assert written[0] == written[1]


@pytest.mark.parametrize("way", ["one", "full", "t5", "two, ddp", "two, fsdp"])
def test_every_step_and_evaluation_reports_the_rewards(way: str, runs: dict[str, FinishedRun]) -> None:
    steps, evals = (runs[way].events(kind) for kind in (events.StepEvent, events.EvalEvent))
    for event in (*steps, *evals):
        rewards = event.rewards
        assert rewards is not None
        assert rewards.margins == pytest.approx(rewards.chosen - rewards.rejected, abs=1e-6)
        assert 0 <= rewards.accuracies <= 1
        assert rewards.logps_chosen < 0 > rewards.logps_rejected
        assert event.loss >= float(np.log1p(np.exp(-rewards.margins))) - 1e-6  # Jensen's inequality
    assert steps[0].rewards.chosen == pytest.approx(0, abs=2e-5)  # type: ignore[union-attr]
    assert steps[-1].rewards.margins > 0.05  # type: ignore[union-attr]
    if way.startswith("two"):
        one = runs["one"].events(events.EvalEvent)
        assert [e.rewards.margins for e in evals] == pytest.approx([e.rewards.margins for e in one], abs=1e-4)  # type: ignore[union-attr]


def test_perplexity_is_that_of_the_chosen_answers(runs: dict[str, FinishedRun], tmp_path: Path) -> None:
    run = runs["one"]
    (perplexity,) = (
        score for score in run.events(events.ScoresEvent)[0].evaluation.scores if score.name == "perplexity"
    )
    assert perplexity.how == "exp(mean loss per token of the chosen answers of all test rows)"
    chosen = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in _rows(5, 1)]
    run.paths.data("test").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    assert perplexity.tuned == pytest.approx(
        float(np.exp(result_loading.loss(result_loading.result(run), run, tmp_path))), rel=1e-4
    )


@pytest.mark.parametrize(
    ("rows", "objective", "message"),
    [
        (_rows(4), "supervised", "the rows have chosen and rejected answers; set training.objective: dpo"),
        (drawn(4), "dpo", "objective dpo needs rows with prompt, chosen and rejected"),
        ([{"prompt": "a", "chosen": " b", "rejected": " b"}], "dpo", "row 1: chosen and rejected are the same"),
        (
            [{"prompt": "a", "chosen": " b", "rejected": [7]}],
            "dpo",
            "row 1: rejected: messages[1] is 7; it must be an object",
        ),
    ],
    ids=["supervised", "no pairs", "the same answer", "no text"],
)
def test_rows_that_dont_fit_the_objective_are_rejected(
    rows: Any, objective: str, message: str, models: dict[str, Path], tmp_path: Path
) -> None:
    job = prepare(tmp_path, models["llama"], rows, training={"objective": objective, "global_batch_size": 2})
    assert message in job.finish().failure.message
