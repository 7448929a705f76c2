"""Decides which server of an object store a Secret may name.

A pod reaches servers that its owner doesn't: services of the cluster, and the metadata service of
the node. What such a server answers would become rows, which the owner of the job can read.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

from finetune_api.addresses import is_public
from finetune_api.destinations import is_listed_url
from finetune_trainer.errors import RunError


def addresses(host: str) -> Iterable[str]:
    """Resolves a name. Returns nothing if that fails: a client then fails as well."""
    try:
        return {str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):  # a name may be no name
        return ()


def check(
    endpoint: str,
    variable: str,
    configured: str | None,
    allowed: tuple[str, ...] | None,
    setting: str,
    resolve: Callable[[str], Iterable[str]] = addresses,
) -> None:
    """Checks the endpoint that a Secret names as `variable`.

    `configured` is the administrator's own, and `setting` the part of the chart's values. Raises
    RunError(InvalidConfig) if it isn't allowed.
    """
    if allowed is None or "*" in allowed or is_listed_url(endpoint, (configured or "", *allowed)):
        return
    subject = f"the Secret's {variable} {endpoint}"
    remedy = (
        f"have it added to the operator's storage.{setting.lower()}.allowedEndpoints, or remove the key from the Secret"
    )
    if allowed:
        raise RunError(
            "InvalidConfig",
            f"{subject} is not among the servers that the administrator allows ({', '.join(allowed)}); {remedy}",
        )
    host = _host(endpoint)
    if host is None or any(not is_public(address) for address in resolve(host)):
        raise RunError(
            "InvalidConfig",
            f"{subject} has no public address, and may be a service of the cluster or the node; {remedy}",
        )


def _host(endpoint: str) -> str | None:
    try:
        return urlsplit(endpoint).hostname
    except ValueError:
        return None
