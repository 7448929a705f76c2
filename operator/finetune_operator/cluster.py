"""cluster: all conversation with the API server but kopf's watches. The only importer of the client library.

Called by reconcile, sweep, words, recorder, leader and progress. Decides nothing: it sends one request, counts it, and
turns a refusal into one of few exceptions.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import aiohttp
from kubernetes.aio import client, config

from finetune_api import names
from finetune_operator.throttle import ORDINARY, URGENT, Throttle

Raw = dict[str, Any]
Count = Callable[[str, str, str], None]
"""verb, resource, code."""

_TIMEOUT = aiohttp.ClientTimeout(total=30, connect=10)
_PAGE = 500
_CHILD_SELECTOR = f"app.kubernetes.io/managed-by={names.COMMON_LABELS['app.kubernetes.io/managed-by']}"

_GROUPS = {
    names.PLURAL: f"/apis/{names.API_VERSION}",
    "jobs": "/apis/batch/v1",
    "pods": "/api/v1",
    "services": "/api/v1",
    "events": "/api/v1",
    "leases": "/apis/coordination.k8s.io/v1",
}


class ApiError(Exception):
    """The API server refused; `message` are its own words."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(f"{code} {reason}: {message}")
        self.code = code
        self.reason = reason
        self.message = message


class NotFound(ApiError):
    """404: the object, or its namespace, is gone."""


class AlreadyExists(ApiError):
    """409: the name is taken."""


class Conflict(ApiError):
    """409: what the request was based on is out of date."""


class Refused(ApiError):
    """4xx: the same request will be refused again, unless something else changes."""


class Unavailable(ApiError):
    """The server doesn't answer, or is too busy: the same request may succeed later."""


class Cluster:
    """One connection pool, one throttle."""

    def __init__(self, api: client.ApiClient, throttle: Throttle, count: Count) -> None:
        self._api = api
        self._throttle = throttle
        self._count = count

    async def close(self) -> None:
        await self._api.close()

    # -- reading ---------------------------------------------------------------------------------------------------

    async def get(self, resource: str, namespace: str, name: str) -> Raw:
        """Fresh, from the store. Raises NotFound."""
        return await self._request("GET", resource, _path(resource, namespace, name))

    async def children(self, resource: str, namespace: str, owner_uid: str) -> list[Raw]:
        """Jobs or pods labelled as a FineTuneJob's, fresh."""
        selector = f"{names.LABEL_JOB_UID}={owner_uid}"
        return [item async for item in self.items(resource, namespace, selector)]

    async def all_of(self, resource: str, namespaces: tuple[str, ...]) -> list[Raw]:
        """FineTuneJobs, or all children of FineTuneJobs, in the namespaces (empty: everywhere)."""
        selector = "" if resource == names.PLURAL else _CHILD_SELECTOR
        return [item for namespace in (namespaces or ("",)) async for item in self.items(resource, namespace, selector)]

    async def items(self, resource: str, namespace: str, labels: str = "", fields: str = "") -> AsyncIterator[Raw]:
        """A list, page by page."""
        token = ""
        while True:
            query = {"limit": str(_PAGE), "labelSelector": labels, "fieldSelector": fields, "continue": token}
            page = await self._request("GET", resource, _path(resource, namespace), query, verb="list")
            for item in page["items"]:
                yield item
            token = page["metadata"].get("continue", "")
            if not token:
                return

    # -- writing ---------------------------------------------------------------------------------------------------

    async def create(self, resource: str, manifest: Mapping[str, Any]) -> Raw:
        """Raises AlreadyExists; never changes what is there."""
        path = _path(resource, manifest["metadata"]["namespace"])
        query = {"fieldManager": names.FIELD_MANAGER}
        return await self._request("POST", resource, path, query, dict(manifest), priority=URGENT)

    async def apply_status(self, namespace: str, name: str, resource_version: str, status: Raw) -> Raw:
        """Server-side apply of the whole status, by its only owner. Raises Conflict when the object has changed."""
        body = {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "metadata": {"name": name, "namespace": namespace, "resourceVersion": resource_version},
            "status": status,
        }
        path = _path(names.PLURAL, namespace, name) + "/status"
        query = {"fieldManager": names.FIELD_MANAGER, "force": "true"}
        content_type = "application/apply-patch+yaml"
        return await self._request("PATCH", f"{names.PLURAL}/status", path, query, body, content_type=content_type)

    async def delete(self, resource: str, namespace: str, name: str, preconditions: Raw, wait: bool) -> Raw:
        """With `wait` it stays visible until its dependents are gone. Raises Conflict when it has changed."""
        body = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "preconditions": preconditions,
            "propagationPolicy": "Foreground" if wait else "Background",
        }
        return await self._request("DELETE", resource, _path(resource, namespace, name), {}, body)

    async def replace(self, resource: str, manifest: Mapping[str, Any]) -> Raw:
        """Raises Conflict when the manifest's resourceVersion is out of date."""
        meta = manifest["metadata"]
        path = _path(resource, meta["namespace"], meta["name"])
        return await self._request("PUT", resource, path, {}, dict(manifest), priority=URGENT)

    async def review_token(self, token: str, audience: str) -> Raw:
        """The status of a TokenReview."""
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [audience]},
        }
        path = "/apis/authentication.k8s.io/v1/tokenreviews"
        answer = await self._request("POST", "tokenreviews", path, {}, body)
        review: Raw = answer.get("status", {})
        return review

    # -- one request -----------------------------------------------------------------------------------------------

    async def _request(
        self,
        method: str,
        resource: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Raw | None = None,
        *,
        verb: str = "",
        content_type: str = "application/json",
        priority: int = ORDINARY,
    ) -> Raw:
        await self._throttle.acquire(priority)
        text = urlencode({key: value for key, value in (query or {}).items() if value})
        url = f"{self._api.configuration.host}{path}" + (f"?{text}" if text else "")
        headers = {"Accept": "application/json", "Content-Type": content_type, "User-Agent": names.FIELD_MANAGER}
        await self._api.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
        verb = verb or method.lower()
        try:
            answer = await self._api.call_api(method, url, headers, body, _request_timeout=_TIMEOUT)
            content = await answer.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self._count(verb, resource, "error")
            raise Unavailable(0, type(error).__name__, f"{method} {path}: {error}") from error
        self._count(verb, resource, str(answer.status))
        if answer.status < 300:
            value: Raw = json.loads(content)
            return value
        raise _error(answer.status, content)


