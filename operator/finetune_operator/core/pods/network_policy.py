"""Builds the NetworkPolicy of one FineTuneJob, which closes its pods to all others.

The rendezvous, Gloo and NCCL have no authentication of their own. It does no I/O.
"""

from __future__ import annotations

from typing import Any

from finetune_api import names
from finetune_api.resource import FineTuneJob
from finetune_operator.core.pods.manifests import object_labels, owner_reference
from finetune_operator.settings import Settings

Manifest = dict[str, Any]


def network_policy(job: FineTuneJob, settings: Settings) -> Manifest:
    """Returns the policy: the pods of a job reach each other on all ports, and nobody else does.

    Whoever the administrator names may read their metrics. With `egress`, pods reach only each
    other and what the administrator lists.
    """
    own = {"podSelector": {"matchLabels": {names.LABEL_JOB_UID: job.metadata.uid}}}
    policies = settings.network_policies
    ingress: list[Manifest] = [{"from": [own]}]
    if policies.metrics_from:
        ingress.append({"from": list(policies.metrics_from), "ports": [{"port": names.METRICS_PORT_NAME}]})
    egress = {"egress": [{"to": [own]}, *policies.egress]} if policies.egress else {}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {
            "name": names.network_policy_name(job.metadata.name),
            "namespace": job.metadata.namespace,
            "labels": object_labels(job),
            "ownerReferences": [owner_reference(job)],
        },
        "spec": {
            **own,
            "policyTypes": ["Ingress", "Egress"] if egress else ["Ingress"],
            "ingress": ingress,
            **egress,
        },
    }
