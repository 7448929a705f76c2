"""Builds the spec of a trainer or preflight pod: one literal and its volumes.

Everything that a pod can access is listed here: environment variables from an allow-list, Secrets
as files, and no service account token except the one for reporting progress. It does no I/O.
"""

from __future__ import annotations

from finetune_api import names
from finetune_api.amounts import amounts
from finetune_api.messages.run import RunConfig
from finetune_api.resource import FineTuneJob
from finetune_api.scalars import quantity_value
from finetune_api.spec import environment
from finetune_operator.core.plan import trainer_image
from finetune_operator.core.pods import certificates
from finetune_operator.core.pods.scheduling import scheduling
from finetune_operator.core.pods.volumes import Manifest, Mount, claims, volumes
from finetune_operator.pod_settings import NetworkProfile
from finetune_operator.settings import Settings

_COMMANDS = {names.ROLE_TRAINER: [], names.ROLE_PREFLIGHT: ["preflight"], names.ROLE_CLEANUP: ["cleanup"]}
_USER_ID = 65532
_TOKEN_LIFETIME_SECONDS = 3600
_GROUP_READABLE = 0o440
_DEADLINE_MARGIN_SECONDS = 60  # the pod reports by itself what took so long, and releases the output
_TMP_BYTES = 2 << 30  # caches of compiled kernels and of libraries; HOME is there
_LOG_BYTES = 1 << 30  # the container's log, which the kubelet rotates well below that


def pod_spec(
    job: FineTuneJob, run: RunConfig, settings: Settings, role: str, avoided_nodes: tuple[str, ...] = ()
) -> Manifest:
    """Returns the pod spec of a role: names.ROLE_TRAINER, ROLE_PREFLIGHT or ROLE_CLEANUP."""
    network = network_profile(job, settings, role)
    multi_node = role == names.ROLE_TRAINER and run.world.nodes > 1
    mounts = (
        *_scratch(job, run, role),
        *_run_config(multi_node),
        *_progress_token(settings, role),
        *_credentials(job, role),
        *claims(job, role),
        *volumes(job, role),
        *_network_volumes(network),
        *_ca_bundle(settings),
        *_model_cache(settings, role),
    )
    return _present(
        {
            "restartPolicy": "Never",
            **_time_limits(run, role),
            "subdomain": names.service_name(job.metadata.name) if multi_node else None,
            "serviceAccountName": job.spec.pod.service_account_name,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            **scheduling(job, run, settings, role, avoided_nodes),
            "imagePullSecrets": _image_pull_secrets(job, settings),
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": _USER_ID,
                "runAsGroup": _USER_ID,
                "fsGroup": _USER_ID,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
                **_app_armor(settings),
            },
            "initContainers": [{**sidecar, "restartPolicy": "Always"} for sidecar in network.sidecars],
            "containers": [
                {
                    "name": names.CONTAINER_TRAINER,
                    "image": trainer_image(job, settings),
                    "imagePullPolicy": settings.image_pull_policy,
                    "command": ["python", "-m", "finetune_trainer"],
                    "args": _COMMANDS[role],
                    "env": _environment(job, settings, network),
                    "ports": _ports(run, role),
                    "resources": _resources(job, run, settings, role, network),
                    "volumeMounts": [mount.volume_mount() for mount in mounts],
                    "terminationMessagePath": names.TERMINATION_LOG_PATH,
                    "terminationMessagePolicy": "FallbackToLogsOnError",
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": _present({"drop": ["ALL"], "add": list(network.capabilities)}),
                    },
                }
            ],
            "volumes": [mount.volume() for mount in mounts],
        }
    )


def _time_limits(run: RunConfig, role: str) -> Manifest:
    """Returns the time to stop, and when the kubelet ends a preflight pod that hasn't ended."""
    grace = {"terminationGracePeriodSeconds": run.grace_seconds}
    if role != names.ROLE_PREFLIGHT:
        return grace
    return {**grace, "activeDeadlineSeconds": run.preflight_seconds + _DEADLINE_MARGIN_SECONDS}


def _app_armor(settings: Settings) -> Manifest:
    profile = settings.pods.app_armor_profile
    return {"appArmorProfile": {"type": profile}} if profile else {}


