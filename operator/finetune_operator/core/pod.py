"""Builds the spec of a trainer or preflight pod: one literal and its volumes.

Everything that a pod can access is listed here: environment variables from an allow-list, Secrets
as files, and no service account token except the one for reporting progress. It does no I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune_api import names
from finetune_api.amounts import amounts
from finetune_api.messages.run import RunConfig
from finetune_api.resource import FineTuneJob, TolerationSpec
from finetune_api.scalars import quantity_value
from finetune_api.spec import environment
from finetune_operator.core.avoided_nodes import affinity
from finetune_operator.settings import Settings

Manifest = dict[str, Any]

_USER_ID = 65532
_TOKEN_LIFETIME_SECONDS = 3600
_GROUP_READABLE = 0o440
_TMP_BYTES = 2 << 30  # caches of compiled kernels and of libraries; HOME is there
_LOG_BYTES = 1 << 30  # the container's log, which the kubelet rotates well below that


@dataclass(frozen=True)
class _Mount:
    """Pairs a volume with the path at which it is mounted in the container."""

    name: str
    source: Manifest
    path: str
    read_only: bool = True

    def volume(self) -> Manifest:
        """Returns the entry in the pod's list of volumes."""
        return {"name": self.name, **self.source}

    def volume_mount(self) -> Manifest:
        """Returns the entry in the container's list of volume mounts."""
        mount: Manifest = {"name": self.name, "mountPath": self.path}
        return {**mount, "readOnly": True} if self.read_only else mount


def pod_spec(
    job: FineTuneJob, run: RunConfig, settings: Settings, role: str, avoided_nodes: tuple[str, ...] = ()
) -> Manifest:
    """Returns the pod spec of a role (names.ROLE_TRAINER or names.ROLE_PREFLIGHT)."""
    mounts = (
        *_scratch(job, run, role),
        *_run_config(),
        *_progress_token(settings),
        *_credentials(job),
        *_claims(job),
    )
    multi_node = role == names.ROLE_TRAINER and run.world.nodes > 1
    preflight = role == names.ROLE_PREFLIGHT
    return _present(
        {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": run.grace_seconds,
            "subdomain": names.service_name(job.metadata.name) if multi_node else None,
            "serviceAccountName": job.spec.pod.service_account_name,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "schedulerName": (job.spec.pod.scheduler_name if not preflight else "") or settings.pods.scheduler_name,
            "runtimeClassName": _runtime_class(settings, role),
            "priorityClassName": None if preflight else job.spec.pod.priority_class_name,
            "nodeSelector": _node_selector(job, settings, role),
            "affinity": affinity(avoided_nodes),
            "tolerations": [toleration.to_json() for toleration in _tolerations(job, settings, role)],
            "topologySpreadConstraints": [_one_pod_per_node(job)] if multi_node else None,
            "imagePullSecrets": _image_pull_secrets(job, settings),
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": _USER_ID,
                "runAsGroup": _USER_ID,
                "fsGroup": _USER_ID,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": names.CONTAINER_TRAINER,
                    "image": settings.trainer_image,
                    "imagePullPolicy": settings.image_pull_policy,
                    "command": ["python", "-m", "finetune_trainer"],
                    "args": ["preflight"] if role == names.ROLE_PREFLIGHT else [],
                    "env": _environment(job, settings),
                    "ports": _ports(run, role),
                    "resources": _resources(job, run, settings, role),
                    "volumeMounts": [mount.volume_mount() for mount in mounts],
                    "terminationMessagePath": names.TERMINATION_LOG_PATH,
                    "terminationMessagePolicy": "FallbackToLogsOnError",
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"]},
                    },
                }
            ],
            "volumes": [mount.volume() for mount in mounts],
        }
    )


def _environment(job: FineTuneJob, settings: Settings) -> list[Manifest]:
    """Returns the variables of the chart and the job, then our own, which neither can replace."""
    hub = settings.storage.hub.endpoint
    return [
        *(entry.to_json() for entry in environment.merged(settings.pods.env, job.spec.pod.env)),
        {"name": names.ENV_POD_NAME, "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": names.ENV_RUN_CONFIG, "value": names.RUN_CONFIG_PATH},
        {"name": names.ENV_TERMINATION_LOG, "value": names.TERMINATION_LOG_PATH},
        {"name": "HOME", "value": "/tmp"},  # noqa: S108 (a volume of the pod)
        *([{"name": "HF_ENDPOINT", "value": hub}] if hub else []),
    ]


def _ports(run: RunConfig, role: str) -> list[Manifest]:
    if role == names.ROLE_PREFLIGHT or run.metrics_port == 0:
        return []
    return [{"name": names.METRICS_PORT_NAME, "containerPort": run.metrics_port}]


def _resources(job: FineTuneJob, run: RunConfig, settings: Settings, role: str) -> Manifest:
    """Returns equal requests and limits (QoS Guaranteed), so that the pod isn't evicted first.

    An administrator can leave out the limit on cores, which makes the pod Burstable.
    """
    pod = amounts(job.spec, run.model.size_bytes)
    requests = {"cpu": pod.cpu, "memory": pod.memory}
    if role == names.ROLE_PREFLIGHT:
        requests = {"cpu": settings.pods.preflight_cpu, "memory": settings.pods.preflight_memory}
    else:
        requests |= job.spec.resources.extra
        if job.spec.resources.gpu is not None:
            requests[job.spec.resources.gpu.name] = str(job.spec.distribution.processes_per_node)
    # Disk that isn't requested is overcommitted, and the eviction then hits other pods of the node.
    requests["ephemeral-storage"] = str(int(quantity_value(pod.scratch)) + _TMP_BYTES + _LOG_BYTES)
    limits = {name: amount for name, amount in requests.items() if name != "cpu" or settings.pods.cpu_limit}
    return {"requests": requests, "limits": limits}


