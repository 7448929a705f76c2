"""Defines what jobs may name that belongs to somebody else, as a part of the settings.

An entry is a name, or the beginning of one if it ends with `*`.
"""

from __future__ import annotations

from pydantic import Field

from finetune_api.base import Model

_ANY = ("*",)


class TenantSettings(Model):
    """Lists what the jobs of all namespaces may name."""

    service_accounts: tuple[str, ...] = Field(
        default=(), description="ServiceAccounts. One with the label finetune-operator.io/use: training is allowed too."
    )
    secrets: tuple[str, ...] = Field(default=_ANY, description="Secrets. Their labels can't be read.")
    claims: tuple[str, ...] = Field(
        default=_ANY,
        description="PersistentVolumeClaims. One with the label finetune-operator.io/use: input, or output, is allowed "
        "for that, too.",
    )
    priority_classes: tuple[str, ...] = Field(default=(), description="PriorityClasses.")
    storage_classes: tuple[str, ...] = Field(default=_ANY, description="StorageClasses of scratch disks.")
    schedulers: tuple[str, ...] = Field(default=_ANY, description="Schedulers.")
    queues: tuple[str, ...] = Field(default=_ANY, description="Queues.")
    toleration_keys: tuple[str, ...] = Field(
        default=("nvidia.com/gpu", "node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"),
        description="Keys of taints.",
    )
    node_label_keys: tuple[str, ...] = Field(
        default=(
            "kubernetes.io/arch",
            "topology.kubernetes.io/*",
            "node.kubernetes.io/instance-type",
            "nvidia.com/*",
            "cloud.google.com/gke-accelerator",
            "karpenter.k8s.aws/instance-*",
            "karpenter.sh/capacity-type",
        ),
        description="Keys of node labels, in pod.nodeSelector and pod.nodeAffinity.",
    )
    label_keys: tuple[str, ...] = Field(default=_ANY, description="Keys of the pods' labels.")
    annotation_keys: tuple[str, ...] = Field(
        default=(
            "cluster-autoscaler.kubernetes.io/safe-to-evict",
            "karpenter.sh/do-not-disrupt",
            "scheduling.k8s.io/group-name",
        ),
        description="Keys of the pods' annotations. Those of AppArmor and seccomp are always refused.",
    )
    gpus: tuple[str, ...] = Field(default=("nvidia.com/gpu", "nvidia.com/mig-*"), description="Names of GPUs.")
    extra_resources: tuple[str, ...] = Field(
        default=("rdma/*", "hugepages-*", "vpc.amazonaws.com/efa"),
        description="Names of additional resources, in resources.extra.",
    )
    trackers: tuple[str, ...] = Field(
        default=(),
        description="URLs of trackers; a path below one is allowed too. Empty means any, but a Secret is then used "
        "only for the server that the Secret itself names.",
    )
    volume_images: tuple[str, ...] = Field(
        default=_ANY,
        description="Images whose files a job may mount (pod.volumes). A node may have pulled one with a Secret of "
        "somebody else.",
    )
    proxies: tuple[str, ...] = Field(
        default=(),
        description="URLs of proxies that a job may name in pod.env. A proxy sends requests for a pod to servers that "
        "the pod itself wouldn't ask.",
    )
