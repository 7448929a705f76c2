"""Defines the operator's settings, which an administrator chooses for all jobs.

They are read once at start (`--config FILE`, YAML with camelCase keys, which the chart renders) and
passed on as frozen values. Nothing else in the operator reads environment variables or files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import Field

from finetune_api import names
from finetune_api.base import Model
from finetune_api.messages.run import AzureConfig, GcsConfig, S3Config
from finetune_api.scalars import Quantity
from finetune_operator.pod_settings import PodSettings
from finetune_operator.tenant_settings import TenantSettings

Port = Annotated[int, Field(ge=0, le=65535)]


class LeaderElectionSettings(Model):
    """Configures the Lease whose holder is the one active replica."""

    enabled: bool = True
    namespace: str = Field(default="", description="Namespace of the Lease. Empty means the operator's own.")
    name: str = Field(default="finetune-operator", description="Name of the Lease.")
    lease_seconds: int = Field(
        default=15, ge=2, description="Seconds after which a holder that doesn't renew is replaced."
    )
    renew_seconds: int = Field(default=10, ge=1, description="Seconds after which a holder that can't renew exits.")
    retry_seconds: float = Field(default=2.0, gt=0, description="Seconds between two attempts to acquire or renew.")


class ProgressSettings(Model):
    """Configures how trainer pods report progress to the operator."""

    url: str = Field(
        default="",
        description="Base URL that the pods post to, e.g. http://finetune-operator.finetune-system:8443. If empty, no "
        "progress is reported; training isn't affected.",
    )
    certificate: str = Field(
        default="",
        description="Folder with ca.crt and ca.key, by which the operator issues its own certificates, or with ca.crt, "
        "tls.crt and tls.key. Empty means no TLS; url then begins with http://.",
    )
    certificate_seconds: int = Field(
        default=30 * 86400, ge=1, description="Lifetime of an issued certificate. It is replaced after two thirds."
    )
    server_name: str = Field(default="", description="Name in the certificate. Empty means the host of url.")
    port: Port = Field(
        default=names.OPERATOR_PROGRESS_PORT, description="Port that the operator listens on. 0 means off."
    )
    interval_seconds: float = Field(default=5.0, gt=0, description="Seconds between two posts of a job.")
    write_every_seconds: float = Field(
        default=30.0, gt=0, description="Seconds between two writes of a job's progress."
    )
    verify_address: bool = Field(
        default=True,
        description="Refuse a post that doesn't come from the address of the pod that its token is bound to. Turn it "
        "off if the cluster's network translates the addresses of pods.",
    )

    @property
    def recognized_name(self) -> str:
        """The name in the certificate."""
        return self.server_name or urlsplit(self.url).hostname or ""


class HubSettings(Model):
    """Configures the model hub that hf:// URIs refer to."""

    endpoint: str | None = Field(default=None, description="URL of a mirror. Empty means the client's default.")


class StorageSettings(Model):
    """Configures the endpoints behind s3://, gs://, az:// and hf:// URIs."""

    s3: S3Config = Field(default_factory=S3Config)
    gcs: GcsConfig = Field(default_factory=GcsConfig)
    azure: AzureConfig = Field(default_factory=AzureConfig)
    hub: HubSettings = Field(default_factory=HubSettings)


class ModelCacheSettings(Model):
    """Configures the cache of base models that pods of a namespace share."""

    claim: str = Field(default="", description="PersistentVolumeClaim in each namespace with jobs. Empty means none.")
    size: Quantity = Field(default="1Ti", description="Bytes that all models in it may have together.")


class ModelSettings(Model):
    """Restricts which base models may be trained, and says where they are cached."""

    cache: ModelCacheSettings = Field(default_factory=ModelCacheSettings)

    allowed_licenses: tuple[str, ...] = Field(
        default=(), description="Licenses as models' READMEs name them; unknown stands for no name. Empty means any."
    )


class NetworkPolicySettings(Model):
    """Configures the NetworkPolicy that each job gets for its pods."""

    enabled: bool = True
    metrics_from: tuple[dict[str, Any], ...] = Field(
        default=(), description="Peers that may read the metrics of training pods, as in a NetworkPolicy."
    )
    egress: tuple[dict[str, Any], ...] = Field(
        default=(),
        description="What pods may connect to besides each other, as in a NetworkPolicy. Empty means everything.",
    )


class LimitSettings(Model):
    """Limits the load that the operator puts on the API server."""

    requests_per_second: float = Field(default=100.0, gt=0)
    burst: int = Field(default=200, ge=1)
    workers: int = Field(default=16, ge=1, description="Jobs reconciled at the same time.")


class Settings(Model):
    """Contains all settings. All have defaults, but a cluster must be able to pull trainerImage."""

    trainer_image: str = Field(
        default="localhost/finetune-trainer:dev", min_length=1, description="Image of the trainer pods."
    )
    image_pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    watch_namespaces: tuple[str, ...] = Field(
        default=(), description="Namespaces whose FineTuneJobs are reconciled. Empty means all."
    )
    leader_election: LeaderElectionSettings = Field(default_factory=LeaderElectionSettings)
    progress: ProgressSettings = Field(default_factory=ProgressSettings)
    storage: StorageSettings = Field(default_factory=StorageSettings)
    models: ModelSettings = Field(default_factory=ModelSettings)
    limits: LimitSettings = Field(default_factory=LimitSettings)
    pods: PodSettings = Field(default_factory=PodSettings)
    tenants: TenantSettings = Field(default_factory=TenantSettings)
    network_policies: NetworkPolicySettings = Field(default_factory=NetworkPolicySettings)
    metrics_port: Port = Field(default=names.OPERATOR_METRICS_PORT, description="0 means off.")
    probes_port: Port = Field(default=names.OPERATOR_PROBES_PORT, description="/livez and /readyz. 0 means off.")
    sweep_seconds: float = Field(default=300.0, gt=0, description="Seconds between two resyncs.")
    metrics_retention_seconds: float = Field(
        default=3600.0, ge=0, description="Seconds that a finished job's metrics are exported."
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"


class Identity(Model):
    """Identifies this replica, as the downward API does."""

    pod_name: str = "finetune-operator"
    pod_ip: str = "127.0.0.1"
    namespace: str = "default"


class SettingsError(ValueError):
    """Raised for a settings file that isn't YAML; the message names the line."""


def parse(text: str) -> Settings:
    """Parses settings from YAML.

    Raises SettingsError, or pydantic.ValidationError, whose messages name the key.
    """
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise SettingsError(f"{where}isn't YAML ({getattr(error, 'problem', None) or error})") from error
    # A value that YAML reads as a date is the text that it was for every setting.
    return Settings.model_validate_json(json.dumps(document or {}, default=str), by_name=False)


def load(path: Path | None) -> Settings:
    """Reads the settings from a file; returns the defaults if `path` is None.

    Raises OSError, SettingsError or pydantic.ValidationError.
    """
    return parse(path.read_text(encoding="utf-8")) if path is not None else Settings()


def identity(environment: Mapping[str, Any]) -> Identity:
    """Returns the identity from POD_NAME, POD_IP and POD_NAMESPACE."""
    keys = {"POD_NAME": "pod_name", "POD_IP": "pod_ip", "POD_NAMESPACE": "namespace"}
    return Identity(**{field: environment[key] for key, field in keys.items() if environment.get(key)})