def _node_selector(job: FineTuneJob, settings: Settings, role: str) -> dict[str, str]:
    """Returns the labels of the nodes that a pod may run on.

    A preflight pod ignores those of the job: it needs no GPU, and on an autoscaled pool it would
    start a GPU node only to find that a key is wrong.
    """
    if role == names.ROLE_PREFLIGHT:
        return settings.pods.preflight_node_selector or settings.pods.node_selector
    return {**settings.pods.node_selector, **job.spec.pod.node_selector}


def _tolerations(job: FineTuneJob, settings: Settings, role: str) -> tuple[TolerationSpec, ...]:
    """Returns the tolerated taints; those of the job are of GPU nodes, which no check needs."""
    if role == names.ROLE_PREFLIGHT:
        own = settings.pods.preflight_tolerations
        return settings.pods.tolerations if own is None else own
    return (*settings.pods.tolerations, *job.spec.pod.tolerations)


def _runtime_class(settings: Settings, role: str) -> str:
    """Returns the RuntimeClass; that of training pods may exist on GPU nodes only."""
    pods = settings.pods
    return pods.preflight_runtime_class_name if role == names.ROLE_PREFLIGHT else pods.runtime_class_name


def _scratch(job: FineTuneJob, run: RunConfig, role: str) -> tuple[_Mount, ...]:
    requested = job.spec.resources
    size = {"sizeLimit": amounts(job.spec, run.model.size_bytes).scratch}
    scratch = _Mount("scratch", {"emptyDir": size}, names.SCRATCH_ROOT, read_only=False)
    tmp = _Mount("tmp", {"emptyDir": {"sizeLimit": str(_TMP_BYTES)}}, "/tmp", read_only=False)  # noqa: S108
    if role == names.ROLE_PREFLIGHT:
        return (scratch, tmp)
    memory = {"emptyDir": {"medium": "Memory", "sizeLimit": requested.shared_memory}}
    return (scratch, tmp, _Mount("shm", memory, "/dev/shm", read_only=False))  # noqa: S108


def _run_config() -> tuple[_Mount, ...]:
    folder, _, file = names.RUN_CONFIG_PATH.rpartition("/")
    field = f"metadata.annotations['{names.ANNOTATION_RUN_CONFIG}']"
    source = {"downwardAPI": {"items": [{"path": file, "fieldRef": {"fieldPath": field}}]}}
    return (_Mount("run-config", source, folder),)


def _progress_token(settings: Settings) -> tuple[_Mount, ...]:
    if not settings.progress.url:
        return ()
    folder, _, file = names.PROGRESS_TOKEN_PATH.rpartition("/")
    token = {"audience": names.PROGRESS_AUDIENCE, "expirationSeconds": _TOKEN_LIFETIME_SECONDS, "path": file}
    return (_Mount("progress-token", {"projected": {"sources": [{"serviceAccountToken": token}]}}, folder),)


def _credentials(job: FineTuneJob) -> tuple[_Mount, ...]:
    references = {
        "model": job.spec.model.credentials_ref,
        "dataset": job.spec.dataset.credentials_ref,
        "output": job.spec.output.credentials_ref,
        "mlflow": job.spec.tracking.mlflow.credentials_ref if job.spec.tracking.mlflow else None,
        "wandb": job.spec.tracking.wandb.credentials_ref if job.spec.tracking.wandb else None,
    }
    return tuple(
        _Mount(
            f"credentials-{role}",
            {"secret": {"secretName": reference.name, "defaultMode": _GROUP_READABLE}},
            f"{names.CREDENTIALS_ROOT}/{role}",
        )
        for role, reference in references.items()
        if reference
    )


def _claims(job: FineTuneJob) -> tuple[_Mount, ...]:
    """Returns the mounts of the PersistentVolumeClaims; only that of the output is writable."""
    spec = job.spec
    validation = spec.dataset.validation.uri if spec.dataset.validation else None
    test = spec.dataset.test.uri if spec.dataset.test else None
    train = [source.uri for source in spec.dataset.training_sources()]
    input_claims = [_claim(uri) for uri in (spec.model.uri, *train, validation, test)]
    output_claim = _claim(spec.output.uri)
    claims = dict.fromkeys(claim for claim in (*input_claims, output_claim) if claim)
    return tuple(
        _Mount(
            f"claim-{number}",
            {"persistentVolumeClaim": {"claimName": claim}},
            f"{names.PVC_ROOT}/{claim}",
            read_only=claim != output_claim,
        )
        for number, claim in enumerate(claims)
    )


def _claim(uri: str | None) -> str | None:
    """Returns the claim that a pvc:// URI names; None for other URIs."""
    scheme, _, rest = (uri or "").partition("://")
    return rest.split("/", 1)[0] if scheme == "pvc" else None


def _one_pod_per_node(job: FineTuneJob) -> Manifest:
    """Returns a constraint that prefers one pod per node; small clusters may lack nodes."""
    return {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": {names.LABEL_JOB_UID: job.metadata.uid}},
    }


def _image_pull_secrets(job: FineTuneJob, settings: Settings) -> list[Manifest]:
    secrets = (*settings.pods.image_pull_secrets, *(ref.name for ref in job.spec.pod.image_pull_secrets))
    return [{"name": name} for name in dict.fromkeys(secrets)]


def _present(manifest: Manifest) -> Manifest:
    """Returns the manifest without its empty keys."""
    return {key: value for key, value in manifest.items() if value not in (None, "", [], {})}
