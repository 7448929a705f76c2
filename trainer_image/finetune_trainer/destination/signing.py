"""Signs manifests, and decides which of those in the destination are believed.

Whoever can write to the bucket can write any manifest. Each pod that leads a group therefore makes
a key that never leaves its memory, reports the public half to the operator, and signs what it
stores. The operator keeps the public keys in status and hands them to the next pods, so a manifest
is proven if one of these keys has signed it. Nothing that is kept anywhere is secret.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from finetune_api.messages.manifest import Manifest


class Signer:
    """Holds the key of this pod."""

    def __init__(self) -> None:
        self._key = Ed25519PrivateKey.generate()

    @property
    def public(self) -> str:
        """The public key in base64, by which others verify what this pod has signed."""
        return base64.b64encode(self._key.public_key().public_bytes_raw()).decode()

    def sign(self, manifest: Manifest) -> Manifest:
        """Returns the manifest with its signature."""
        as_read = Manifest.model_validate_json(manifest.model_dump_json(by_alias=True, exclude_none=True))
        return manifest.model_copy(update={"signature": self.signature(as_read.signed_bytes)})

    def signature(self, data: bytes) -> str:
        """Returns the signature of bytes, in base64."""
        return base64.b64encode(self._key.sign(data)).decode()


@dataclass(frozen=True)
class Trust:
    """Says which manifests of the job's own count.

    `signers` are the public keys that the operator vouches for; None means that there is no
    operator, so that everything counts. `later` asks the operator for the keys that it has by now,
    which may take a while. With `unrecorded`, everything counts as long as no key is known at all:
    earlier attempts ran, but none of their reports has reached the operator.
    """

    signers: tuple[str, ...] | None
    later: Callable[[], tuple[str, ...]] = tuple
    unrecorded: bool = False

    def believes(self, manifest: Manifest) -> bool:
        """Whether a manifest is proven, or needs no proof."""
        if self.signers is None or is_signed(manifest, self.signers):
            return True
        signers = self.later()
        if is_signed(manifest, signers):
            return True
        return self.unrecorded and not self.signers and not signers


EVERYTHING = Trust(None)


def is_signed(manifest: Manifest, signers: Iterable[str]) -> bool:
    """Whether one of the public keys has signed the manifest."""
    return is_signature(manifest.signature, manifest.signed_bytes, signers)


def is_signature(signature: str | None, data: bytes, signers: Iterable[str]) -> bool:
    """Whether one of the public keys has made this signature of the bytes."""
    if signature is None:
        return False
    try:
        raw = base64.b64decode(signature, validate=True)
    except (binascii.Error, ValueError):
        return False
    return any(_verifies(public, raw, data) for public in signers)


def _verifies(public: str, signature: bytes, data: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(base64.b64decode(public, validate=True)).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True
