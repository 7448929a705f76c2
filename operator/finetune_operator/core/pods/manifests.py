"""Builds the manifests of one FineTuneJob's children: Jobs and a Service.

Pods satisfy Pod Security "restricted" and get no permission in the cluster, only a token for
reporting progress. Nothing is created here, and no argument is edited.
"""

from __future__ import annotations

import json
from typing import Any

from finetune_api import names
from finetune_api.messages.run import RunConfig
from finetune_api.reasons import REASONS
from finetune_api.resource import FineTuneJob
from finetune_api.status import Restarts
from finetune_operator.core.pods.digest import pods_digest
from finetune_operator.core.pods.pod import network_profile, pod_spec
from finetune_operator.core.pods.scheduling import queue_annotations
from finetune_operator.settings import Settings

Manifest = dict[str, Any]

# A preflight check that fails for a reason that only a person can fix isn't retried.
_PERMANENT_EXIT_CODES = sorted({r.exit_code for r in REASONS.values() if r.cause == "user" and r.exit_code > 1})
_MAX_PREFLIGHT_RETRIES = 10
_CLEANUP_RETRIES = 4


def service(job: FineTuneJob) -> Manifest:
    """Returns the headless Service that gives the pod of node rank 0 a DNS name for the rendezvous.

    The name resolves before that pod is ready. The Service selects no other pod: the ranks exchange
    their addresses at the rendezvous, and each additional pod would cost the API server several
    endpoint writes.
    """
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": names.service_name(job.metadata.name),
            "namespace": job.metadata.namespace,
            "labels": object_labels(job),
            "ownerReferences": [owner_reference(job)],
        },
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {
                names.LABEL_JOB_UID: job.metadata.uid,
                names.LABEL_ROLE: names.ROLE_TRAINER,
                "batch.kubernetes.io/job-completion-index": "0",
            },
            "ports": [
                {"name": "rendezvous", "port": names.RENDEZVOUS_PORT, "targetPort": names.RENDEZVOUS_PORT},
            ],
        },
    }


def attempt_job(
    job: FineTuneJob, run: RunConfig, settings: Settings, restarts: Restarts, avoided_nodes: tuple[str, ...] = ()
) -> Manifest:
    """Returns the Job of one attempt: a group of pods that starts and fails together.

    A Job for a queue is created suspended; from then on its `suspend` belongs to the queue.
    """
    queue = job.spec.run_policy.queue_name
    network = network_profile(job, settings, names.ROLE_TRAINER)
    labels = _child_labels(job, names.ROLE_TRAINER) | {names.LABEL_ATTEMPT: str(run.job.attempt)}
    avoided = {names.ANNOTATION_AVOIDED_NODES: json.dumps(avoided_nodes)} if avoided_nodes else {}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": names.attempt_job_name(job.metadata.name, run.job.attempt),
            "namespace": job.metadata.namespace,
            "labels": {**labels, names.LABEL_QUEUE: queue} if queue else labels,
            "annotations": {
                names.ANNOTATION_RESTARTS: json.dumps(restarts.to_json()),
                names.ANNOTATION_SPEC_DIGEST: run.provenance.spec_digest,
                names.ANNOTATION_PODS_DIGEST: pods_digest(job, settings),
                **avoided,
            },
            "ownerReferences": [owner_reference(job)],
        },
        "spec": {
            "completionMode": "Indexed",
            "completions": run.world.nodes,
            "parallelism": run.world.nodes,
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            **({"suspend": True} if queue else {}),
            "template": {
                "metadata": _pod_metadata(job, run, labels, {**network.annotations, **queue_annotations(job)}),
                "spec": pod_spec(job, run, settings, names.ROLE_TRAINER, avoided_nodes),
            },
        },
    }


def with_rendezvous_secret(attempt: Manifest, secret: str) -> Manifest:
    """Returns the Job of an attempt whose pods know a secret that those of other Jobs don't."""
    spec = attempt["spec"]
    template = spec["template"]
    metadata = template["metadata"]
    annotations = {**metadata["annotations"], names.ANNOTATION_RENDEZVOUS_SECRET: secret}
    metadata = {**metadata, "annotations": annotations}
    return {**attempt, "spec": {**spec, "template": {**template, "metadata": metadata}}}


def preflight_job(job: FineTuneJob, run: RunConfig, settings: Settings) -> Manifest:
    """Returns the Job that checks inputs and output; it retries transient errors."""
    name = names.preflight_job_name(job.metadata.name)
    limits = {"backoffLimit": min(job.spec.run_policy.max_restarts.infrastructure, _MAX_PREFLIGHT_RETRIES)}
    return _single_pod(job, run, settings, names.ROLE_PREFLIGHT, name, limits)


def cleanup_job(job: FineTuneJob, run: RunConfig, settings: Settings) -> Manifest:
    """Returns the Job that deletes what a deleted FineTuneJob leaves; its tries and its time are
    limited."""
    run = run.model_copy(update={"deletion_policy": job.spec.output.deletion_policy})
    limits = {"backoffLimit": _CLEANUP_RETRIES, "activeDeadlineSeconds": settings.pods.cleanup_seconds}
    return _single_pod(job, run, settings, names.ROLE_CLEANUP, names.cleanup_job_name(job.metadata.name), limits)


def _single_pod(
    job: FineTuneJob, run: RunConfig, settings: Settings, role: str, name: str, limits: Manifest
) -> Manifest:
    """Returns a Job of one pod, which is tried again unless only a person can fix the cause."""
    labels = _child_labels(job, role)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": name,
            "namespace": job.metadata.namespace,
            "labels": labels,
            "annotations": {names.ANNOTATION_PODS_DIGEST: pods_digest(job, settings)},
            "ownerReferences": [owner_reference(job)],
        },
        "spec": {
            **limits,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {
                "rules": [
                    {
                        "action": "FailJob",
                        "onExitCodes": {
                            "containerName": names.CONTAINER_TRAINER,
                            "operator": "In",
                            "values": _PERMANENT_EXIT_CODES,
                        },
                    },
                    {
                        "action": "Ignore",
                        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                    },
                ],
            },
            "template": {
                "metadata": _pod_metadata(job, run, labels),
                "spec": pod_spec(job, run, settings, role),
            },
        },
    }


def owner_reference(job: FineTuneJob) -> Manifest:
    """Returns the owner reference of a child, so that deleting the FineTuneJob deletes it too."""
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "name": job.metadata.name,
        "uid": job.metadata.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }


def _pod_metadata(
    job: FineTuneJob, run: RunConfig, labels: dict[str, str], annotations: dict[str, str] | None = None
) -> Manifest:
    return {
        "labels": {**job.spec.pod.labels, **labels},
        "annotations": {
            **job.spec.pod.annotations,
            **(annotations or {}),
            names.ANNOTATION_RUN_CONFIG: run.model_dump_json(by_alias=True, exclude_none=True),
        },
    }


def object_labels(job: FineTuneJob) -> dict[str, str]:
    """Returns the labels of all children of a job."""
    return {
        **names.COMMON_LABELS,
        "app.kubernetes.io/instance": job.metadata.name,
        names.LABEL_JOB_NAME: job.metadata.name,
        names.LABEL_JOB_UID: job.metadata.uid,
    }


def _child_labels(job: FineTuneJob, role: str) -> dict[str, str]:
    return {**object_labels(job), names.LABEL_ROLE: role}
