"""Decides how s3:// buckets are accessed. The module is pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from finetune_api.messages.run import S3Config
from finetune_api.names import SECRET_AWS_KEYS
from finetune_trainer.errors import RunError
from finetune_trainer.storage.endpoints import chosen_endpoint

_DEFAULT_REGION = "us-east-1"
_REGION = re.compile(r"[A-Za-z0-9_-]{1,64}")  # without an endpoint, it is a part of the server's name
_PLACE_KEYS = frozenset(("AWS_REGION", "AWS_ENDPOINT_URL"))
"""Keys of a Secret that say where a bucket is, not who may access it."""
_IDENTITY_VARIABLES = (
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)


def access_options(
    config: S3Config, secret: Mapping[str, str] | None, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Returns the keyword arguments of S3Store.

    The keys are the Secret's, else those of the environment or the pod's identity, which obstore
    reads itself. If there are none and the endpoint isn't AWS, access is anonymous. Endpoint and
    region are the Secret's, else the administrator's, else the environment's; a Secret may have
    only these two, for use with the pod's identity. Raises RunError(CredentialsMissing) if the
    Secret lacks a key, and RunError(InvalidConfig) for an unencrypted endpoint that the
    administrator doesn't allow.
    """
    values = {key: secret[key] for key in SECRET_AWS_KEYS if secret.get(key)} if secret else {}
    endpoint = chosen_endpoint(
        "AWS_ENDPOINT_URL", values.get("AWS_ENDPOINT_URL"), config.endpoint, environment.get("AWS_ENDPOINT_URL"),
        allow_http=config.allow_http,
        allowed=config.allowed_endpoints, setting="S3",
    )  # fmt: skip
    options: dict[str, Any] = {
        "region": _region(values) or config.region or _region_of(environment),
        "client_options": {"allow_http": config.allow_http},
    }
    if endpoint:
        options["endpoint"] = endpoint
    pair = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    if any(key in values for key in pair):
        for key in pair:
            if key not in values:
                raise RunError("CredentialsMissing", f"the Secret has no key {key}; add it, both are needed")
        options["access_key_id"], options["secret_access_key"] = (values[key] for key in pair)
        if "AWS_SESSION_TOKEN" in values:
            options["session_token"] = values["AWS_SESSION_TOKEN"]
        return options
    anonymous = endpoint and not any(environment.get(name) for name in (pair[0], *_IDENTITY_VARIABLES))
    if secret is not None and (anonymous or not secret or not _PLACE_KEYS.issuperset(secret)):
        raise RunError(
            "CredentialsMissing",
            f"the Secret has neither {pair[0]} nor {pair[1]}; add both. Only where the pod has an identity, a Secret "
            f"may do without them, and have just {' or '.join(sorted(_PLACE_KEYS, reverse=True))}",
        )
    if anonymous:
        options["skip_signature"] = True
    return options


def _region(values: Mapping[str, str]) -> str:
    """Returns the region of a Secret, "" if it has none. Raises RunError(InvalidConfig)."""
    region = values.get("AWS_REGION", "")
    if region and not _REGION.fullmatch(region):
        raise RunError(
            "InvalidConfig",
            "the Secret's AWS_REGION isn't a region such as us-east-1, of letters, digits and dashes; correct it",
        )
    return region


def _region_of(environment: Mapping[str, str]) -> str:
    return environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or _DEFAULT_REGION
