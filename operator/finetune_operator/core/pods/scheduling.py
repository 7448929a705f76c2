"""Decides where the pods of an attempt may run: node selectors, tolerations, affinity and spread.

It does no I/O.
"""

from __future__ import annotations

from typing import Any

from finetune_api import names
from finetune_api.amounts import gpus_of_pod
from finetune_api.messages.run import RunConfig
from finetune_api.resource import FineTuneJob, TolerationSpec
from finetune_api.spec.pod import NodePreferenceSpec, NodeRequirementSpec
from finetune_operator.core.avoided_nodes import preferences
from finetune_operator.settings import Settings

Manifest = dict[str, Any]

_HOSTNAME = "kubernetes.io/hostname"
_REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
_PREFERRED = "preferredDuringSchedulingIgnoredDuringExecution"


def scheduling(
    job: FineTuneJob, run: RunConfig, settings: Settings, role: str, avoided_nodes: tuple[str, ...]
) -> Manifest:
    """Returns the keys of a pod's spec that say where it may run.

    A pod that doesn't train ignores those of the job: it needs no GPU, and on an autoscaled pool it
    would start a GPU node only to find that a key is wrong.
    """
    pods, own = settings.pods, job.spec.pod
    if role != names.ROLE_TRAINER:
        tolerations = pods.tolerations if pods.preflight_tolerations is None else pods.preflight_tolerations
        return {
            "schedulerName": pods.scheduler_name,
            "runtimeClassName": pods.preflight_runtime_class_name,
            "nodeSelector": pods.preflight_node_selector or pods.node_selector,
            "tolerations": _tolerations(tolerations),
        }
    return {
        "schedulerName": own.scheduler_name or pods.scheduler_name,
        "runtimeClassName": pods.runtime_class_name,
        "priorityClassName": own.priority_class_name,
        "nodeSelector": {**own.node_selector, **pods.node_selector},
        "affinity": _affinity(job, run, settings, avoided_nodes),
        "tolerations": _tolerations((*pods.tolerations, *own.tolerations)),
        "topologySpreadConstraints": _spread(job, run, settings),
    }


def queue_annotations(job: FineTuneJob) -> dict[str, str]:
    """Returns the annotation by which Kueue places all pods into one part of the cluster."""
    topology = job.spec.pod.topology
    if topology is None or topology.policy == "spread" or not job.spec.run_policy.queue_name:
        return {}
    return {names.ANNOTATION_QUEUE_TOPOLOGY.format(policy=topology.policy): topology.key}


def _tolerations(tolerations: tuple[TolerationSpec, ...]) -> list[Manifest]:
    return [toleration.to_json() for toleration in tolerations]


def _affinity(job: FineTuneJob, run: RunConfig, settings: Settings, avoided_nodes: tuple[str, ...]) -> Manifest:
    nodes, topology = job.spec.pod.node_affinity, job.spec.pod.topology
    terms = [{"weight": entry.weight, "preference": _expressions((entry,))} for entry in nodes.preferred]
    node_affinity = {
        _REQUIRED: {"nodeSelectorTerms": [_expressions(nodes.required)]} if nodes.required else None,
        _PREFERRED: [*terms, *preferences(avoided_nodes)],
    }
    shared: Manifest = {}
    if topology and topology.policy != "spread" and not job.spec.run_policy.queue_name:
        term = _others(job, run, topology.key)
        shared = (
            {_REQUIRED: [term]}
            if topology.policy == "required"
            else {_PREFERRED: [{"weight": 100, "podAffinityTerm": term}]}
        )
    apart = {_REQUIRED: [_others(job, run, _HOSTNAME)]} if _one_pod_per_node(job, run, settings) else {}
    affinity = {"nodeAffinity": _present(node_affinity), "podAffinity": shared, "podAntiAffinity": apart}
    return _present(affinity)


def _expressions(requirements: tuple[NodeRequirementSpec | NodePreferenceSpec, ...]) -> Manifest:
    return {
        "matchExpressions": [
            _present({"key": entry.key, "operator": entry.operator, "values": list(entry.values)})
            for entry in requirements
        ]
    }


def _others(job: FineTuneJob, run: RunConfig, key: str) -> Manifest:
    """Returns the term for the pods of the same attempt; those of an earlier one may still stop."""
    labels = {names.LABEL_JOB_UID: job.metadata.uid, names.LABEL_ATTEMPT: str(run.job.attempt)}
    return {"topologyKey": key, "labelSelector": {"matchLabels": labels}}


def _one_pod_per_node(job: FineTuneJob, run: RunConfig, settings: Settings) -> bool:
    """Whether two pods never share a node."""
    policy = job.spec.pod.one_pod_per_node
    whole_node = gpus_of_pod(job.spec) >= settings.pods.gpus_per_node
    return run.world.nodes > 1 and (policy == "required" or (policy == "auto" and whole_node))


def _spread(job: FineTuneJob, run: RunConfig, settings: Settings) -> list[Manifest]:
    """Returns constraints that are preferences; small clusters may lack nodes."""
    if run.world.nodes == 1:
        return []
    topology = job.spec.pod.topology
    keys = [] if _one_pod_per_node(job, run, settings) else [_HOSTNAME]
    keys += [topology.key] if topology and topology.policy == "spread" and topology.key not in keys else []
    selector = {"matchLabels": {names.LABEL_JOB_UID: job.metadata.uid}}
    return [
        {"maxSkew": 1, "topologyKey": key, "whenUnsatisfiable": "ScheduleAnyway", "labelSelector": selector}
        for key in keys
    ]


def _present(manifest: Manifest) -> Manifest:
    """Returns the manifest without its empty keys."""
    return {key: value for key, value in manifest.items() if value not in (None, "", [], {})}
