"""Parses raw Kubernetes objects into the values of `core.objects`.

Anybody may have written an object, so each field is bounded and typed here, and a field that is
absent or of another type has its zero value. It does no I/O.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from finetune_api import names
from finetune_api import untrusted as u
from finetune_api.messages.result import decode
from finetune_api.status import Restarts
from finetune_operator.core.objects import MAX_PODS, PENDING, ChildJob, Companion, Pod, Termination

Raw = Mapping[str, Any]

_MAX_NODES = 16
_MAX_COMPANIONS = 16
_MAX_GATES = 8
_MAX_NAME_CHARACTERS = 253
_NOBODY = "unknown"  # the field manager of a client that doesn't say who it is


class Unreadable(ValueError):
    """Is raised for an object that isn't what its resource says."""


def pod(raw: Raw) -> Pod:
    """Parses the raw body of a pod. Raises Unreadable if it isn't one."""
    meta, spec, status = _metadata(raw), _section(raw, "spec"), _section(raw, "status")
    labels = _section(meta, "labels")
    conditions = {c.get("type"): c for c in _objects(status, "conditions")}
    scheduled, disruption = conditions.get("PodScheduled", {}), conditions.get("DisruptionTarget", {})
    ready, containers_ready = conditions.get("Ready", {}), conditions.get("ContainersReady", {})
    # The kubelet sets both conditions together; only the node controller sets one of them alone.
    is_silent = ready.get("status") == "False" and containers_ready.get("status") == "True"
    state = _container_state(status)
    waiting, terminated = _section(state, "waiting"), _section(state, "terminated")
    unscheduled = not spec.get("nodeName") and scheduled.get("status") == "False"
    disrupted = disruption.get("status") == "True"
    message = terminated.get("message")
    return Pod(
        namespace=meta["namespace"],
        name=meta["name"],
        uid=meta["uid"],
        version=u.integer(meta["resourceVersion"]),
        job_uid=_controller(meta, "Job").get("uid", ""),
        owner_uid=u.string(labels.get(names.LABEL_JOB_UID)),
        index=u.integer(labels.get("batch.kubernetes.io/job-completion-index"), high=MAX_PODS - 1),
        phase=u.string(status.get("phase")) or PENDING,
        created=u.time(meta.get("creationTimestamp")),
        node=u.string(spec.get("nodeName")),
        scheduled_at=u.time(scheduled.get("lastTransitionTime")) if scheduled.get("status") == "True" else "",
        addresses=frozenset(u.string(entry.get("ip")) for entry in _objects(status, "podIPs")) - {""},
        deleting="deletionTimestamp" in meta,
        delete_by=u.time(meta.get("deletionTimestamp")),
        silent_since=u.time(ready.get("lastTransitionTime")) if is_silent else "",
        started="running" in state or "terminated" in state,
        service_account=u.string(spec.get("serviceAccountName")),
        unschedulable=_why_unscheduled(scheduled, spec) if unscheduled else "",
        unscheduled_reason=u.string(scheduled.get("reason")) if unscheduled else "",
        prepared=conditions.get("PodReadyToStartContainers", {}).get("status") == "True",
        waiting_reason=u.string(waiting.get("reason")),
        waiting_message=u.string(waiting.get("message")),
        disruption=u.string(disruption.get("reason")) if disrupted else "",
        disruption_message=u.string(disruption.get("message")) if disrupted else "",
        status_reason=u.string(status.get("reason")),
        status_message=u.string(status.get("message")),
        termination=_termination(terminated) if terminated else None,
        result=decode(message) if isinstance(message, str) else None,
        companions=_companions(status),
    )


def child_job(raw: Raw) -> ChildJob:
    """Parses the raw body of a batch/v1 Job.

    What it is follows from its owner and its name alone, since anybody can set labels: a Job that
    isn't called as its owner's children are has no owner here. Raises Unreadable if it isn't a Job.
    """
    meta, spec, status = _metadata(raw), _section(raw, "spec"), _section(raw, "status")
    annotations = _section(meta, "annotations")
    conditions = {c.get("type"): c for c in _objects(status, "conditions") if c.get("status") == "True"}
    failure = conditions.get("Failed") or conditions.get("FailureTarget") or {}
    end = conditions.get("Complete") or conditions.get("Failed") or {}
    owner = _controller(meta, names.KIND)
    role, attempt = _place(meta["name"], owner.get("name", ""))
    return ChildJob(
        namespace=meta["namespace"],
        name=meta["name"],
        uid=meta["uid"],
        version=u.integer(meta["resourceVersion"]),
        resource_version=meta["resourceVersion"],
        owner_uid=owner.get("uid", "") if role else "",
        owner_name=owner.get("name", ""),
        role=role,
        attempt=attempt,
        created=u.time(meta.get("creationTimestamp")),
        expected_pods=u.integer(spec.get("completions"), default=1, low=1, high=MAX_PODS),
        deleting="deletionTimestamp" in meta,
        complete="Complete" in conditions,
        failed="Failed" in conditions,
        failing="FailureTarget" in conditions or (attempt > 0 and u.integer(status.get("failed")) > 0),
        suspended=spec.get("suspend") is True,
        suspended_by=_suspender(meta) if spec.get("suspend") is True else "",
        image=_image(spec),
        pods_digest=u.string(annotations.get(names.ANNOTATION_PODS_DIGEST)),
        released_at=u.time(annotations.get(names.ANNOTATION_RELEASED_AT)),
        releases=u.integer(annotations.get(names.ANNOTATION_RELEASES)),
        failure_reason=u.string(failure.get("reason")),
        failure_message=u.string(failure.get("message")),
        finished_at=u.time(end.get("lastTransitionTime")),
        restarts=_restarts(annotations.get(names.ANNOTATION_RESTARTS)),
        avoided_nodes=_names(annotations.get(names.ANNOTATION_AVOIDED_NODES)),
    )


