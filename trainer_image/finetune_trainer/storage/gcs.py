"""Decides how gs:// buckets are accessed. The module is pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from finetune_api.messages.run import GcsConfig
from finetune_api.names import SECRET_GOOGLE_KEYS
from finetune_trainer.errors import RunError
from finetune_trainer.storage.endpoints import belongs_to, chosen_endpoint

_KEY, _ENDPOINT = SECRET_GOOGLE_KEYS
_GOOGLE = ("googleapis.com",)
_IDENTITY_VARIABLES = (
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GOOGLE_SERVICE_ACCOUNT",
    "GOOGLE_SERVICE_ACCOUNT_PATH",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
    "GOOGLE_BEARER_TOKEN",
    "GCE_METADATA_HOST",
)
# obstore reads these itself, and uses them instead of a key, or refuses to choose.
_RIVALS = ("GOOGLE_BEARER_TOKEN", "GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH", "SERVICE_ACCOUNT")
_ACCOUNT_FIELDS = ("client_email", "private_key", "private_key_id")


def access_options(
    config: GcsConfig, secret: Mapping[str, str] | None, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Returns the keyword arguments of GCSStore.

    The Secret has the JSON key of a service account. Without a Secret, obstore finds the
    credentials itself: those that GOOGLE_APPLICATION_CREDENTIALS names, else the pod's identity, by
    the metadata server. If the endpoint isn't Google's and there are none, access is anonymous. The
    token of an identity is sent only to Google or to the administrator's endpoint, never to one
    that a Secret names.

    Raises RunError(CredentialsMissing) if the Secret lacks a usable key, and
    RunError(InvalidConfig) for an unencrypted endpoint that the administrator doesn't allow.
    """
    values = {key: secret[key] for key in SECRET_GOOGLE_KEYS if secret.get(key)} if secret else {}
    endpoint = chosen_endpoint(
        _ENDPOINT, values.get(_ENDPOINT), config.endpoint, environment.get(_ENDPOINT),
        allow_http=config.allow_http, setting="GCS",
    )  # fmt: skip
    options: dict[str, Any] = {"client_options": {"allow_http": config.allow_http}}
    if endpoint:
        options["base_url"] = endpoint.rstrip("/")
    if _KEY in values:
        rival = next((name for name in _RIVALS if environment.get(name)), None)
        if rival:
            raise RunError(
                "InvalidConfig", f"the pod's {rival} would be used instead of the Secret; remove it from the image"
            )
        return {**options, "service_account_key": _service_account(values[_KEY])}
    is_google = endpoint is None or belongs_to(endpoint, _GOOGLE)
    if secret is not None and not (set(secret) == {_ENDPOINT} and is_google):
        raise RunError(
            "CredentialsMissing",
            f"the Secret has no key {_KEY}; add it, with the JSON key of a service account. For the pod's identity, "
            "leave out credentialsRef",
        )
    if not is_google and not any(environment.get(name) for name in _IDENTITY_VARIABLES):
        options["skip_signature"] = True
    return options


def _service_account(text: str) -> str:
    """Returns the fields of a service account's key that obstore needs.

    A key could also name another server (`gcs_base_url`), which only an endpoint may do.
    """
    remedy = f"put the JSON key of a service account into {_KEY}, or leave out credentialsRef for the pod's identity"
    try:
        key = json.loads(text)
    except ValueError:
        raise RunError("CredentialsMissing", f"the Secret's {_KEY} isn't JSON; {remedy}") from None
    kind = key.get("type") if isinstance(key, dict) else None
    if kind != "service_account":
        raise RunError("CredentialsMissing", f"the Secret's {_KEY} has the type {kind!s:.40}; {remedy}")
    lacking = [name for name in _ACCOUNT_FIELDS if not isinstance(key.get(name), str) or not key[name]]
    if lacking:
        raise RunError("CredentialsMissing", f"the Secret's {_KEY} lacks {', '.join(lacking)}; {remedy}")
    return json.dumps({name: key[name] for name in ("type", *_ACCOUNT_FIELDS)})
