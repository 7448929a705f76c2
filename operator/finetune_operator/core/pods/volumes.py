"""Builds the volumes that a job names: claims by their pvc:// URIs, and those of pod.volumes. It
does no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune_api import names
from finetune_api.resource import FineTuneJob
from finetune_api.spec.volumes import VolumeSpec, volume_name
from finetune_operator.core.pods.offers import claim_of

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Mount:
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


def claims(job: FineTuneJob, role: str) -> tuple[Mount, ...]:
    """Returns the mounts of the PersistentVolumeClaims; only that of the output is writable."""
    output_claim = claim_of(job.spec.output.uri)
    present = dict.fromkeys(claim for uri in _uris(job, role) if (claim := claim_of(uri)))
    return tuple(
        Mount(
            f"claim-{number}",
            {"persistentVolumeClaim": {"claimName": claim}},
            f"{names.PVC_ROOT}/{claim}",
            read_only=claim != output_claim,
        )
        for number, claim in enumerate(present)
    )


def volumes(job: FineTuneJob, role: str) -> tuple[Mount, ...]:
    """Returns the mounts of pod.volumes. Other than training pods have those that a URI names."""
    named = {volume_name(uri) for uri in _uris(job, role)}
    return tuple(
        Mount(
            f"volume-{volume.name}",
            _source(volume),
            f"{names.VOLUMES_ROOT}/{volume.name}",
            read_only=not volume.writable,
        )
        for volume in job.spec.pod.volumes
        if role == names.ROLE_TRAINER or volume.name in named
    )


def _source(volume: VolumeSpec) -> Manifest:
    if volume.claim:
        return {"persistentVolumeClaim": {"claimName": volume.claim.name}}
    if volume.image:
        return {"image": {"reference": volume.image.reference, "pullPolicy": volume.image.pull_policy}}
    assert volume.csi is not None  # noqa: S101 (a rule of VolumeSpec)
    secret = volume.csi.secret_ref
    csi: Manifest = {"driver": volume.csi.driver, "readOnly": True}
    if volume.csi.attributes:
        csi["volumeAttributes"] = volume.csi.attributes
    return {"csi": {**csi, "nodePublishSecretRef": {"name": secret.name}} if secret else csi}


def _uris(job: FineTuneJob, role: str) -> tuple[str | None, ...]:
    """Returns the locations of everything that the pods read and write; None for what is absent."""
    dataset = job.spec.dataset
    if role == names.ROLE_CLEANUP:
        return (job.spec.output.uri,)
    return (
        job.spec.model.uri,
        *(source.uri for source in dataset.training_sources()),
        dataset.validation.uri if dataset.validation else None,
        dataset.test.uri if dataset.test else None,
        job.spec.output.uri,
    )