def _environment(job: FineTuneJob, settings: Settings, network: NetworkProfile) -> list[Manifest]:
    """Returns the variables of the chart, the network and the job, then our own.

    Each replaces those before it that have the same name; nothing replaces our own.
    """
    hub = settings.storage.hub.endpoint
    return [
        *(entry.to_json() for entry in environment.merged((*settings.pods.env, *network.env), job.spec.pod.env)),
        {"name": names.ENV_POD_NAME, "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": names.ENV_RUN_CONFIG, "value": names.RUN_CONFIG_PATH},
        {"name": names.ENV_TERMINATION_LOG, "value": names.TERMINATION_LOG_PATH},
        {"name": "HOME", "value": "/tmp"},  # noqa: S108 (a volume of the pod)
        {"name": "PYTHONSAFEPATH", "value": "1"},  # no module from the working directory, in own images either
        {"name": "PYTHONNOUSERSITE", "value": "1"},  # nor from HOME, which the pod can write to
        *_ca_variables(settings),
        *([{"name": "HF_ENDPOINT", "value": hub}] if hub else []),
    ]


def network_profile(job: FineTuneJob, settings: Settings, role: str) -> NetworkProfile:
    """Returns the network profile of a training pod; an empty one for the preflight check."""
    profiles = settings.pods.network_profiles if role == names.ROLE_TRAINER else {}
    return profiles.get(job.spec.pod.network, NetworkProfile())


def _ca_bundle(settings: Settings) -> tuple[Mount, ...]:
    bundle = settings.pods.ca_bundle
    if not bundle.config_map:
        return ()
    folder, _, file = names.CA_BUNDLE_PATH.rpartition("/")
    items = [{"key": bundle.key, "path": file}]
    return (Mount("ca-bundle", {"configMap": {"name": bundle.config_map, "items": items}}, folder),)


def _model_cache(settings: Settings, role: str) -> tuple[Mount, ...]:
    """Returns the mount of the model cache; only a pod that trains downloads weights."""
    claim = settings.models.cache.claim
    if not claim or role != names.ROLE_TRAINER:
        return ()
    source = {"persistentVolumeClaim": {"claimName": claim}}
    return (Mount("model-cache", source, names.MODEL_CACHE_ROOT, read_only=False),)


def _ca_variables(settings: Settings) -> list[Manifest]:
    if not settings.pods.ca_bundle.config_map:
        return []
    return [{"name": name, "value": value} for name, value in certificates.variables()]


def _network_volumes(network: NetworkProfile) -> tuple[Mount, ...]:
    return tuple(
        Mount(f"network-{volume.name}", volume.source, volume.mount_path, read_only=volume.read_only)
        for volume in network.volumes
    )


def _ports(run: RunConfig, role: str) -> list[Manifest]:
    if role != names.ROLE_TRAINER or run.metrics_port == 0:
        return []
    return [{"name": names.METRICS_PORT_NAME, "containerPort": run.metrics_port}]


def _resources(job: FineTuneJob, run: RunConfig, settings: Settings, role: str, network: NetworkProfile) -> Manifest:
    """Returns equal requests and limits (QoS Guaranteed), so that the pod isn't evicted first.

    An administrator can leave out the limit on cores, which makes the pod Burstable.
    """
    pod = amounts(job.spec, run.model.size_bytes)
    requests = {"cpu": pod.cpu, "memory": pod.memory}
    if role != names.ROLE_TRAINER:
        requests = {"cpu": settings.pods.preflight_cpu, "memory": settings.pods.preflight_memory}
    else:
        requests |= {**network.resources, **job.spec.resources.extra}
        if job.spec.resources.gpu is not None:
            requests[job.spec.resources.gpu.name] = str(job.spec.distribution.processes_per_node)
    # Disk that isn't requested is overcommitted, and the eviction then hits other pods of the node.
    on_node = role == names.ROLE_PREFLIGHT or not job.spec.resources.scratch_storage_class
    scratch = int(quantity_value(pod.scratch)) if on_node and role != names.ROLE_CLEANUP else 0
    requests["ephemeral-storage"] = str(scratch + _TMP_BYTES + _LOG_BYTES)
    limits = {name: amount for name, amount in requests.items() if name != "cpu" or settings.pods.cpu_limit}
    return {"requests": requests, "limits": limits}


