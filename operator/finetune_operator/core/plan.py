"""Turns a FineTuneJob and the operator's settings into the RunConfig of one attempt.

It knows no cluster, no clock and no environment.
"""

from __future__ import annotations

import hashlib
import json
from typing import Literal

from finetune_api import __version__, names
from finetune_api.amounts import PodAmounts, amounts
from finetune_api.messages.run import (
    CacheConfig,
    DataConfig,
    DataSource,
    JobRef,
    Location,
    MlflowConfig,
    ModelConfig,
    ProgressConfig,
    Provenance,
    RunConfig,
    TrackingConfig,
    WandbConfig,
    WorldConfig,
)
from finetune_api.resource import BaseModelSpec, FineTuneJob, OutputSpec, SecretRef, Spec
from finetune_api.scalars import quantity_value
from finetune_api.spec.data import DataFormat
from finetune_operator.core.objects import Observed
from finetune_operator.settings import Settings

CredentialsRole = Literal["model", "dataset", "output", "mlflow", "wandb"]


class PlanError(ValueError):
    """Is raised if a job can't be run although the schema allows its spec.

    The message has field, value and remedy.
    """

    def __init__(self, field: str, value: object, message: str) -> None:
        super().__init__(f"{field}: {value!r} {message}")
        self.field = field
        self.value = value


def trainer_image(job: FineTuneJob, settings: Settings) -> str:
    """Returns the image of the pods."""
    return job.spec.pod.image or settings.trainer_image


def plan(
    job: FineTuneJob, settings: Settings, attempt: int = 1, model_bytes: int | None = None, memory_restarts: int = 0
) -> RunConfig:
    """Returns everything that the pods of one attempt need to know.

    `model_bytes` is the size of the base model's files, None if no pod has read it yet.
    `memory_restarts` counts the restarts so far for lack of memory. Raises PlanError if the spec
    can't be run.
    """
    spec = job.spec
    pod = amounts(spec, model_bytes)
    return RunConfig(
        job=JobRef(namespace=job.metadata.namespace, name=job.metadata.name, uid=job.metadata.uid, attempt=attempt),
        model=ModelConfig(
            location=_model_location(spec.model),
            size_bytes=model_bytes,
            dtype=spec.model.dtype,
            allowed_licenses=spec.model.allowed_licenses,
            operator_licenses=settings.models.allowed_licenses,
            quantization=spec.model.quantization,
        ),
        data=_data(spec, job.metadata.creation_timestamp),
        method=spec.method.type,
        lora=spec.method.lora,
        full=spec.method.full,
        training=spec.training,
        world=_world(job, attempt, pod),
        checkpoint=spec.checkpoint,
        output=_output_location(spec.output),
        existing=spec.output.existing,
        hold_seconds=spec.output.hold_seconds,
        merge=spec.output.merge,
        evaluation=spec.evaluation,
        tracking=_tracking(spec, settings.tenants.trackers),
        progress=_progress(settings),
        s3=settings.storage.s3,
        gcs=settings.storage.gcs,
        azure=settings.storage.azure,
        provenance=Provenance(
            image=trainer_image(job, settings), operator_version=__version__, spec_digest=spec_digest(spec)
        ),
        metrics_linger_seconds=settings.pods.metrics_linger_seconds,
        scratch_bytes=int(quantity_value(pod.scratch)),
        model_cache=_model_cache(settings),
        auto_scratch=spec.resources.scratch == "auto" and model_bytes is None,
        memory_bytes=int(quantity_value(pod.memory)),
        auto_memory=spec.resources.memory == "auto" and model_bytes is None,
        stall_seconds=spec.run_policy.stall_seconds,
        checked=needs_preflight(spec),
        preflight_seconds=_preflight_seconds(spec),
        memory_restarts=memory_restarts,
        grace_seconds=spec.pod.termination_grace_period_seconds or settings.pods.grace_period_seconds,
    )


def model_bytes(observed: Observed) -> int | None:
    """Returns the size of the base model's files, which a preflight check or an attempt reports."""
    checks = (pod.result.model for pod in (observed.preflight.pods if observed.preflight else ()) if pod.result)
    return next(
        (model.size_bytes for model in (observed.job.status.model, *checks) if model and model.size_bytes), None
    )


def needs_preflight(spec: Spec) -> bool:
    """Whether a pod without a GPU checks the inputs and the output before any attempt starts."""
    match spec.run_policy.preflight:
        case "always":
            return True
        case "never":
            return False
        case "auto":
            return spec.resources.gpu is not None


def _preflight_seconds(spec: Spec) -> int:
    policy = spec.run_policy
    return min(policy.preflight_seconds, policy.active_deadline_seconds or policy.preflight_seconds)


def gpu_count(spec: Spec) -> int:
    """Returns the number of GPUs of all pods together."""
    return spec.distribution.nodes * spec.distribution.processes_per_node if spec.resources.gpu else 0