async def connect(rate: float, burst: int, count: Count, kubeconfig: Path | None = None) -> Cluster:
    """By the given kubeconfig, else by the pod's service account, else by $KUBECONFIG or ~/.kube/config."""
    configuration = client.Configuration()
    in_cluster = "KUBERNETES_SERVICE_HOST" in os.environ
    if kubeconfig is None and in_cluster:
        config.load_incluster_config(client_configuration=configuration)
    else:
        file = str(kubeconfig) if kubeconfig else None
        await config.load_kube_config(config_file=file, client_configuration=configuration)
    configuration.connection_pool_maxsize = 100
    return Cluster(client.ApiClient(configuration), Throttle(rate, burst), count)


async def wait_until_answering(cluster: Cluster, resource: str, namespaces: tuple[str, ...]) -> None:
    """Returns once the resource can be listed; the API server may come up after us."""
    delay = 0.5
    while True:
        try:
            async for _ in cluster.items(resource, namespaces[0] if namespaces else ""):
                break
            return
        except Unavailable:
            await asyncio.sleep(delay)
            delay = min(delay * 2, 5.0)


def _path(resource: str, namespace: str, name: str = "") -> str:
    group = _GROUPS[resource]
    scope = f"/namespaces/{quote(namespace)}" if namespace else ""
    return f"{group}{scope}/{resource}" + (f"/{quote(name)}" if name else "")


def _error(code: int, content: bytes) -> ApiError:
    try:
        status = json.loads(content)
        reason, message = str(status.get("reason", "")), str(status.get("message", ""))
    except (ValueError, AttributeError):
        reason, message = "", content[:500].decode(errors="replace")
    if code == 404:
        return NotFound(code, reason, message)
    if code == 409:
        return (AlreadyExists if reason == "AlreadyExists" else Conflict)(code, reason, message)
    if code == 429 or code >= 500:
        return Unavailable(code, reason, message)
    return Refused(code, reason, message)
