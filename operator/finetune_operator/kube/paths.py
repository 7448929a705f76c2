"""Knows the paths of the resources that the operator reads and writes."""

from __future__ import annotations

from urllib.parse import quote

from finetune_api import names

_API_PATHS = {
    names.PLURAL: f"/apis/{names.API_VERSION}",
    "jobs": "/apis/batch/v1",
    "pods": "/api/v1",
    "services": "/api/v1",
    "serviceaccounts": "/api/v1",
    "persistentvolumeclaims": "/api/v1",
    "networkpolicies": "/apis/networking.k8s.io/v1",
    "events": "/api/v1",
    "leases": "/apis/coordination.k8s.io/v1",
}


def path_of(resource: str, namespace: str, name: str = "") -> str:
    """Returns the path of one object, or of all of a namespace (empty means every namespace)."""
    prefix = _API_PATHS[resource]
    scope = f"/namespaces/{quote(namespace)}" if namespace else ""
    return f"{prefix}{scope}/{resource}" + (f"/{quote(name)}" if name else "")
