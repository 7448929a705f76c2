"""Base model and result on the test rows: loss before the first step and after the last, answers, scores. Called by
`story` on all ranks together.

What the base model did stands in the state that checkpoints hold, so a resumed run never asks it again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from finetune_api import events
from finetune_api.evaluation import Evaluation
from finetune_trainer import answers, scores
from finetune_trainer.answers import Answering
from finetune_trainer.checkpoint import State
from finetune_trainer.data import Data
from finetune_trainer.evaluate import Measured
from finetune_trainer.generation import Answer, Speech
from finetune_trainer.split import Split
from finetune_trainer.train import Training

_MOST_PARTS = 1000
_ENDS = 2**20  # bytes


@dataclass(frozen=True)
class Found:
    """`loss` is the result's on the test rows."""

    loss: float | None = None


def base(t: Training, data: Data, state: State) -> State | None:
    """The state with what the base model does on the test rows; None where all agreed to stop meanwhile."""
    if state.step > 0 or data.test is None or state.test_loss_before is not None:
        return state
    found = _loss(t, data.test, 0)
    said = _answers(t, data, "base", _digest(t.paths.model))
    if said is None:
        return None
    return state.model_copy(
        update={
            "test_loss_before": found.loss,
            "test_parts_before": parts(found, data.test),
            "answers_before": tuple(answer.text for answer in said),
            "unfinished_before": sum(not answer.finished for answer in said),
        }
    )


def result(t: Training, data: Data, state: State) -> Found | None:
    """Reports samples and scores. None where all agreed to stop meanwhile."""
    if data.test is None:
        return Found()
    found = _loss(t, data.test, state.written(keep_best=t.run.training.keep_best))
    said = _answers(t, data, "tuned", answers.weights_digest(t.learner, t.world))
    if said is None:
        return None
    if t.world.is_first:
        _report(t, data, state, found, said)
    return Found(found.loss)


def parts(found: Measured, test: Split) -> tuple[tuple[float, float], ...]:
    """(-log p of the answer, its tokens) row by row; neighbours together where there are many."""
    if found.rows is None:
        return ()
    count = min(len(test), _MOST_PARTS)
    losses, tokens = (np.array_split(values, count) for values in (found.rows, test.answer_counts))
    return tuple((float(some.sum()), float(of.sum())) for some, of in zip(losses, tokens, strict=True))


def _report(t: Training, data: Data, state: State, found: Measured, said: tuple[Answer, ...]) -> None:
    """Rank 0 only."""
    assert data.test is not None  # noqa: S101
    spec, seed = t.run.evaluation, t.run.training.seed
    for index, (row, before, after) in enumerate(zip(data.samples, state.answers_before, said, strict=True)):
        t.reporter.report(
            events.SampleEvent,
            index=index,
            prompt="\n".join(turn.content for turn in row.turns[:-1]),
            reference=row.turns[-1].content,
            before=before,
            after=after.text,
            row=row.number,
        )
    texts = scores.Texts([row.turns[-1].content for row in data.samples], state.answers_before, [a.text for a in said])
    all_scores = scores.scores(spec.metrics, texts, seed)
    if state.test_parts_before:
        before_parts, after_parts = np.array(state.test_parts_before), np.array(parts(found, data.test))
        all_scores = (*all_scores, scores.perplexity(before_parts, after_parts, seed, pairs=data.test.pairs))
    evaluation = Evaluation(
        step=state.written(keep_best=t.run.training.keep_best),
        scores=all_scores,
        answered=len(said),
        unfinished_base=state.unfinished_before,
        unfinished_tuned=sum(not answer.finished for answer in said),
        max_new_tokens=spec.max_new_tokens,
        confidence=scores.CONFIDENCE,
        resamples=scores.RESAMPLES,
        seed=seed,
    )
    t.reporter.report(events.ScoresEvent, evaluation=evaluation)


def _loss(t: Training, test: Split, step: int) -> Measured:
    t.reporter.phase("evaluating")
    found = t.evaluator.measure(test, by_row=True)
    t.reporter.report(
        events.EvalEvent,
        step=step,
        split="test",
        loss=found.loss,
        label_tokens=found.labels,
        rewards=found.rewards,
    )
    return found


def _answers(t: Training, data: Data, who: Literal["base", "tuned"], digest: str) -> tuple[Answer, ...] | None:
    renderer, spec, shape = data.renderer, t.run.evaluation, t.plan.shape
    config = t.learner.plain.config
    speech = Speech(
        renderer.tokenizer,
        renderer.stops,
        spec.max_new_tokens,
        t.run.world.splits_weights,
        spec.generation,
        getattr(config, "max_position_embeddings", None),
        t.world.device,
    )
    half = t.loss_sum.autocast
    a = Answering(
        t.learner,
        t.world,
        speech,
        tokens=shape.tokens if shape.packed else shape.rows * data.longest,
        autocast=half,
        folder=t.paths.answers,
        key=f"{who}-{digest}" if half is None else f"{who}-{digest}-half",
        seed=t.run.training.seed,
        alive=t.reporter.alive,
        told=lambda count: t.reporter.phase(
            "evaluating", f"{count} of {len(data.samples)} test rows answered by the {who} model"
        ),
        stopped=t.paths.stop.exists,
    )
    return answers.answer(a, [renderer.prompt(row) for row in data.samples])


def _digest(model: Path) -> str:
    """Of the base model's files: configuration whole, weights by size, beginning and end."""
    digest = hashlib.sha256()
    for path in sorted(model.glob("*.json")) + sorted(model.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_ENDS))
            file.seek(max(0, size - _ENDS))
            digest.update(file.read(_ENDS))
    return digest.hexdigest()[:32]
