"""Decides which server an object store's client speaks to."""

from __future__ import annotations

from urllib.parse import urlsplit

from finetune_trainer.errors import RunError
from finetune_trainer.storage import allowed_endpoints


def chosen_endpoint(
    variable: str,
    secret: str | None,
    configured: str | None,
    environment: str | None,
    *,
    allow_http: bool,
    allowed: tuple[str, ...] | None,
    setting: str,
) -> str | None:
    """Returns the Secret's endpoint, else the administrator's, else the environment's.

    `variable` is the name that the Secret and the environment have for it, and `setting` the part
    of the chart's values. Raises RunError(InvalidConfig) for an endpoint that the
    administrator doesn't allow.
    """
    endpoint = secret or configured or environment
    if endpoint and endpoint.lower().startswith("http://") and not allow_http:
        source = f"the Secret's {variable}" if secret else f"the {setting} endpoint"
        raise RunError(
            "InvalidConfig",
            f"{source} {endpoint} isn't encrypted, which the administrator doesn't allow "
            f"(storage.{setting.lower()}.allowHttp); use an https:// endpoint",
        )
    if secret:
        allowed_endpoints.check(secret, variable, configured, allowed, setting)
    return endpoint or None


def belongs_to(endpoint: str, domains: tuple[str, ...]) -> bool:
    """Whether an endpoint is an encrypted one of these domains."""
    parts = urlsplit(endpoint)
    host = parts.hostname or ""
    return parts.scheme.lower() == "https" and any(host == domain or host.endswith(f".{domain}") for domain in domains)
