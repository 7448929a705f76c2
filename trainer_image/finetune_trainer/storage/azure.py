"""Decides how az:// containers are accessed. The module is pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from finetune_api.messages.run import AzureConfig
from finetune_api.names import SECRET_AZURE_KEYS
from finetune_trainer.errors import RunError
from finetune_trainer.storage.endpoints import belongs_to, chosen_endpoint

_ACCOUNT = ("AZURE_STORAGE_ACCOUNT", "AZURE_STORAGE_ACCOUNT_NAME")
_ACCOUNT_KEY = ("AZURE_STORAGE_KEY", "AZURE_STORAGE_ACCOUNT_KEY")
_SAS = "AZURE_STORAGE_SAS_TOKEN"
_ENDPOINT = "AZURE_STORAGE_ENDPOINT"
_TENANT, _CLIENT, _CLIENT_SECRET = "AZURE_TENANT_ID", "AZURE_CLIENT_ID", "AZURE_CLIENT_SECRET"
_AUTHORITY = "AZURE_AUTHORITY_HOST"
_TOKEN_FILE = "AZURE_FEDERATED_TOKEN_FILE"  # noqa: S105 (a variable's name)
_NO_KEYS = frozenset((*_ACCOUNT, _ENDPOINT, _TENANT, _CLIENT))
"""Keys of a Secret that say where a container is and which identity is used, but not its proof."""
_AZURE = (
    "core.windows.net",
    "core.usgovcloudapi.net",
    "core.chinacloudapi.cn",
    "storage.azure.net",
)
_ACCOUNT_NAME = re.compile(r"[a-z0-9]{3,24}")


def access_options(
    config: AzureConfig, secret: Mapping[str, str] | None, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Returns the keyword arguments of AzureStore.

    The credentials are the Secret's, else the environment's, else the pod's identity; of several
    kinds, the account's key is used first, then a shared access signature, then a client secret.
    If there are none and the endpoint isn't Azure's, access is anonymous. Account and endpoint are
    the Secret's, else the administrator's, else the environment's. The token of an identity is sent
    only to Azure or to the administrator's endpoint, never to one that a Secret names.

    Raises RunError(CredentialsMissing) if something is missing, and RunError(InvalidConfig) for an
    unencrypted endpoint that the administrator doesn't allow.
    """
    values = {key: secret[key] for key in SECRET_AZURE_KEYS if secret.get(key)} if secret else {}
    endpoint = chosen_endpoint(
        _ENDPOINT, values.get(_ENDPOINT), config.endpoint, environment.get(_ENDPOINT),
        allow_http=config.allow_http,
        allowed=config.allowed_endpoints, setting="Azure",
    )  # fmt: skip
    # A client secret goes there.
    chosen_endpoint(
        _AUTHORITY, values.get(_AUTHORITY), None, None,
        allow_http=config.allow_http, allowed=config.allowed_endpoints, setting="Azure",
    )  # fmt: skip
    options: dict[str, Any] = {
        "account_name": _account(_first(values, _ACCOUNT) or config.account or _first(environment, _ACCOUNT)),
        "client_options": {"allow_http": config.allow_http},
    }
    if endpoint:
        options["endpoint"] = endpoint.rstrip("/")
    own = _proof(values, "the Secret")
    if own:
        return {**options, **own}
    is_azure = endpoint is None or belongs_to(endpoint, _AZURE)
    is_foreign = _ENDPOINT in values and not is_azure
    if secret is not None and (not secret or is_foreign or not _NO_KEYS.issuperset(secret)):
        raise RunError(
            "CredentialsMissing",
            f"the Secret has neither {_ACCOUNT_KEY[0]} nor {_SAS} nor {_CLIENT_SECRET}; add one of them. For the pod's "
            f"identity, a Secret may have just {_ACCOUNT[0]}, {_CLIENT} and {_TENANT}",
        )
    return {**options, **(_proof(environment, "the environment") or _identity(values, environment, is_azure))}


def _first(values: Mapping[str, str], names: tuple[str, ...]) -> str:
    return next((values[name] for name in names if values.get(name)), "")


def _account(name: str) -> str:
    """Returns the name of the storage account, which becomes a part of the server's name."""
    if not name:
        raise RunError(
            "CredentialsMissing",
            f"there is no name of a storage account; add {_ACCOUNT[0]} to the Secret, or let the administrator set "
            "storage.azure.account",
        )
    if not _ACCOUNT_NAME.fullmatch(name):
        raise RunError(
            "InvalidConfig",
            f"{_ACCOUNT[0]} is {name[:60]!r}; give the name of a storage account, which has 3 to 24 lowercase letters "
            "and digits",
        )
    return name


def _proof(values: Mapping[str, str], source: str) -> dict[str, Any] | None:
    """Returns obstore's options for a key, a signature or a client secret, or None."""
    if key := _first(values, _ACCOUNT_KEY):
        return {"credential_type": "access_key", "account_key": key}
    if signature := values.get(_SAS):
        return {"credential_type": "sas_token", "sas_key": signature}
    if not values.get(_CLIENT_SECRET):
        return None
    return {
        "credential_type": "client_secret",
        "client_secret": values[_CLIENT_SECRET],
        **_application(values, source),
    }


def _identity(values: Mapping[str, str], environment: Mapping[str, str], is_azure: bool) -> dict[str, Any]:
    """Returns obstore's options for the pod's identity: that of AKS, else its virtual machine's."""
    chosen = {**environment, **{key: values[key] for key in (_TENANT, _CLIENT) if values.get(key)}}
    if chosen.get(_TOKEN_FILE):
        application = _application(chosen, "the pod")
        return {"credential_type": "workload_identity", "federated_token_file": chosen[_TOKEN_FILE], **application}
    if not is_azure:
        return {"skip_signature": True}
    client = {"client_id": chosen[_CLIENT]} if chosen.get(_CLIENT) else {}
    return {"credential_type": "managed_identity", **client}


def _application(values: Mapping[str, str], source: str) -> dict[str, Any]:
    """Returns the application that signs in. Raises RunError if its tenant or client is missing."""
    lacking = [name for name in (_TENANT, _CLIENT) if not values.get(name)]
    if lacking:
        raise RunError("CredentialsMissing", f"{source} has no {' and no '.join(lacking)}; add it")
    options = {"tenant_id": values[_TENANT], "client_id": values[_CLIENT]}
    if values.get(_AUTHORITY):
        options["authority_host"] = values[_AUTHORITY].rstrip("/")  # AKS ends it with a slash
    return options
