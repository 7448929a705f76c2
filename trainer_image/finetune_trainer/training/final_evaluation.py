"""The base model and the result on the test rows: loss, generated answers and scores.

What the base model did is part of the state that checkpoints hold, so a resumed run doesn't
evaluate it again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from finetune_api.messages import events
from finetune_api.messages.evaluation import Evaluation
from finetune_trainer.checkpoint.state import CheckpointState
from finetune_trainer.data.dataset import Data
from finetune_trainer.data.splits import Split
from finetune_trainer.evaluation import answers, scores
from finetune_trainer.evaluation.answers import AnswerJob
from finetune_trainer.evaluation.evaluator import SplitLoss
from finetune_trainer.evaluation.generation import Answer, GenerationSettings
from finetune_trainer.model import device_memory
from finetune_trainer.parallel.estimate.host_memory import gib
from finetune_trainer.training.context import Training

_MAX_PARTS = 1000
_MEMORY_FACTOR = 1.3  # times the size of the weights: what it takes to generate from a model
_DIGEST_BYTES = 2**20  # at either end of a file


@dataclass(frozen=True)
class TestResult:
    """`loss` is that of the result on the test rows; None if there are none."""

    loss: float | None = None


def evaluate_base(t: Training, data: Data, state: CheckpointState) -> CheckpointState | None:
    """The state with what the base model does on the test rows, unless it is known already.

    All ranks call it together. Returns None if they agreed to stop.
    """
    if state.step > 0 or data.test is None or state.test_loss_before is not None:
        return state
    loss = _measure(t, data.test, 0)
    base_answers = _answers(t, data, "base", _model_digest(t.paths.model))
    if base_answers is None:
        return None
    return state.model_copy(
        update={
            "test_loss_before": loss.loss,
            "test_parts_before": parts(loss, data.test),
            "answers_before": tuple(answer.text for answer in base_answers),
            "unfinished_before": sum(not answer.finished for answer in base_answers),
        }
    )


def evaluate_result(t: Training, data: Data, state: CheckpointState) -> TestResult | None:
    """Evaluate the trained model on the test rows, and report samples and scores.

    All ranks call it together. Returns None if they agreed to stop.
    """
    if data.test is None:
        return TestResult()
    loss = _measure(t, data.test, state.result_step(keep_best=t.run.training.keep_best))
    tuned_answers: tuple[Answer, ...] | None = ()
    if len(state.answers_before) == len(data.samples):  # otherwise there is nothing to compare with
        tuned_answers = _answers(t, data, "tuned", answers.weights_digest(t.strategy, t.world))
    if tuned_answers is None:
        return None
    if t.world.is_first:
        _report_samples(t, data, state, tuned_answers)
        _report_scores(t, data, state, loss, tuned_answers)
    return TestResult(loss.loss)


def parts(loss: SplitLoss, test: Split) -> tuple[tuple[float, float], ...]:
    """(-log p of the answer, its tokens) of each test row, or of up to 1,000 groups of neighboring
    rows."""
    if loss.rows is None:
        return ()
    count = min(len(test), _MAX_PARTS)
    losses, tokens = (np.array_split(values, count) for values in (loss.rows, test.answer_counts))
    return tuple((float(nll.sum()), float(counts.sum())) for nll, counts in zip(losses, tokens, strict=True))


def _report_samples(t: Training, data: Data, state: CheckpointState, tuned_answers: tuple[Answer, ...]) -> None:
    if not tuned_answers:
        return
    for index, (row, before, after) in enumerate(zip(data.samples, state.answers_before, tuned_answers, strict=True)):
        t.reporter.report(
            events.SampleEvent,
            index=index,
            prompt="\n".join(turn.content for turn in row.turns[:-1]),
            reference=row.turns[-1].content,
            before=before,
            after=after.text,
            row=row.number,
        )


def _report_scores(
    t: Training, data: Data, state: CheckpointState, loss: SplitLoss, tuned_answers: tuple[Answer, ...]
) -> None:
    spec, seed = t.run.evaluation, t.run.training.seed
    references = [row.turns[-1].content for row in data.samples] if tuned_answers else []
    texts = scores.Texts(references, state.answers_before, [answer.text for answer in tuned_answers])
    all_scores = scores.scores(spec.metrics, texts, seed)
    if state.test_parts_before and data.test is not None:
        before_parts, after_parts = np.array(state.test_parts_before), np.array(parts(loss, data.test))
        all_scores = (*all_scores, scores.perplexity(before_parts, after_parts, seed, pairs=data.test.pairs))
    evaluation = Evaluation(
        step=state.result_step(keep_best=t.run.training.keep_best),
        scores=all_scores,
        answered=len(tuned_answers),
        unfinished_base=state.unfinished_before if tuned_answers else 0,
        unfinished_tuned=sum(not answer.finished for answer in tuned_answers),
        max_new_tokens=spec.max_new_tokens,
        confidence=scores.CONFIDENCE,
        resamples=scores.RESAMPLES,
        seed=seed,
    )
    t.reporter.report(events.ScoresEvent, evaluation=evaluation)


def _measure(t: Training, test: Split, step: int) -> SplitLoss:
    t.reporter.phase("evaluating")
    loss = t.evaluator.measure(test, by_row=True)
    t.reporter.report(
        events.EvalEvent, step=step, split="test", loss=loss.loss, label_tokens=loss.label_count, rewards=loss.rewards
    )
    return loss


def _answers(t: Training, data: Data, model: Literal["base", "tuned"], digest: str) -> tuple[Answer, ...] | None:
    """The answers to the sampled test rows: none if the full model doesn't fit, None after a
    stop."""
    if data.samples and not _gathers(t):
        return ()
    renderer, spec, shape = data.renderer, t.run.evaluation, t.plan.shape
    settings = GenerationSettings(
        renderer.tokenizer,
        renderer.stops,
        spec.max_new_tokens,
        spec.generation,
        getattr(t.strategy.unwrapped.config, "max_position_embeddings", None),
        t.world.device,
    )
    job = AnswerJob(
        t.strategy,
        t.world,
        settings,
        tokens=shape.tokens // t.world.sequence.size if shape.packed else shape.rows * data.longest,
        folder=t.paths.answers,
        key=f"{model}-{digest}" if t.loss_sum.autocast is None else f"{model}-{digest}-half",
        seed=t.run.training.seed,
        heartbeat=t.reporter.heartbeat,
        on_progress=lambda count: t.reporter.phase(
            "evaluating", f"{count} of {len(data.samples)} test rows answered by the {model} model"
        ),
        should_stop=t.paths.stop.exists,
    )
    return answers.answer(job, [renderer.prompt(row) for row in data.samples])


def _gathers(t: Training) -> bool:
    """Whether every rank has memory for the full model. All ranks get the same answer."""
    needed, (device, world) = t.strategy.gathered_bytes, (t.world.device, t.world)
    if not needed:
        return True
    if device.type == "cuda":
        torch.cuda.empty_cache()
    free = min(world.all_gather(device_memory.free_bytes(device, world.local_size), int))
    reason = skip_reason(needed, free, t.run.world.strategy)
    if reason:
        t.reporter.decision("answers", "skipped", reason)
    return not reason


def skip_reason(needed: int, free: int, strategy: str) -> str:
    """Why no answers are generated, or "". `needed` is the size of the full model and `free` the
    memory that the rank with the least has, in bytes. It is pure."""
    need = int(needed * _MEMORY_FACTOR)
    if need <= free:
        return ""
    return (
        f"to generate answers, each process needs the full model, {gib(need)} with what it computes, and {gib(free)} "
        f"are free; strategy {strategy} would have to gather it for every token. Generate answers from the written "
        "result instead, or set evaluation.samples to 0"
    )


def _model_digest(model: Path) -> str:
    """Identifies a base model by its configuration and by the sizes, first and last bytes of its
    weights."""
    digest = hashlib.sha256()
    for path in sorted(model.glob("*.json")) + sorted(model.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_DIGEST_BYTES))
            file.seek(max(0, size - _DIGEST_BYTES))
            digest.update(file.read(_DIGEST_BYTES))
    return digest.hexdigest()[:32]
