"""Keeps the client of an object store from following redirects to other servers.

A store may answer with a redirect to any address, also to one that only this pod can reach, such as
a cloud's metadata, and the client has no option against that. It has one for a proxy with
exceptions. The exceptions are the servers that the client needs, and the proxy refuses every
connection, so nothing is ever sent to another server.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal
from urllib.parse import urlsplit

Scheme = Literal["s3", "gs", "az"]

_SERVICES: dict[str, tuple[str, ...]] = {
    "s3": ("amazonaws.com", "amazonaws.com.cn", "api.aws"),
    "gs": ("googleapis.com",),
    "az": ("core.windows.net", "core.usgovcloudapi.net", "core.chinacloudapi.cn", "storage.azure.net"),
}
_METADATA = "169.254.169.254"
_IDENTITIES: dict[str, tuple[str, ...]] = {
    "s3": ("amazonaws.com", "amazonaws.com.cn", "api.aws", _METADATA, "fd00:ec2::254", "169.254.170.2",
           "169.254.170.23", "fd00:ec2::23"),
    "gs": ("googleapis.com", _METADATA, "metadata.google.internal"),
    "az": ("login.microsoftonline.com", "login.microsoftonline.us", "login.chinacloudapi.cn", _METADATA),
}  # fmt: skip
_IDENTITY_URLS: dict[str, tuple[str, ...]] = {
    "s3": ("AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_ENDPOINT_URL_STS", "AWS_METADATA_ENDPOINT"),
    "gs": ("GCE_METADATA_HOST", "GCE_METADATA_ROOT", "GCE_METADATA_IP"),
    "az": ("IDENTITY_ENDPOINT", "MSI_ENDPOINT"),
}
_ENDPOINTS, _AUTHORITY = ("endpoint", "base_url"), "authority_host"
_KEYS: dict[str, tuple[str, ...]] = {
    "s3": ("access_key_id", "skip_signature"),
    "gs": ("skip_signature",),  # a service account's key is exchanged for a token
    "az": ("account_key", "sas_key", "skip_signature"),
}
"""Options with which the client asks no other server for credentials."""
_PROXIES = tuple(name for upper in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY") for name in (upper, upper.lower()))


def client_options(scheme: str, options: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """Returns the client's options, with those that confine it to the servers that it needs.

    `options` are those of the store. With a proxy of the administrator's, it decides instead.
    """
    client = dict(options.get("client_options", {}))
    urls = [str(options[name]) for name in (*_ENDPOINTS, _AUTHORITY) if options.get(name)]
    if urls and all(url.lower().startswith("https://") for url in urls):
        client["allow_http"] = False  # nor a redirect to a server without encryption
    if any(environment.get(name) for name in _PROXIES):
        return client
    hosts = ",".join(dict.fromkeys(allowed_hosts(scheme, options, environment)))
    return {**client, "proxy_url": f"http://{refusing_address()}", "proxy_excludes": hosts}


def allowed_hosts(scheme: str, options: Mapping[str, Any], environment: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the servers of the store and, unless there are keys, of its credentials. A domain
    stands for all of its hosts, too."""
    urls = [str(options[name]) for name in (*_ENDPOINTS, _AUTHORITY) if options.get(name)]
    own = _SERVICES[scheme] if not any(options.get(name) for name in _ENDPOINTS) else ()
    needs_no_other = any(options.get(name) for name in _KEYS[scheme])
    if scheme == "s3" and environment.get("AWS_ACCESS_KEY_ID"):
        needs_no_other = True
    if needs_no_other:
        return (*map(_host, urls), *own)
    named = [environment[name] for name in _IDENTITY_URLS[scheme] if environment.get(name)]
    return (*map(_host, (*urls, *named)), *own, *_IDENTITIES[scheme])


@cache
def refusing_address() -> str:
    """Returns an address of this machine that refuses connections as long as the process lives."""
    _reserved.bind(("127.0.0.1", 0))
    host, port = _reserved.getsockname()
    return f"{host}:{port}"


_reserved = socket.socket()  # bound, so that nobody else listens there; it never listens itself


def is_redirect(error: Exception) -> bool:
    """Whether a client's error is that the store has redirected it to another server."""
    return refusing_address() in str(error)


def _host(url: str) -> str:
    return urlsplit(url if "//" in url else f"//{url}").hostname or ""
