"""Sends all requests to the API server, except kopf's watches.

Each method sends a request, counts it, and turns an error response into one of a few exceptions. It
decides nothing and never retries. No other module imports the client library.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import aiohttp
from kubernetes.aio import client, config

from finetune_api import names
from finetune_operator.kube import responses
from finetune_operator.kube.answers import (
    AlreadyExists,
    ApiError,
    Conflict,
    LargePage,
    NotFound,
    Refused,
    TooLarge,
    Unavailable,
    error_of,
    object_in,
)
from finetune_operator.kube.encoding import yaml_safe
from finetune_operator.kube.paths import path_of
from finetune_operator.kube.rate_limiter import ORDINARY, URGENT, RateLimiter
from finetune_operator.kube.server_clock import ServerClock

__all__ = [
    "AlreadyExists",
    "ApiError",
    "Conflict",
    "KubeClient",
    "NotFound",
    "Refused",
    "TooLarge",
    "Unavailable",
    "connect",
    "wait_until_available",
]

Raw = dict[str, Any]
Count = Callable[[str, str, str], None]
"""Counts a request by verb, resource and response code."""

_TIMEOUT = aiohttp.ClientTimeout(total=30, connect=10)
_LEASE_TIMEOUT = aiohttp.ClientTimeout(total=5, connect=3)
_PAGE_SIZE = 500
_APPLY = "application/apply-patch+yaml; charset=utf-8"
_CHILD_SELECTOR = f"app.kubernetes.io/managed-by={names.COMMON_LABELS['app.kubernetes.io/managed-by']}"

_UNTHROTTLED = ("leases", "tokenreviews")  # reviews have a budget of their own


class KubeClient:
    """Wraps one connection pool and one rate limiter, and a pool of its own for the Lease.

    Requests for Leases wait neither for a token of the limiter nor for a free connection, so that
    load on the operator can't take the Lease from it.
    """

    def __init__(
        self, api: client.ApiClient, limiter: RateLimiter, count: Count, lease_api: client.ApiClient | None = None
    ) -> None:
        self._api = api
        self._lease_api = lease_api or api
        self._limiter = limiter
        self._count = count
        self.clock = ServerClock()

    async def close(self) -> None:
        """Closes the connections."""
        await self._api.close()
        await self._lease_api.close()

    # -- reading -----------------------------------------------------------------------------------

    async def get(self, resource: str, namespace: str, name: str) -> Raw:
        """Reads the newest version of an object. Raises NotFound."""
        return await self._request("GET", resource, path_of(resource, namespace, name))

    async def matching(self, resource: str, namespace: str, matches: Callable[[Raw], bool]) -> list[Raw]:
        """Lists the newest versions of the namespace's objects, whatever their labels are."""
        return [item async for item in self.items(resource, namespace) if matches(item)]

    async def all_of(self, resource: str, namespaces: tuple[str, ...]) -> AsyncIterator[Raw]:
        """Lists FineTuneJobs, or their Jobs or pods, in the namespaces; empty means all."""
        selector = "" if resource == names.PLURAL else _CHILD_SELECTOR
        for namespace in namespaces or ("",):
            async for item in self.items(resource, namespace, selector):
                yield item

    async def items(self, resource: str, namespace: str, labels: str = "", fields: str = "") -> AsyncIterator[Raw]:
        """Lists objects page by page, of which large ones have fewer objects; `labels` and `fields`
        are selectors."""
        token, size = "", _PAGE_SIZE
        while True:
            query = {"limit": str(size), "labelSelector": labels, "fieldSelector": fields, "continue": token}
            try:
                page = await self._request("GET", resource, path_of(resource, namespace), query, verb="list")
            except LargePage:
                if size == 1:
                    raise
                size = max(1, size // 8)
                continue
            for item in page["items"]:
                yield item
            token = page["metadata"].get("continue", "")
            if not token:
                return

    async def schemas(self, api_version: str) -> Raw:
        """Returns the schemas that the API server publishes for an API version, by name."""
        document = await self._request("GET", "openapi", f"/openapi/v3/apis/{api_version}")
        schemas: Raw = document.get("components", {}).get("schemas", {})
        return schemas

    # -- writing -----------------------------------------------------------------------------------

    async def create(self, resource: str, manifest: Mapping[str, Any]) -> Raw:
        """Creates an object. Raises AlreadyExists if there is one of that name."""
        path = path_of(resource, manifest["metadata"]["namespace"])
        query = {"fieldManager": names.FIELD_MANAGER}
        return await self._request("POST", resource, path, query, dict(manifest), priority=URGENT)

    async def apply_status(self, namespace: str, name: str, resource_version: str, status: Raw) -> Raw:
        """Writes the complete status by server-side apply, as its only field manager.

        Raises Conflict if the object has changed since `resource_version`.
        """
        body = {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "metadata": {"name": name, "namespace": namespace, "resourceVersion": resource_version},
            "status": status,
        }
        path = path_of(names.PLURAL, namespace, name) + "/status"
        query = {"fieldManager": names.FIELD_MANAGER, "force": "true"}
        return await self._request("PATCH", f"{names.PLURAL}/status", path, query, yaml_safe(body), content_type=_APPLY)

    async def delete(self, resource: str, namespace: str, name: str, preconditions: Raw, wait: bool) -> Raw:
        """Deletes an object. With `wait` it stays visible until its dependents are gone.

        Raises Conflict if the preconditions (uid, resourceVersion) don't hold.
        """
        body = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "preconditions": preconditions,
            "propagationPolicy": "Foreground" if wait else "Background",
        }
        return await self._request("DELETE", resource, path_of(resource, namespace, name), {}, body)

    async def patch(self, resource: str, namespace: str, name: str, body: Raw) -> Raw:
        """Changes fields of an object by a merge patch.

        Raises Conflict if the resourceVersion in `body` is outdated.
        """
        path = path_of(resource, namespace, name)
        query = {"fieldManager": names.FIELD_MANAGER}
        content_type = "application/merge-patch+json"
        return await self._request("PATCH", resource, path, query, body, content_type=content_type)

    async def replace(self, resource: str, manifest: Mapping[str, Any]) -> Raw:
        """Replaces an object. Raises Conflict if the manifest's resourceVersion is outdated."""
        meta = manifest["metadata"]
        path = path_of(resource, meta["namespace"], meta["name"])
        return await self._request("PUT", resource, path, {}, dict(manifest), priority=URGENT)

    async def review_token(self, token: str, audience: str) -> Raw:
        """Has the API server review a bearer token. Returns the status of the TokenReview."""
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [audience]},
        }
        path = "/apis/authentication.k8s.io/v1/tokenreviews"
        response = await self._request("POST", "tokenreviews", path, {}, body)
        review: Raw = response.get("status", {})
        return review

    # -- one request -------------------------------------------------------------------------------

    async def _request(
        self,
        method: str,
        resource: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Raw | str | None = None,
        *,
        verb: str = "",
        content_type: str = "application/json",
        priority: int = ORDINARY,
    ) -> Raw:
        """Sends one request when the rate limit allows it. Returns the parsed response.

        Raises a subclass of ApiError.
        """
        api, timeout = (self._lease_api, _LEASE_TIMEOUT) if resource == "leases" else (self._api, _TIMEOUT)
        if resource not in _UNTHROTTLED:
            await self._limiter.acquire(priority)
        query_string = urlencode({key: value for key, value in (query or {}).items() if value})
        url = f"{api.configuration.host}{path}" + (f"?{query_string}" if query_string else "")
        headers = {"Accept": "application/json", "Content-Type": content_type, "User-Agent": names.FIELD_MANAGER}
        await api.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
        verb = verb or method.lower()
        sent = time.time()
        try:
            response = await api.call_api(method, url, headers, body, _request_timeout=timeout)
            content = await responses.read(response)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self._count(verb, resource, "error")
            raise Unavailable(0, type(error).__name__, f"{method} {path}: {error}") from error
        self._count(verb, resource, str(response.status))
        self.clock.observe(response.headers.get("Date"), sent, time.time())
        if content is None:
            raise LargePage(response.status, "TooLarge", f"{method} {path} answers more than the operator reads")
        if response.status < 300:
            return object_in(content)
        raise error_of(response.status, content)


async def connect(rate: float, burst: int, count: Count, kubeconfig: Path | None = None) -> KubeClient:
    """Connects to the API server with at most `rate` requests per second and bursts of `burst`.

    Credentials come from the kubeconfig if one is passed, else from the pod's service account, else
    from $KUBECONFIG or ~/.kube/config.
    """
    configuration = client.Configuration()
    in_cluster = "KUBERNETES_SERVICE_HOST" in os.environ
    if kubeconfig is None and in_cluster:
        config.load_incluster_config(client_configuration=configuration)
    else:
        file = str(kubeconfig) if kubeconfig else None
        await config.load_kube_config(config_file=file, client_configuration=configuration)
    configuration.connection_pool_maxsize = 100
    return KubeClient(client.ApiClient(configuration), RateLimiter(rate, burst), count, client.ApiClient(configuration))


async def wait_until_available(client: KubeClient, resource: str, namespaces: tuple[str, ...]) -> None:
    """Returns once the resource can be listed; the API server may start after the operator."""
    delay = 0.5
    while True:
        try:
            async for _ in client.items(resource, namespaces[0] if namespaces else ""):
                break
            return
        except Unavailable:
            await asyncio.sleep(delay)
            delay = min(delay * 2, 5.0)