def spec_digest(spec: Spec) -> str:
    """Returns the sha256 of the spec without what may change while the job runs."""
    content = {key: value for key, value in spec.to_json().items() if key != "runPolicy"}
    content["output"] = {key: value for key, value in content["output"].items() if key != "deletionPolicy"}
    return "sha256:" + hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _world(job: FineTuneJob, attempt: int, pod: PodAmounts) -> WorldConfig:
    spec = job.spec
    nodes, processes = spec.distribution.nodes, spec.distribution.processes_per_node
    _check_shared_memory(spec, pod)
    return WorldConfig(
        nodes=nodes,
        processes_per_node=processes,
        strategy=spec.distribution.strategy,
        offload=spec.distribution.offload,
        sequence_parallel_size=spec.distribution.sequence_parallel_size,
        device="cuda" if spec.resources.gpu else "cpu",
        threads_per_process=max(1, int(quantity_value(pod.cpu)) // processes),
        master_address=names.master_address(job.metadata.name, attempt) if nodes > 1 else "127.0.0.1",
        master_port=names.RENDEZVOUS_PORT,
    )


def _check_shared_memory(spec: Spec, pod: PodAmounts) -> None:
    """Raises PlanError if a pod would have more shared memory than memory."""
    if quantity_value(spec.resources.shared_memory) > quantity_value(pod.memory):
        raise PlanError(
            "spec.resources.sharedMemory",
            spec.resources.shared_memory,
            f"is more than resources.memory ({pod.memory}), which includes it; lower sharedMemory or raise memory",
        )


def _data(spec: Spec, created: str | None) -> DataConfig:
    dataset = spec.dataset
    validation, test, credentials = dataset.validation, dataset.test, _credentials("dataset", dataset.credentials_ref)
    # Rows may have messages next to their pairs of answers. The objective decides which are read.
    detected: DataFormat = "preference" if spec.training.objective == "dpo" else "auto"
    sources = tuple(
        DataSource(
            location=_location(source.uri, credentials),
            format=detected if source.format in (None, "auto") else source.format,
            columns=source.columns,
            weight=source.weight,
        )
        for source in dataset.training_sources()
    )
    return DataConfig(
        train=sources[0].location,
        sources=sources if dataset.sources else (),
        validation=_location(validation.uri, credentials) if validation and validation.uri else None,
        validation_fraction=validation.fraction if validation else None,
        test=_location(test.uri, credentials) if test and test.uri else None,
        test_fraction=test.fraction if test else None,
        format=detected if dataset.format == "auto" else dataset.format,
        columns=dataset.columns,
        labels=dataset.labels,
        min_label_probability=dataset.min_label_probability,
        chat_template=dataset.chat_template,
        rendering=dataset.rendering.of_job(created),
        max_sequence_length=dataset.max_sequence_length,
        packing=dataset.packing,
        shared_prefix=dataset.shared_prefix,
        on_invalid=dataset.on_invalid,
    )


def _tracking(spec: Spec, servers: tuple[str, ...]) -> TrackingConfig:
    mlflow, wandb = spec.tracking.mlflow, spec.tracking.wandb
    return TrackingConfig(
        mlflow=MlflowConfig(
            uri=mlflow.uri,
            experiment=mlflow.experiment or "finetune-operator",
            registered_model=mlflow.registered_model,
            credentials=_credentials("mlflow", mlflow.credentials_ref),
        )
        if mlflow
        else None,
        tensorboard=spec.tracking.tensorboard,
        wandb=WandbConfig(
            project=wandb.project,
            entity=wandb.entity,
            mode=wandb.mode,
            credentials=_credentials("wandb", wandb.credentials_ref),
        )
        if wandb
        else None,
        servers=servers,
    )


def _progress(settings: Settings) -> ProgressConfig | None:
    if not settings.progress.url:
        return None
    return ProgressConfig(
        url=settings.progress.url.rstrip("/") + names.PROGRESS_PATH,
        token_path=names.PROGRESS_TOKEN_PATH,
        interval_seconds=settings.progress.interval_seconds,
    )


def _model_cache(settings: Settings) -> CacheConfig | None:
    cache = settings.models.cache
    if not cache.claim:
        return None
    return CacheConfig(root=names.MODEL_CACHE_ROOT, max_bytes=int(quantity_value(cache.size)))


def _model_location(model: BaseModelSpec) -> Location:
    return _location(model.uri, _credentials("model", model.credentials_ref), model.revision)


def _output_location(output: OutputSpec) -> Location:
    return _location(output.uri, _credentials("output", output.credentials_ref))


def _location(uri: str, credentials: str | None, revision: str | None = None) -> Location:
    return Location(uri=_mounted(uri), display=uri, revision=revision, credentials=credentials)


def _mounted(uri: str) -> str:
    """Returns the file:// URI of a pvc:// or volume:// URI inside the pod; others are unchanged."""
    scheme, _, rest = uri.partition("://")
    root = {"pvc": names.PVC_ROOT, "volume": names.VOLUMES_ROOT}.get(scheme)
    return f"file://{root}/{rest}" if root else uri


def _credentials(role: CredentialsRole, reference: SecretRef | None) -> str | None:
    return f"{names.CREDENTIALS_ROOT}/{role}" if reference else None
