"""Defines what an administrator chooses for the pods of all jobs, as a part of the settings."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from finetune_api import scalars as s
from finetune_api.base import Model
from finetune_api.resource import EnvVarSpec, TolerationSpec
from finetune_api.spec.environment import unique_names


class NetworkVolume(Model):
    """Describes a volume that the library of a network needs, such as the socket of a daemon."""

    name: s.SecretName
    mount_path: str = Field(pattern="^/[^:]+$")
    read_only: bool = True
    source: dict[str, Any] = Field(description="The volume as in a pod's spec, without its name: {hostPath: …}.")


class NetworkProfile(Model):
    """Describes what training pods need for a network, besides the pod network."""

    resources: dict[s.ResourceName, s.Quantity] = Field(
        default_factory=dict, description="Devices and huge pages of each pod; those in a job's resources.extra win."
    )
    env: tuple[EnvVarSpec, ...] = Field(default=(), description="Variables; they replace pods.env, and a job's win.")
    annotations: dict[str, str] = Field(default_factory=dict, description="Annotations of the pods.")
    capabilities: tuple[Literal["IPC_LOCK"], ...] = Field(
        default=(), description="Capabilities of the container. The namespace then can't enforce Pod Security."
    )
    volumes: tuple[NetworkVolume, ...] = ()
    sidecars: tuple[dict[str, Any], ...] = Field(
        default=(), description="Containers, as in a pod's spec, that run next to the trainer and stop after it."
    )

    rules = (unique_names("env"),)


class CaBundle(Model):
    """Names a ConfigMap with the certificates that pods trust instead of the image's own."""

    config_map: str = Field(default="", description="Name, in each namespace with jobs. Empty means none.")
    key: str = Field(default="ca.crt", min_length=1, description="Key of the certificates, in PEM.")


class PodSettings(Model):
    """Configures what every trainer pod has besides what its job specifies."""

    grace_period_seconds: int = Field(default=120, ge=1, description="Seconds from SIGTERM to SIGKILL.")
    metrics_linger_seconds: float = Field(
        default=0.0, ge=0, description="Seconds that a pod serves its metrics after training, for one more scrape."
    )
    preflight_cpu: str = Field(default="1", description="Cores of the preflight pod.")
    preflight_memory: str = Field(default="2Gi", description="Memory of the preflight pod.")
    preflight_node_selector: dict[str, str] = Field(
        default_factory=dict, description="Labels of the nodes for preflight pods. Empty means nodeSelector."
    )
    preflight_tolerations: tuple[TolerationSpec, ...] | None = Field(
        default=None, description="Tolerations of preflight pods. Absent means tolerations."
    )
    preflight_runtime_class_name: str = Field(
        default="", description="RuntimeClass of preflight pods. Empty means the default one of the node."
    )
    cleanup_seconds: int = Field(
        default=600,
        ge=10,
        le=86400,
        description="Seconds that a pod may take to delete what a deleted job leaves (output.deletionPolicy); after "
        "that the FineTuneJob is removed, and the files stay.",
    )
    cpu_limit: bool = Field(
        default=True, description="Whether training pods have a limit on cores, not only a request."
    )
    tolerations: tuple[TolerationSpec, ...] = ()
    node_selector: dict[str, str] = Field(default_factory=dict)
    scheduler_name: str = ""
    runtime_class_name: str = ""
    image_pull_secrets: tuple[str, ...] = ()
    env: tuple[EnvVarSpec, ...] = Field(default=(), description="Variables of all pods, as in a job's pod.env.")

    ca_bundle: CaBundle = Field(default_factory=CaBundle)
    allowed_images: tuple[str, ...] = Field(
        default=(),
        description="Trainer images that a job may name in pod.image: exact names, or prefixes that end with a slash, "
        "a colon or @.",
    )
    app_armor_profile: Literal["", "RuntimeDefault"] = Field(
        default="",
        description="AppArmor profile of the pods. Empty means the runtime's own, where the node has AppArmor; with "
        "RuntimeDefault, a node without AppArmor refuses the pods.",
    )
    allowed_csi_drivers: tuple[str, ...] = Field(
        default=(), description="CSI drivers whose ephemeral volumes a job may name in pod.volumes."
    )
    gpus_per_node: int = Field(
        default=8, ge=1, description="GPUs of a node. Two pods of a group that request as many never share one."
    )
    network_profiles: dict[str, NetworkProfile] = Field(
        default_factory=dict, description="Profiles that a job can name in pod.network."
    )

    rules = (unique_names("env"),)
