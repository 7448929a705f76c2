"""pod: the specification of a trainer or preflight pod, one literal and its volumes.

Called by manifests. Pure. Everything that a pod may see is written here: environment from a fixed list, Secrets as
files, no service-account token but the one for reporting progress.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune_api import names
from finetune_api.resource import FineTuneJob
from finetune_api.run import RunConfig
from finetune_operator.settings import Settings

Manifest = dict[str, Any]

_USER = 65532
_TOKEN_SECONDS = 3600
_FILES_FOR_GROUP = 0o440


@dataclass(frozen=True)
class _Mount:
    """A volume and where it is seen."""

    name: str
    source: Manifest
    path: str
    read_only: bool = True

    def volume(self) -> Manifest:
        return {"name": self.name, **self.source}

    def volume_mount(self) -> Manifest:
        mount: Manifest = {"name": self.name, "mountPath": self.path}
        return {**mount, "readOnly": True} if self.read_only else mount


def pod_spec(job: FineTuneJob, run: RunConfig, settings: Settings, role: str) -> Manifest:
    """The pod of a role (names.ROLE_TRAINER, names.ROLE_PREFLIGHT)."""
    mounts = (*_scratch(job, role), *_downward(), *_token(settings), *_credentials(job), *_claims(job))
    several = role == names.ROLE_TRAINER and run.world.nodes > 1
    return _present(
        {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": settings.pods.grace_period_seconds,
            "subdomain": names.service_name(job.metadata.name) if several else None,
            "serviceAccountName": job.spec.pod.service_account_name,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "schedulerName": settings.pods.scheduler_name,
            "runtimeClassName": settings.pods.runtime_class_name,
            "priorityClassName": job.spec.pod.priority_class_name,
            "nodeSelector": {**settings.pods.node_selector, **job.spec.pod.node_selector},
            "tolerations": [t.to_json() for t in (*settings.pods.tolerations, *job.spec.pod.tolerations)],
            "topologySpreadConstraints": [_one_pod_a_node(job)] if several else None,
            "imagePullSecrets": _image_pull_secrets(job, settings),
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": _USER,
                "runAsGroup": _USER,
                "fsGroup": _USER,
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
                    "env": _environment(settings),
                    "ports": _ports(run, role),
                    "resources": _resources(job, settings, role),
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


def _environment(settings: Settings) -> list[Manifest]:
    hub = settings.storage.hub.endpoint
    return [
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


def _resources(job: FineTuneJob, settings: Settings, role: str) -> Manifest:
    """Requests and limits are the same, so that a pod is never the first to be evicted (QoS Guaranteed)."""
    asked = job.spec.resources
    if role == names.ROLE_PREFLIGHT:
        amounts = {"cpu": settings.pods.preflight_cpu, "memory": settings.pods.preflight_memory}
    elif asked.gpu is None:
        amounts = {"cpu": asked.cpu, "memory": asked.memory}
    else:
        gpus = str(job.spec.distribution.processes_per_node)
        amounts = {"cpu": asked.cpu, "memory": asked.memory, asked.gpu.name: gpus}
    return {"requests": amounts, "limits": dict(amounts)}


def _scratch(job: FineTuneJob, role: str) -> tuple[_Mount, ...]:
    asked = job.spec.resources
    scratch = _Mount("scratch", {"emptyDir": {"sizeLimit": asked.scratch}}, names.SCRATCH_ROOT, read_only=False)
    tmp = _Mount("tmp", {"emptyDir": {}}, "/tmp", read_only=False)  # noqa: S108
    if role == names.ROLE_PREFLIGHT:
        return (scratch, tmp)
    memory = {"emptyDir": {"medium": "Memory", "sizeLimit": asked.shared_memory}}
    return (scratch, tmp, _Mount("shm", memory, "/dev/shm", read_only=False))  # noqa: S108


def _downward() -> tuple[_Mount, ...]:
    folder, _, file = names.RUN_CONFIG_PATH.rpartition("/")
    field = f"metadata.annotations['{names.ANNOTATION_RUN_CONFIG}']"
    source = {"downwardAPI": {"items": [{"path": file, "fieldRef": {"fieldPath": field}}]}}
    return (_Mount("run-config", source, folder),)


def _token(settings: Settings) -> tuple[_Mount, ...]:
    if not settings.progress.url:
        return ()
    folder, _, file = names.PROGRESS_TOKEN_PATH.rpartition("/")
    token = {"audience": names.PROGRESS_AUDIENCE, "expirationSeconds": _TOKEN_SECONDS, "path": file}
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
            {"secret": {"secretName": reference.name, "defaultMode": _FILES_FOR_GROUP}},
            f"{names.CREDENTIALS_ROOT}/{role}",
        )
        for role, reference in references.items()
        if reference
    )


def _claims(job: FineTuneJob) -> tuple[_Mount, ...]:
    spec = job.spec
    validation = spec.dataset.validation.uri if spec.dataset.validation else None
    test = spec.dataset.test.uri if spec.dataset.test else None
    train = [place.uri for place in spec.dataset.places()]
    read = [_claim(uri) for uri in (spec.model.uri, *train, validation, test)]
    written = _claim(spec.output.uri)
    claims = dict.fromkeys(claim for claim in (*read, written) if claim)
    return tuple(
        _Mount(
            f"claim-{number}",
            {"persistentVolumeClaim": {"claimName": claim}},
            f"{names.PVC_ROOT}/{claim}",
            read_only=claim != written,
        )
        for number, claim in enumerate(claims)
    )


def _claim(uri: str | None) -> str | None:
    scheme, _, rest = (uri or "").partition("://")
    return rest.split("/", 1)[0] if scheme == "pvc" else None


def _one_pod_a_node(job: FineTuneJob) -> Manifest:
    """Wished, not required: on a small cluster several pods may share a node."""
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
    """Without the keys that were left empty."""
    return {key: value for key, value in manifest.items() if value not in (None, "", [], {})}
