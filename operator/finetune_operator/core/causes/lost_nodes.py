"""Decides when a pod on a node that doesn't answer counts as lost. The clock is an argument, and
there is no I/O.

A node that falls silent leaves its pods in the state that it last reported, forever. The node
controller marks such pods as not ready, and later for deletion, which no kubelet carries out. Both
marks have times, so a pod is lost a bounded time after either of them, and the group goes on
elsewhere. Nobody can know whether the processes of a silent node still run; the operator's progress
server and the owner of the output refuse whatever an older attempt sends.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import datetime

from finetune_operator.core.objects import Attempt, Observed, Pod, seconds_between

SILENT_SECONDS = 300.0
"""How long a node may be silent; the taint manager marks its pods for deletion after as long."""
OVERDUE_SECONDS = 60.0
"""How long a pod may outlive its grace period, in which a working kubelet would have ended it."""


def with_lost_pods(observed: Observed, now: datetime) -> Observed:
    """Returns the observation in which pods that are lost say so. Orphaned ones are left out."""
    if not any(_seconds_left(pod, now) is not None for pod in _pods(observed)):
        return observed
    preflight = observed.preflight
    return replace(
        observed,
        attempts=tuple(_marked(attempt, now) for attempt in observed.attempts),
        preflight=_marked(preflight, now) if preflight else None,
        orphaned_pods=tuple(pod for pod in observed.orphaned_pods if not _is_lost(pod, now)),
    )


def seconds_until_lost(observed: Observed, now: datetime) -> float | None:
    """Returns how many seconds from now the next pod is lost; None if no node is silent."""
    remaining = (_seconds_left(pod, now) for pod in _pods(observed))
    return min((seconds for seconds in remaining if seconds is not None and seconds > 0), default=None)


def silent_nodes(attempt: Attempt) -> str:
    """Returns a clause that names the nodes of an attempt that don't answer; empty if all do."""
    pods = [pod for pod in attempt.pods if pod.is_live and pod.silent_since]
    nodes = list(dict.fromkeys(pod.node for pod in pods))
    if not nodes:
        return ""
    named = f"node {nodes[0]} doesn't" if len(nodes) == 1 else f"nodes {', '.join(nodes[:3])} don't"
    return f"{named} answer since {min(pod.silent_since for pod in pods)}"


def _pods(observed: Observed) -> Iterator[Pod]:
    for child in (*observed.attempts, *((observed.preflight,) if observed.preflight else ())):
        yield from child.pods
    yield from observed.orphaned_pods


def _marked(attempt: Attempt, now: datetime) -> Attempt:
    return replace(attempt, pods=tuple(replace(pod, lost=_is_lost(pod, now)) for pod in attempt.pods))


def _is_lost(pod: Pod, now: datetime) -> bool:
    seconds = _seconds_left(pod, now)
    return seconds is not None and seconds <= 0


def _seconds_left(pod: Pod, now: datetime) -> float | None:
    """Returns how many seconds from now a pod counts as lost; None if its node answers."""
    if not pod.is_live:
        return None
    return min(_limits(pod, now), default=None)


def _limits(pod: Pod, now: datetime) -> Iterable[float]:
    if pod.silent_since:
        yield SILENT_SECONDS - seconds_between(pod.silent_since, now)
    if pod.delete_by and pod.node:
        yield OVERDUE_SECONDS - seconds_between(pod.delete_by, now)