def _scratch(job: FineTuneJob, run: RunConfig, role: str) -> tuple[Mount, ...]:
    requested = job.spec.resources
    size = amounts(job.spec, run.model.size_bytes).scratch
    own_volume = requested.scratch_storage_class and role == names.ROLE_TRAINER
    source = (
        _ephemeral_claim(requested.scratch_storage_class, size) if own_volume else {"emptyDir": {"sizeLimit": size}}
    )
    scratch = Mount("scratch", source, names.SCRATCH_ROOT, read_only=False)
    tmp = Mount("tmp", {"emptyDir": {"sizeLimit": str(_TMP_BYTES)}}, "/tmp", read_only=False)  # noqa: S108
    if role == names.ROLE_CLEANUP:
        return (tmp,)
    if role == names.ROLE_PREFLIGHT:
        return (scratch, tmp)
    memory = {"emptyDir": {"medium": "Memory", "sizeLimit": requested.shared_memory}}
    return (scratch, tmp, Mount("shm", memory, "/dev/shm", read_only=False))  # noqa: S108


def _ephemeral_claim(storage_class: str, size: str) -> Manifest:
    """Returns the source of a volume that is created for the pod and deleted with it."""
    claim = {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": storage_class,
        "resources": {"requests": {"storage": size}},
    }
    return {"ephemeral": {"volumeClaimTemplate": {"spec": claim}}}


def _run_config(multi_node: bool) -> tuple[Mount, ...]:
    """Returns the mount of the RunConfig and, with several nodes, of the rendezvous' secret."""
    folder, _, file = names.RUN_CONFIG_PATH.rpartition("/")
    annotations = {file: names.ANNOTATION_RUN_CONFIG}
    if multi_node:
        annotations[names.RENDEZVOUS_FILE] = names.ANNOTATION_RENDEZVOUS_SECRET
    items = [
        {"path": path, "fieldRef": {"fieldPath": f"metadata.annotations['{annotation}']"}}
        for path, annotation in annotations.items()
    ]
    source = {"downwardAPI": {"items": items}}
    return (Mount("run-config", source, folder),)


def _progress_token(settings: Settings, role: str) -> tuple[Mount, ...]:
    if not settings.progress.url or role == names.ROLE_CLEANUP:
        return ()
    folder, _, file = names.PROGRESS_TOKEN_PATH.rpartition("/")
    token = {"audience": names.PROGRESS_AUDIENCE, "expirationSeconds": _TOKEN_LIFETIME_SECONDS, "path": file}
    return (Mount("progress-token", {"projected": {"sources": [{"serviceAccountToken": token}]}}, folder),)


def _credentials(job: FineTuneJob, role: str) -> tuple[Mount, ...]:
    """Returns the mounts of the job's Secrets; a cleanup has only that of the output, since the
    others may be gone."""
    references = {
        "model": job.spec.model.credentials_ref,
        "checkpoint": job.spec.model.checkpoint.credentials_ref if job.spec.model.checkpoint else None,
        "dataset": job.spec.dataset.credentials_ref,
        "output": job.spec.output.credentials_ref,
        "mlflow": job.spec.tracking.mlflow.credentials_ref if job.spec.tracking.mlflow else None,
        "wandb": job.spec.tracking.wandb.credentials_ref if job.spec.tracking.wandb else None,
    }
    return tuple(
        Mount(
            f"credentials-{use}",
            {"secret": {"secretName": reference.name, "defaultMode": _GROUP_READABLE}},
            f"{names.CREDENTIALS_ROOT}/{use}",
        )
        for use, reference in references.items()
        if reference and (use == "output" or role != names.ROLE_CLEANUP)
    )


def _image_pull_secrets(job: FineTuneJob, settings: Settings) -> list[Manifest]:
    secrets = (*settings.pods.image_pull_secrets, *(ref.name for ref in job.spec.pod.image_pull_secrets))
    return [{"name": name} for name in dict.fromkeys(secrets)]


def _present(manifest: Manifest) -> Manifest:
    """Returns the manifest without its empty keys."""
    return {key: value for key, value in manifest.items() if value not in (None, "", [], {})}
