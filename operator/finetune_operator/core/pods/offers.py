"""Decides whether a job may name what it names: things of the administrator, or of others in its
namespace.

The administrator's lists decide. A ServiceAccount or a claim that isn't listed may have a label by
which its owner allows jobs to name it; that is looked up elsewhere. It does no I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from finetune_api import names
from finetune_api.crd.transitions import MUTABLE, WHILE_STOPPED
from finetune_api.destinations import is_listed, is_listed_url
from finetune_api.resource import FineTuneJob, SecretRef, Spec
from finetune_api.spec import environment
from finetune_operator.core.plan import PlanError
from finetune_operator.settings import Settings
from finetune_operator.tenant_settings import TenantSettings

NOT_ALLOWED = "NotAllowed"

# These take a protection of the pod away; no list can allow them.
_PROTECTIONS = ("container.apparmor.security.beta.kubernetes.io/", "seccomp.security.alpha.kubernetes.io/",
                "container.seccomp.security.alpha.kubernetes.io/")  # fmt: skip


class NotOffered(PlanError):
    """Is raised if a job names something that the administrator doesn't offer, or not yet.

    `reason` is that of the condition; the job waits, because the settings may change.
    """

    def __init__(self, field: str, value: object, message: str, reason: str) -> None:
        super().__init__(field, value, message)
        self.reason = reason


@dataclass(frozen=True)
class _Named:
    """Pairs a name with its field, and with the key of the list that may have it."""

    field: str
    name: str
    setting: str


@dataclass(frozen=True)
class Unlisted:
    """Describes an object that isn't listed; one of `uses` as its label allows it."""

    field: str
    resource: str
    name: str
    setting: str
    uses: tuple[str, ...]

    def refusal(self, existing: Mapping[str, Any] | None) -> NotOffered | None:
        """Returns why the job may not name the object; None if it may.

        `existing` is the object, None if there is none.
        """
        labels = ((existing or {}).get("metadata") or {}).get("labels") or {}
        if labels.get(names.LABEL_USE) in self.uses:
            return None
        problem = f"has no label {names.LABEL_USE}: {' or '.join(self.uses)}" if existing else "doesn't exist"
        return NotOffered(
            self.field,
            self.name,
            f"{problem}, and isn't among the operator's tenants.{self.setting}; have its owner add the label, have it "
            f"added to the list, or {_another(self.field)}",
            NOT_ALLOWED,
        )


def check_offered(job: FineTuneJob, settings: Settings) -> None:
    """Checks that the administrator offers what the job names.

    Raises NotOffered with what exists instead.
    """
    _check_image(job, settings)
    _check_network(job, settings)
    _check_drivers(job, settings)
    for entry in _named(job.spec):
        allowed = _list(settings.tenants, entry.setting)
        if entry.field == "spec.pod.annotations" and entry.name.startswith(_PROTECTIONS):
            raise NotOffered(
                entry.field,
                entry.name,
                f"would change the protection of the pods; {_another(entry.field)}",
                NOT_ALLOWED,
            )
        if not is_listed(entry.name, allowed):
            raise _refused(entry, allowed)
    _check_tracker(job.spec, settings.tenants.trackers)
    _check_proxies(job.spec, settings)


def unlisted(job: FineTuneJob, settings: Settings) -> tuple[Unlisted, ...]:
    """Returns the ServiceAccount and the claims that only their label allows a job to name."""
    spec, tenants = job.spec, settings.tenants
    account = spec.pod.service_account_name
    entries = []
    if account and not is_listed(account, tenants.service_accounts):
        entries.append(
            Unlisted(
                "spec.pod.serviceAccountName", "serviceaccounts", account, "serviceAccounts", (names.USE_TRAINING,)
            )
        )
    written = {claim_of(spec.output.uri)} | {
        volume.claim.name for volume in spec.pod.volumes if volume.claim and volume.writable
    }
    for field, claim in _claims(spec):
        if is_listed(claim, tenants.claims):
            continue
        uses = (names.USE_OUTPUT,) if claim in written else (names.USE_INPUT, names.USE_OUTPUT)
        entries.append(Unlisted(field, "persistentvolumeclaims", claim, "claims", uses))
    return tuple({entry.name: entry for entry in entries}.values())


