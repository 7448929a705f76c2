"""Defines what identifies a FineTuneJob in memory, and what is known of one at one moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_operator.core.objects import Attempt, Pod

Key = tuple[str, str]
"""The namespace and name of a FineTuneJob."""

Owner = tuple[str, str]
"""The namespace and uid of an owner: objects of another namespace are never its children."""

Raw = Mapping[str, Any]


@dataclass(frozen=True)
class JobSnapshot:
    """Holds what the cache knows about one FineTuneJob at one moment: its raw body and its
    children.

    A child is who it is by proof: a Job of the same namespace that the FineTuneJob controls, called
    as its children are, whose attempt is at most the one after that of status; and a pod of the
    same namespace that such a Job controls. `core.objects.Observed` is made from it: its body is
    parsed and validated, and it adds warning events and the newest progress report.
    """

    body: Raw
    attempts: tuple[Attempt, ...]
    preflight: Attempt | None
    cleanup: Attempt | None
    orphaned_pods: tuple[Pod, ...]

    @property
    def pods(self) -> tuple[Pod, ...]:
        """All pods, of all children."""
        children = (*self.attempts, *(child for child in (self.preflight, self.cleanup) if child))
        return (*(pod for child in children for pod in child.pods), *self.orphaned_pods)

    @property
    def child_uids(self) -> tuple[str, ...]:
        """The uids of all children and of their pods."""
        children = (*self.attempts, *((self.preflight,) if self.preflight else ()))
        return tuple(uid for child in children for uid in (child.job.uid, *(pod.uid for pod in child.pods)))

    @property
    def generation(self) -> int:
        """The generation of its spec."""
        return int(self.body["metadata"].get("generation", 1))

    @property
    def key(self) -> Key:
        """The key of the FineTuneJob."""
        return key_of(self.body)

    @property
    def uid(self) -> str:
        """The uid of the FineTuneJob."""
        return str(self.body["metadata"]["uid"])

    @property
    def resource_version(self) -> str:
        """The version that a decision is based on, and that its writes require."""
        return str(self.body["metadata"]["resourceVersion"])


def key_of(body: Raw) -> Key:
    """Returns the key of a FineTuneJob's raw body."""
    return (body["metadata"]["namespace"], body["metadata"]["name"])
