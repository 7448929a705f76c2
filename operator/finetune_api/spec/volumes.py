"""Defines spec.pod.volumes: volumes of the training pods from a short list of kinds.

A volume:// URI names one of them. There is no hostPath: it would give a job the disk of its node.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from finetune_api import scalars as s
from finetune_api.base import Model, Rule
from finetune_api.spec.inputs import SecretRef

_SCHEME = "volume://"
_KINDS = ("claim", "csi", "image")


class ClaimVolumeSpec(Model):
    """Specifies a PersistentVolumeClaim of the job's namespace as a volume."""

    name: s.SecretName = Field(description="Name of the PersistentVolumeClaim.")
    read_only: bool = Field(
        default=True, description="Mount it read-only. output.uri can only name a volume that is writable."
    )


class CsiVolumeSpec(Model):
    """Specifies a volume that a CSI driver creates for each pod, and that is deleted with it, such
    as a mounted bucket. It is mounted read-only."""

    driver: s.SecretName = Field(
        description="Name of the driver, which must be among the chart's pods.allowedCsiDrivers."
    )
    attributes: Annotated[dict[s.LabelKey, Annotated[str, Field(max_length=1024)]], Field(max_length=32)] = Field(
        default_factory=dict, description="The driver's own parameters, such as the name of a bucket."
    )
    secret_ref: SecretRef | None = Field(
        default=None, description="Secret that the kubelet passes to the driver. Empty means none."
    )


class ImageVolumeSpec(Model):
    """Specifies the files of an OCI image as a volume. It is mounted read-only. It needs a cluster
    with image volumes, which Kubernetes enables by default as of 1.35."""

    reference: Annotated[str, Field(pattern=s.IMAGE_PATTERN, min_length=1, max_length=512)] = Field(
        description="Image, such as registry.example.com/models/llama:1, or with @sha256:… instead of a tag. It is "
        "pulled with the Secrets of the pods."
    )
    pull_policy: Literal["IfNotPresent", "Always", "Never"] = Field(
        default="IfNotPresent", description="IfNotPresent, Always or Never, as for containers."
    )


class VolumeSpec(Model):
    """Specifies a volume of the training pods, of one of three kinds. The preflight pod has it,
    too, if a URI names it."""

    name: Annotated[str, Field(pattern=s.VOLUME_NAME_PATTERN, max_length=50)] = Field(
        description="Name in volume:// URIs. The volume is mounted at /mnt/volumes/NAME."
    )
    claim: ClaimVolumeSpec | None = Field(default=None, description="A PersistentVolumeClaim.")
    csi: CsiVolumeSpec | None = Field(default=None, description="An ephemeral volume of a CSI driver.")
    image: ImageVolumeSpec | None = Field(default=None, description="The files of an OCI image.")

    rules = (
        Rule("name", "exactly one of claim, csi and image must be set",
             f"[{', '.join(f'has(self.{kind})' for kind in _KINDS)}].filter(x, x).size() == 1",
             lambda m: sum(getattr(m, kind) is not None for kind in _KINDS) == 1),
    )  # fmt: skip

    @property
    def writable(self) -> bool:
        """Whether the pods can write to it."""
        return self.claim is not None and not self.claim.read_only


Volumes = Annotated[tuple[VolumeSpec, ...], Field(max_length=8)]


def volume_name(uri: str | None) -> str | None:
    """Returns the name of the volume that a volume:// URI names; None for other URIs."""
    if uri is None or not uri.startswith(_SCHEME):
        return None
    return uri.removeprefix(_SCHEME).partition("/")[0]


def unique_volumes() -> Rule:
    """Returns the rule that each volume has a name of its own."""
    return Rule(
        "volumes", "lists a name twice; give each volume a name of its own",
        "self.volumes.all(v, self.volumes.exists_one(other, other.name == v.name))",
        lambda m: len({volume.name for volume in m.volumes}) == len(m.volumes),
    )  # fmt: skip


def uris_name_volumes() -> tuple[Rule, ...]:
    """Returns the rules of a spec that every volume:// URI names a volume that suits it."""
    listed = "names a volume that pod.volumes doesn't list; add it there"
    return (
        *(
            Rule(f"{path}.uri", listed, _cel(path, _exists("self." + path + ".uri")), _named(uri))
            for path, uri in _INPUTS
        ),
        Rule("dataset.sources", f"a uri {listed}",
             f"self.dataset.sources.all(source, {_exists('source.uri')})",
             lambda m: all(_is_listed(m, source.uri) for source in m.dataset.sources)),
        Rule("output.uri", "must name a claim of pod.volumes with readOnly: false; other volumes can't be written",
             _exists("self.output.uri", " && has(v.claim) && !v.claim.readOnly"),
             lambda m: _is_listed(m, m.output.uri, writable=True)),
    )  # fmt: skip


_INPUTS: tuple[tuple[str, Callable[[Any], str | None]], ...] = (
    ("model", lambda m: m.model.uri),
    ("model.checkpoint", lambda m: m.model.checkpoint.uri if m.model.checkpoint else None),
    ("dataset", lambda m: m.dataset.uri),
    ("dataset.validation", lambda m: m.dataset.validation.uri if m.dataset.validation else None),
    ("dataset.test", lambda m: m.dataset.test.uri if m.dataset.test else None),
)


def _named(uri: Callable[[Any], str | None]) -> Callable[[Any], bool]:
    return lambda m: _is_listed(m, uri(m))


def _is_listed(spec: Any, uri: str | None, *, writable: bool = False) -> bool:
    name = volume_name(uri)
    return name is None or any(volume.name == name and volume.writable >= writable for volume in spec.pod.volumes)


def _exists(uri: str, condition: str = "") -> str:
    """Returns the CEL of: the URI is no volume:// URI, or it names a listed volume."""
    name = f"{uri}.startsWith('{_SCHEME}' + v.name + '/')"
    return f"(!{uri}.startsWith('{_SCHEME}') || self.pod.volumes.exists(v, {name}{condition}))"


def _cel(path: str, rule: str) -> str:
    """Returns a rule about a URI that may be absent, as its section may be."""
    parts = path.split(".")
    sections = [".".join(parts[: end + 1]) for end in range(1, len(parts))]
    absent = [f"!has(self.{section})" for section in (*sections, f"{path}.uri")]
    return " || ".join((*absent, rule))