def claim_of(uri: str | None) -> str | None:
    """Returns the claim that a pvc:// URI names; None for other URIs."""
    scheme, _, rest = (uri or "").partition("://")
    return rest.split("/", 1)[0] if scheme == "pvc" else None


def _check_image(job: FineTuneJob, settings: Settings) -> None:
    image, allowed = job.spec.pod.image, settings.pods.allowed_images
    if not image or any(
        image == entry or (entry.endswith(("/", ":", "@")) and image.startswith(entry)) for entry in allowed
    ):
        return
    raise NotOffered(
        "spec.pod.image",
        image,
        f"is not among the operator's pods.allowedImages: {_listed(allowed)}; have it added, or "
        f"{_another('spec.pod.image')}",
        "ImageNotAllowed",
    )


def _check_network(job: FineTuneJob, settings: Settings) -> None:
    network, profiles = job.spec.pod.network, settings.pods.network_profiles
    if network and network not in profiles:
        raise NotOffered(
            "spec.pod.network",
            network,
            "is not one of the network profiles in the operator's pods.networkProfiles: "
            f"{_listed(sorted(profiles))}; have it added, or {_another('spec.pod.network')}",
            "UnknownNetwork",
        )


def _check_drivers(job: FineTuneJob, settings: Settings) -> None:
    drivers = settings.pods.allowed_csi_drivers
    for volume in job.spec.pod.volumes:
        if volume.csi and volume.csi.driver not in drivers:
            raise NotOffered(
                "spec.pod.volumes",
                volume.csi.driver,
                f"is not among the operator's pods.allowedCsiDrivers: {_listed(drivers)}; have it added, or create a "
                "job without this volume",
                "CsiDriverNotAllowed",
            )


def _check_tracker(spec: Spec, allowed: tuple[str, ...]) -> None:
    """Checks the server that a job names; the one in a Secret of W&B is checked by the pod."""
    mlflow = spec.tracking.mlflow
    if mlflow and allowed and not is_listed_url(mlflow.uri, allowed):
        raise _refused(_Named("spec.tracking.mlflow.uri", mlflow.uri, "trackers"), allowed)


def _check_proxies(spec: Spec, settings: Settings) -> None:
    """Checks the proxies that a job names. Exceptions are its own affair, unless the administrator
    has a proxy."""
    allowed = settings.tenants.proxies
    has_proxy = any(environment.is_proxy(entry.name) for entry in settings.pods.env)
    for entry in spec.pod.env:
        is_exception = entry.name.upper() == "NO_PROXY"
        if not environment.is_proxy(entry.name) or "*" in allowed or (is_exception and not has_proxy):
            continue
        url = entry.value if "//" in entry.value else f"http://{entry.value}"
        if is_exception or not is_listed_url(url, allowed):
            raise _refused(_Named("spec.pod.env", f"{entry.name}={entry.value[:200]}", "proxies"), allowed)


def _named(spec: Spec) -> Iterator[_Named]:
    """Yields all that a job names and that only a list allows."""
    pod, resources = spec.pod, spec.resources
    yield from (_Named(field, ref.name, "secrets") for field, ref in _secrets(spec))
    yield from _one("spec.pod.priorityClassName", pod.priority_class_name, "priorityClasses")
    yield from _one("spec.pod.schedulerName", pod.scheduler_name, "schedulers")
    yield from _one("spec.runPolicy.queueName", spec.run_policy.queue_name, "queues")
    yield from _one("spec.resources.scratchStorageClass", resources.scratch_storage_class, "storageClasses")
    yield from _one("spec.resources.gpu.name", resources.gpu.name if resources.gpu else "", "gpus")
    yield from _each("spec.resources.extra", resources.extra, "extraResources")
    yield from _each("spec.pod.tolerations", (entry.key or "*" for entry in pod.tolerations), "tolerationKeys")
    yield from _each("spec.pod.nodeSelector", pod.node_selector, "nodeLabelKeys")
    nodes = pod.node_affinity
    conditions = (*(entry.key for entry in nodes.required), *(entry.key for entry in nodes.preferred))
    yield from _each("spec.pod.nodeAffinity", conditions, "nodeLabelKeys")
    images = (volume.image.reference for volume in pod.volumes if volume.image)
    yield from _each("spec.pod.volumes", images, "volumeImages")
    yield from _each("spec.pod.labels", pod.labels, "labelKeys")
    yield from _each("spec.pod.annotations", pod.annotations, "annotationKeys")