def _section(raw: Raw, key: str) -> Mapping[str, Any]:
    """Returns a part of an object; empty if it has none."""
    section = raw.get(key)
    return section if isinstance(section, Mapping) else {}


def _objects(raw: Raw, key: str) -> list[Mapping[str, Any]]:
    """Returns a list of objects; empty if there is none."""
    entries = raw.get(key)
    return [entry for entry in entries if isinstance(entry, Mapping)] if isinstance(entries, list | tuple) else []


def _metadata(raw: Raw) -> Mapping[str, Any]:
    """Returns the metadata of an object. Raises Unreadable without what identifies an object."""
    meta = _section(raw, "metadata") if isinstance(raw, Mapping) else {}
    missing = [key for key in ("namespace", "name", "uid", "resourceVersion") if not isinstance(meta.get(key), str)]
    if missing:
        raise Unreadable(f"an object without metadata.{', metadata.'.join(missing)}")
    return meta


def _container_state(status: Raw) -> Mapping[str, Any]:
    containers = _objects(status, "containerStatuses")
    return next((_section(c, "state") for c in containers if c.get("name") == names.CONTAINER_TRAINER), {})


def _companions(status: Raw) -> tuple[Companion, ...]:
    """Returns the containers of a pod that aren't the trainer's."""
    listed = [(True, c) for c in _objects(status, "initContainerStatuses")]
    listed += [(False, c) for c in _objects(status, "containerStatuses") if c.get("name") != names.CONTAINER_TRAINER]
    return tuple(_companion(c, is_init=is_init) for is_init, c in listed[:_MAX_COMPANIONS])


def _companion(raw: Raw, *, is_init: bool) -> Companion:
    state = _section(raw, "state")
    waiting, terminated = _section(state, "waiting"), _section(state, "terminated")
    return Companion(
        name=u.string(raw.get("name"), _MAX_NAME_CHARACTERS),
        is_init=is_init,
        running="running" in state,
        waiting_reason=u.string(waiting.get("reason")),
        waiting_message=u.string(waiting.get("message")),
        termination=_termination(terminated) if terminated else None,
    )


def _why_unscheduled(condition: Raw, spec: Raw) -> str:
    """Returns what the scheduler says of a pod without a node, with the gates that it waits for."""
    gates = [u.string(gate.get("name"), _MAX_NAME_CHARACTERS) for gate in _objects(spec, "schedulingGates")]
    listed = ", ".join(gate for gate in gates[:_MAX_GATES] if gate)
    message = u.string(condition.get("message")) or u.string(condition.get("reason"))
    return f"{message} ({listed})" if listed else message


def _termination(raw: Raw) -> Termination:
    message = raw.get("message")
    return Termination(
        exit_code=u.integer(raw.get("exitCode"), default=255, high=2**31),
        reason=u.string(raw.get("reason")),
        message=u.lines(message) if isinstance(message, str) else "",
        finished_at=u.time(raw.get("finishedAt")),
    )


def _controller(meta: Raw, kind: str) -> Mapping[str, str]:
    """Returns uid and name of the controller of that kind; empty if there is none."""
    groups = {"Job": "batch/", names.KIND: f"{names.GROUP}/"}
    for owner in _objects(meta, "ownerReferences"):
        if owner.get("controller") is True and owner.get("kind") == kind:
            version, uid, name = (owner.get(key) for key in ("apiVersion", "uid", "name"))
            if isinstance(version, str) and version.startswith(groups[kind]) and isinstance(uid, str):
                return {"uid": uid, "name": name if isinstance(name, str) else ""}
    return {}


def _place(name: str, owner: str) -> tuple[str, int]:
    """Returns role and attempt of a Job of that name whose owner has that name; an empty role if it
    is none of its children."""
    if not owner:
        return "", 0
    if name == names.preflight_job_name(owner):
        return names.ROLE_PREFLIGHT, 0
    if name == names.cleanup_job_name(owner):
        return names.ROLE_CLEANUP, 0
    attempt = u.integer(name.removeprefix(f"{owner}-"), low=1)
    return (names.ROLE_TRAINER, attempt) if attempt and name == names.attempt_job_name(owner, attempt) else ("", 0)


def _restarts(annotation: Any) -> Restarts:
    try:
        return Restarts.model_validate_json(annotation) if isinstance(annotation, str) else Restarts()
    except ValidationError:
        return Restarts()


def _image(spec: Raw) -> str:
    containers = _objects(_section(_section(spec, "template"), "spec"), "containers")
    return next((u.string(c.get("image")) for c in containers if c.get("name") == names.CONTAINER_TRAINER), "")


def _suspender(meta: Raw) -> str:
    """Returns the field manager that set spec.suspend last; empty if that was the operator, or if
    nobody is recorded."""
    managers = [
        (u.time(entry.get("time")), u.string(entry.get("manager")))
        for entry in _objects(meta, "managedFields")
        if "f:suspend" in _section(_section(entry, "fieldsV1"), "f:spec")
    ]
    others = [(time, name) for time, name in managers if name not in (names.FIELD_MANAGER, _NOBODY)]
    return max(others, default=("", ""))[1]


def _names(annotation: Any) -> tuple[str, ...]:
    """Returns the names in a JSON list; none for an annotation that somebody has changed."""
    try:
        content = json.loads(annotation) if isinstance(annotation, str) else []
    except (ValueError, RecursionError):
        return ()
    listed = content if isinstance(content, list) else []
    return tuple(name for name in listed[:_MAX_NODES] if isinstance(name, str) and len(name) <= 253)
