"""Decides which nodes the next attempt avoids, because their GPUs failed in an earlier one.

The nodes are those of the pods that still exist, and those that the newest attempt avoided, which
are an annotation of its Job. If somebody deletes that Job, a node may be tried once more. No I/O.
"""

from __future__ import annotations

from typing import Any

from finetune_operator.core.causes.pod_reason import pod_reason
from finetune_operator.core.objects import Attempt

MAX_NODES = 16
_REASONS = ("GpuFault", "GpuUnavailable")


def avoided_nodes(attempts: tuple[Attempt, ...]) -> tuple[str, ...]:
    """Returns the names of the nodes, those that failed last at the end; at most MAX_NODES."""
    inherited = attempts[-1].job.avoided_nodes if attempts else ()
    failed = [pod.node for attempt in attempts for pod in attempt.pods if pod.node and pod_reason(pod)[0] in _REASONS]
    nodes = [*(node for node in inherited if node not in failed), *dict.fromkeys(failed)]
    return tuple(nodes[-MAX_NODES:])


def preferences(nodes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Returns the preferred node affinity of pods that avoid these nodes; none for no nodes.

    It is a preference: on a cluster that has no other node, the driver may have been repaired by
    the next attempt, and a requirement would leave the job pending forever.
    """
    if not nodes:
        return []
    fields = [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in nodes]
    return [{"weight": 100, "preference": {"matchFields": fields}}]