def _one(field: str, name: str, setting: str) -> Iterator[_Named]:
    if name:
        yield _Named(field, name, setting)


def _each(field: str, keys: Iterable[str], setting: str) -> Iterator[_Named]:
    return (_Named(field, name, setting) for name in keys)


def _secrets(spec: Spec) -> Iterator[tuple[str, SecretRef]]:
    mlflow, wandb = spec.tracking.mlflow, spec.tracking.wandb
    places = {
        "spec.model": spec.model.credentials_ref,
        "spec.model.checkpoint": spec.model.checkpoint.credentials_ref if spec.model.checkpoint else None,
        "spec.dataset": spec.dataset.credentials_ref,
        "spec.output": spec.output.credentials_ref,
        "spec.tracking.mlflow": mlflow.credentials_ref if mlflow else None,
        "spec.tracking.wandb": wandb.credentials_ref if wandb else None,
    }
    yield from ((f"{place}.credentialsRef", ref) for place, ref in places.items() if ref)
    yield from (("spec.pod.imagePullSecrets", ref) for ref in spec.pod.image_pull_secrets)
    drivers = (volume.csi for volume in spec.pod.volumes if volume.csi)
    yield from (("spec.pod.volumes", csi.secret_ref) for csi in drivers if csi.secret_ref)


def _claims(spec: Spec) -> Iterator[tuple[str, str]]:
    """Yields the claims that a job names, with their fields; that of the output comes first."""
    validation, test = spec.dataset.validation, spec.dataset.test
    places = [
        ("spec.output.uri", spec.output.uri),
        ("spec.model.uri", spec.model.uri),
        ("spec.model.checkpoint.uri", spec.model.checkpoint.uri if spec.model.checkpoint else None),
        *(("spec.dataset", source.uri) for source in spec.dataset.training_sources()),
        ("spec.dataset.validation.uri", validation.uri if validation else None),
        ("spec.dataset.test.uri", test.uri if test else None),
    ]
    yield from ((field, claim) for field, uri in places if (claim := claim_of(uri)))
    yield from (("spec.pod.volumes", volume.claim.name) for volume in spec.pod.volumes if volume.claim)


def _list(tenants: TenantSettings, setting: str) -> tuple[str, ...]:
    lists: Mapping[str, tuple[str, ...]] = {
        "secrets": tenants.secrets,
        "priorityClasses": tenants.priority_classes,
        "schedulers": tenants.schedulers,
        "queues": tenants.queues,
        "storageClasses": tenants.storage_classes,
        "gpus": tenants.gpus,
        "extraResources": tenants.extra_resources,
        "tolerationKeys": tenants.toleration_keys,
        "nodeLabelKeys": tenants.node_label_keys,
        "volumeImages": tenants.volume_images,
        "labelKeys": tenants.label_keys,
        "annotationKeys": tenants.annotation_keys,
    }
    return lists[setting]


def _refused(entry: _Named, allowed: tuple[str, ...]) -> NotOffered:
    name = entry.name if entry.name != "*" else "every key"
    return NotOffered(
        entry.field,
        name,
        f"is not among the operator's tenants.{entry.setting}: {_listed(allowed)}; have it added, or "
        f"{_another(entry.field)}",
        NOT_ALLOWED,
    )


def _another(field: str) -> str:
    """Returns how a job that waits can do without what it names."""
    path = field.removeprefix("spec.")
    section_and_name = tuple(path.split(".")[:2])
    if section_and_name in WHILE_STOPPED:
        return f"change {path} of this job, which may change while it waits"
    if section_and_name in MUTABLE:
        return f"set runPolicy.suspend to true, and then change {path}"
    return "create a job without it"


def _listed(entries: Iterable[str]) -> str:
    return ", ".join(entries) or "there are none"
