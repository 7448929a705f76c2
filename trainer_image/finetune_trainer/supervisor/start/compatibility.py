"""Decides whether a job may start from the checkpoint or the adapter of another one, by what that
one's manifest says of its model and its configuration. It does no I/O."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic_core import to_jsonable_python

from finetune_api.base import Model
from finetune_api.messages.run import RunConfig

_METHOD = frozenset({"dropout", "plusRatio"})
"""Settings of LoRA that its weights don't depend on."""

_LATER = frozenset({
    "epochs", "maxSteps", "learningRate", "scheduler", "minLearningRateRatio", "decayRatio", "warmupRatio",
    "evalEverySteps", "earlyStopping", "keepBest", "maxSkippedSteps", "lossSpike",
    "microBatchSize", "activationCheckpointing", "compile",
})  # fmt: skip
"""Settings of the recipe that concern only the steps that follow, or only speed."""

_PLACES = frozenset({"train", "validation", "test", "sources", "rendering"})
"""Where rows are, and the date of the template: the rows themselves are compared by digest."""


def differences(provenance: Mapping[str, Any], run: RunConfig, digest: str | None) -> tuple[str, ...]:
    """Returns clauses about what differs between what was trained and what the job is to train.

    `provenance` is that of the manifest, and `digest` that of the job's base model; None if its
    weights haven't been read.
    """
    start = run.model.checkpoint
    if start is None:
        return ()
    base: Mapping[str, Any] = provenance.get("model") or {}
    theirs: Mapping[str, Any] = provenance.get("configuration") or {}
    if not base or not theirs:
        return ("its manifest doesn't say how it was trained, because an older trainer has written it",)
    clauses = [
        *_base(base, run, digest),
        *_compared("model.quantization", theirs.get("model", {}).get("quantization"), run.model.quantization),
        *_compared("method.type", theirs.get("method"), run.method),
        *_section("method.lora", theirs.get("lora"), run.lora, _METHOD),
        *_section("method.full", theirs.get("full"), run.full, frozenset()),
    ]
    if start.use == "trainingState":
        clauses += [
            *_section("dataset", theirs.get("data"), run.data, _PLACES),
            *_section("training", theirs.get("training"), run.training, _LATER),
            *_start(theirs, run),
        ]
    return tuple(clauses)


def _base(theirs: Mapping[str, Any], run: RunConfig, digest: str | None) -> Iterator[str]:
    """Compares the bases: by the digest of their files if both are known."""
    known = theirs.get("digest")
    if known and digest:
        if known != digest:
            yield f"its base model {theirs.get('uri')} has other files than model.uri {run.model.location.display}"
    elif digest is None and known:
        return  # compared once the weights are there
    else:
        yield from _compared("model.uri", theirs.get("uri"), run.model.location.display)


def _start(theirs: Mapping[str, Any], run: RunConfig) -> Iterator[str]:
    """Refuses to continue DPO that had started from weights: they are its reference model."""
    origin = (theirs.get("model") or {}).get("checkpoint") or {}
    if run.training.objective == "dpo" and origin.get("use") == "weights":
        yield "it was trained by dpo from the weights of another job, which are its reference model"


def _section(name: str, theirs: Mapping[str, Any] | None, own: Model | None, without: frozenset[str]) -> Iterator[str]:
    """Compares two sections. A field that the other version didn't have was at its default."""
    here = own.to_json() if own else {}
    there = {**(_defaults(type(own)) if own and theirs is not None else {}), **(theirs or {})}
    for key in sorted((there.keys() | here.keys()) - without):
        yield from _compared(f"{name}.{key}", there.get(key), here.get(key))


def _defaults(model: type[Model]) -> dict[str, Any]:
    """Returns the defaults of a section's fields, as JSON, without those that are absent."""
    values = {
        field.alias or name: field.get_default(call_default_factory=True)
        for name, field in model.model_fields.items()
        if not field.is_required()
    }
    plain: dict[str, Any] = to_jsonable_python(values, by_alias=True, exclude_none=True)
    return {key: value for key, value in plain.items() if value is not None}


def _compared(field: str, theirs: Any, own: Any) -> Iterator[str]:
    if theirs != own:
        yield f"{field} was {theirs!r} there and is {own!r} here"
