"""Decides which server an object store's client speaks to."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from finetune_trainer.errors import RunError
from finetune_trainer.storage import allowed_endpoints

# Scheme, host, port and path. A user name, a zone or a query would be sent on, or shown.
_PLAIN = re.compile(r"https?://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?(/[A-Za-z0-9._~/-]*)?", re.IGNORECASE)


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
    administrator doesn't allow, or that isn't a plain URL.
    """
    if secret and not _PLAIN.fullmatch(secret):
        raise RunError(
            "InvalidConfig",
            f"the Secret's {variable} isn't a URL such as https://host:port/path, without a user name, ? and #; "
            "correct it",
        )
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
