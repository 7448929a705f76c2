"""Settings: what an administrator decides once for all jobs. Read at the door (`--config FILE`, YAML, camelCase) and
passed on as frozen values; the chart renders this file. Nothing else in the operator reads environment or files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from finetune_api import names
from finetune_api.model import Model
from finetune_api.resource import TolerationSpec
from finetune_api.run import S3Config

Port = Annotated[int, Field(ge=0, le=65535)]


class LeaderElectionSettings(Model):
    """Which of several replicas works: the holder of a Lease."""

    enabled: bool = True
    namespace: str = Field(default="", description="Of the Lease. Empty means the operator's own.")
    name: str = Field(default="finetune-operator", description="Of the Lease.")
    lease_seconds: int = Field(default=15, ge=2, description="A silent holder is replaced after this long.")
    renew_seconds: int = Field(default=10, ge=1, description="A holder that can't renew for this long ends itself.")
    retry_seconds: float = Field(default=2.0, gt=0, description="Between two attempts to take or renew.")


class ProgressSettings(Model):
    """How trainer pods report to the operator."""

    url: str = Field(
        default="",
        description="Base URL that the pods post to, e.g. http://finetune-operator.finetune-system:8443. Empty: no "
        "progress is reported; training is the same.",
    )
    port: Port = Field(default=names.OPERATOR_PROGRESS_PORT, description="Where the operator listens. 0 means off.")
    interval_seconds: float = Field(default=5.0, gt=0, description="Between two posts of a job.")
    write_every_seconds: float = Field(default=30.0, gt=0, description="Between two writes of a job's status.")


class HubSettings(Model):
    """The model hub that hf:// means."""

    endpoint: str | None = Field(default=None, description="Of a mirror. Empty means the client's own default.")


class StorageSettings(Model):
    """Where s3:// and hf:// lead."""

    s3: S3Config = Field(default_factory=S3Config)
    hub: HubSettings = Field(default_factory=HubSettings)


class ModelSettings(Model):
    """Which base models may be trained."""

    allowed_licenses: tuple[str, ...] = Field(
        default=(), description="Licences, as models' READMEs name them; unknown for one that says nothing. Empty: any."
    )


class LimitSettings(Model):
    """How hard the operator may work the API server."""

    requests_per_second: float = Field(default=100.0, gt=0)
    burst: int = Field(default=200, ge=1)
    workers: int = Field(default=16, ge=1, description="Jobs reconciled at the same time.")


class PodSettings(Model):
    """What every trainer pod carries, besides what its job says."""

    grace_period_seconds: int = Field(default=120, ge=1, description="From SIGTERM to SIGKILL.")
    metrics_linger_seconds: float = Field(
        default=0.0, ge=0, description="How long a pod's metrics stay up after the end, for one more scrape."
    )
    preflight_cpu: str = Field(default="1", description="Cores of the pod that checks inputs.")
    preflight_memory: str = Field(default="2Gi", description="Memory of the pod that checks inputs.")
    tolerations: tuple[TolerationSpec, ...] = ()
    node_selector: dict[str, str] = Field(default_factory=dict)
    scheduler_name: str = ""
    runtime_class_name: str = ""
    image_pull_secrets: tuple[str, ...] = ()


class Settings(Model):
    """All of it. `{}` is a working configuration but for trainerImage."""

    trainer_image: str = Field(
        default="localhost/finetune-trainer:dev", min_length=1, description="Image of the trainer pods."
    )
    image_pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    watch_namespaces: tuple[str, ...] = Field(default=(), description="Empty means all.")
    leader_election: LeaderElectionSettings = Field(default_factory=LeaderElectionSettings)
    progress: ProgressSettings = Field(default_factory=ProgressSettings)
    storage: StorageSettings = Field(default_factory=StorageSettings)
    models: ModelSettings = Field(default_factory=ModelSettings)
    limits: LimitSettings = Field(default_factory=LimitSettings)
    pods: PodSettings = Field(default_factory=PodSettings)
    metrics_port: Port = Field(default=names.OPERATOR_METRICS_PORT, description="0 means off.")
    probes_port: Port = Field(default=names.OPERATOR_PROBES_PORT, description="/livez and /readyz. 0 means off.")
    sweep_seconds: float = Field(default=300.0, gt=0, description="Between two lists of everything.")
    metrics_retention_seconds: float = Field(
        default=3600.0, ge=0, description="How long a finished job's series are exported."
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"


class Identity(Model):
    """Which replica this is; from the downward API."""

    pod_name: str = "finetune-operator"
    pod_ip: str = "127.0.0.1"
    namespace: str = "default"


def parse(text: str) -> Settings:
    """Raises pydantic.ValidationError whose messages name the key."""
    return Settings.model_validate_json(json.dumps(yaml.safe_load(text) or {}), by_name=False)


def load(path: Path | None) -> Settings:
    """The settings in a file, or the defaults."""
    return parse(path.read_text(encoding="utf-8")) if path is not None else Settings()


def identity(environment: Mapping[str, Any]) -> Identity:
    """POD_NAME, POD_IP and POD_NAMESPACE of the given environment."""
    keys = {"POD_NAME": "pod_name", "POD_IP": "pod_ip", "POD_NAMESPACE": "namespace"}
    return Identity(**{field: environment[key] for key, field in keys.items() if environment.get(key)})
