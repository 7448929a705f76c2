"""Says what the job's pods have stored in its output, what they couldn't store, and which of their
reports are believed.

A pod, or somebody who can write its termination message, may name any place; what doesn't lie in
the job's own output isn't believed. There is no I/O.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from finetune_api import names, recipe
from finetune_api.messages.progress import Storing
from finetune_api.messages.result import Result
from finetune_api.messages.run import RunConfig
from finetune_api.resource import FineTuneJob
from finetune_api.status import (
    CONDITION_CHECKPOINTS_STORED,
    MAX_SIGNERS,
    ArtifactStatus,
    CheckpointStatus,
    Condition,
    Status,
)
from finetune_operator.core.objects import Observed
from finetune_operator.core.verdict import Verdict

STORED = "Stored"


def artifact(result: Result | None, job: FineTuneJob) -> ArtifactStatus | None:
    """Returns the artifact of a result; None if there is none at spec.output.uri."""
    reported = result.artifact if result else None
    return reported if reported and reported.uri.rstrip("/") == job.spec.output.uri.rstrip("/") else None


def stored_artifact(observed: Observed, attempt: int) -> ArtifactStatus | None:
    """Returns the artifact that the pods of an attempt have stored, wherever they reported it."""
    report, status = observed.report, observed.job.status
    current = observed.current if observed.current and observed.current.number == attempt else None
    results = tuple(pod.result for pod in current.pods) if current else ()
    if report and report.progress.attempt == attempt:
        results = (*results, Result(outcome="succeeded", artifact=report.progress.artifact))
    written = status.artifact if status.attempt == attempt else None
    return next((stored for result in results if (stored := artifact(result, observed.job))), written)


def corrected(verdict: Verdict | None, observed: Observed, attempt: int) -> Verdict | None:
    """Returns the verdict on an attempt (None if its Job is gone), given what it has stored.

    A result that is whole in the output counts, whatever happened to the pods after that.
    """
    if verdict is not None and verdict.state != "failed":
        return verdict
    stored = stored_artifact(observed, attempt) if attempt else None
    if stored is None:
        return verdict
    result = verdict.result if verdict and verdict.result else Result(outcome="succeeded")
    result = result.model_copy(update={"artifact": stored})
    return Verdict("succeeded", "Trained", "the result was stored before the attempt ended", result)


def signers(observed: Observed) -> tuple[str, ...]:
    """Returns the public keys of all pods that may have written manifests, the newest last."""
    known = dict.fromkeys((*observed.job.status.signers, *_reported_signers(observed)))
    return tuple(key for key in known if key)[-MAX_SIGNERS:]


def _reported_signers(observed: Observed) -> Iterator[str | None]:
    for attempt in observed.attempts:
        yield from (pod.result.signer for pod in attempt.pods if pod.result)
    if observed.report:
        yield observed.report.progress.signer


def token_signers(observed: Observed) -> tuple[str, ...]:
    """Returns the public keys of all preflight pods that have stored tokens, the newest last."""
    pods = observed.preflight.pods if observed.preflight else ()
    known = dict.fromkeys((*observed.job.status.token_signers, *(pod.result.signer for pod in pods if pod.result)))
    return tuple(key for key in known if key)[-MAX_SIGNERS:]


def with_origin(run: RunConfig, observed: Observed) -> RunConfig:
    """Returns a RunConfig that says whose manifests count and what may be taken over.

    Without progress, nobody could know the keys of pods.
    """
    return run.model_copy(
        update={
            "signers": signers(observed) if run.progress else None,
            "token_signers": token_signers(observed),
            "inherits": observed.job.status.checkpoint is None,
            "recipe": recipe.digests(observed.job.spec),
        }
    )


def stored_condition(before: Status, after: Status, storing: Storing | None, time: str) -> tuple[Condition, ...]:
    """Returns the condition CheckpointsStored; none as long as nothing is known.

    `storing` is what the current attempt reports; without a report, the condition stays as it is.
    """
    earlier = next((c for c in before.conditions if c.type == CONDITION_CHECKPOINTS_STORED), None)
    if after.phase == "Succeeded" and (earlier or storing):
        storing = Storing()
    if storing is None:
        return (earlier,) if earlier else ()
    value: Literal["True", "False"] = "False" if storing.reason else "True"
    changed = earlier is None or earlier.status != value
    return (
        Condition(
            type=CONDITION_CHECKPOINTS_STORED,
            status=value,
            observed_generation=after.observed_generation,
            last_transition_time=time if changed or earlier is None else earlier.last_transition_time,
            reason=storing.reason or STORED,
            message=_message(storing),
        ),
    )


def _message(storing: Storing) -> str:
    if not storing.reason:
        return ""
    tries = "1 upload has failed" if storing.failures == 1 else f"{storing.failures} uploads have failed"
    steps = "1 step" if storing.steps_at_risk == 1 else f"{storing.steps_at_risk} steps"
    return f"{storing.message}. {tries} since {storing.since}; {steps} would be lost if the pod ended now"


def contains(job: FineTuneJob, checkpoint: CheckpointStatus | None) -> bool:
    """Whether a checkpoint is one of the output's: in the folder of its step."""
    if checkpoint is None:
        return False
    return checkpoint.uri == f"{job.spec.output.uri.rstrip('/')}/{names.checkpoint_dir(checkpoint.step)}"


def message(result: Result | None, job: FineTuneJob) -> str:
    """Returns what a job that has succeeded says of its result."""
    if result is None or result.artifact is None:
        return "training is complete"
    if artifact(result, job) is None:
        return "training is complete; the pod names a result outside of spec.output.uri, which isn't believed"
    headline = result.evaluation.headline if result.evaluation else ""
    return f"the result is in {job.spec.output.uri}{headline and f'; {headline}'}"
