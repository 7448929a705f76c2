"""Checks that the administrator offers what a job names: images, networks and CSI drivers. It does
no I/O."""

from __future__ import annotations

from finetune_api.resource import FineTuneJob
from finetune_operator.core.plan import PlanError
from finetune_operator.settings import Settings


class NotOffered(PlanError):
    """Is raised if a job names something that the administrator doesn't offer, or not yet.

    `reason` is that of the condition; the job waits, because the settings may change.
    """

    def __init__(self, field: str, value: object, message: str, reason: str) -> None:
        super().__init__(field, value, message)
        self.reason = reason


def check_offered(job: FineTuneJob, settings: Settings) -> None:
    """Checks that the administrator offers what the job names.

    Raises NotOffered with what exists instead.
    """
    image = job.spec.pod.image
    if image and not _is_allowed_image(image, settings):
        raise NotOffered(
            "spec.pod.image",
            image,
            "is not among the operator's pods.allowedImages: "
            f"{', '.join(settings.pods.allowed_images) or 'there are none'}; have it added, or create a job without "
            "pod.image",
            "ImageNotAllowed",
        )
    network, profiles = job.spec.pod.network, settings.pods.network_profiles
    if network and network not in profiles:
        existing = ", ".join(sorted(profiles)) or "there are none"
        raise NotOffered(
            "spec.pod.network",
            network,
            f"is not one of the network profiles in the operator's pods.networkProfiles: {existing}; have it added, "
            "or create a job that names another one",
            "UnknownNetwork",
        )
    _check_drivers(job, settings)


def _check_drivers(job: FineTuneJob, settings: Settings) -> None:
    drivers = settings.pods.allowed_csi_drivers
    for volume in job.spec.pod.volumes:
        if volume.csi and volume.csi.driver not in drivers:
            raise NotOffered(
                "spec.pod.volumes",
                volume.csi.driver,
                f"is not among the operator's pods.allowedCsiDrivers: {', '.join(drivers) or 'there are none'}; have "
                "it added, or create a job without this volume",
                "CsiDriverNotAllowed",
            )


def _is_allowed_image(image: str, settings: Settings) -> bool:
    allowed = settings.pods.allowed_images
    return any(image == entry or (entry.endswith(("/", ":", "@")) and image.startswith(entry)) for entry in allowed)
