"""Putting things into a cluster: the operator by Helm, a namespace with its Secret, model and data into S3.

Called by demo.story and tests/e2e. Each function does one thing and may be repeated.
"""

from __future__ import annotations

import json
import subprocess
import urllib.parse
from pathlib import Path
from typing import Any

import obstore
from obstore.store import S3Store

from demo.clusters import ROOT, Place

OPERATOR_NAMESPACE = "finetune-system"


def s3_store(place: Place, bucket: str) -> S3Store:
    """A bucket of the cluster's object storage."""
    return S3Store(
        bucket,
        endpoint=place.s3_endpoint,
        access_key_id=place.s3_access_key,
        secret_access_key=place.s3_secret_key,
        region=place.s3_region,
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )


def put_folder(store: S3Store, folder: Path, prefix: str) -> int:
    """Copies a folder's files under a prefix, those of the same size excepted; returns the bytes copied."""
    there = {meta["path"]: meta["size"] for batch in obstore.list(store, prefix=prefix) for meta in batch}
    copied = 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        key = f"{prefix}/{path.relative_to(folder)}"
        size = path.stat().st_size
        if there.get(key) != size:
            obstore.put(store, key, path)
            copied += size
    return copied


def operator(place: Place, operator_image: str, trainer_image: str, *settings: str) -> None:
    """helm upgrade --install, and wait until it is ready. Raises RuntimeError with Helm's words."""
    repository, _, tag = operator_image.rpartition(":")
    trainer_repository, _, trainer_tag = trainer_image.rpartition(":")
    command = [
        place.helm, "upgrade", "--install", "finetune-operator", str(ROOT / "charts/finetune-operator"),
        "--kubeconfig", place.kubeconfig, "--namespace", OPERATOR_NAMESPACE, "--create-namespace",
        "--set", f"image.repository={repository}", "--set", f"image.tag={tag}",
        "--set", f"trainer.image.repository={trainer_repository}", "--set", f"trainer.image.tag={trainer_tag}",
        "--set", f"storage.s3.endpoint={place.s3_endpoint}", "--set", "storage.s3.allowHttp=true",
        "--set", "resources.requests.cpu=50m",
        *(word for setting in settings for word in ("--set", setting)),
        "--wait", "--timeout", "120s",
    ]  # fmt: skip
    done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"helm: {done.stderr.strip()}")


def namespace(place: Place, name: str) -> None:
    """A namespace that admits restricted pods only, with the Secret `s3` and, where MLflow runs, its Service."""
    objects = {
        "apiVersion": "v1",
        "kind": "List",
        "items": [
            {
                "apiVersion": "v1",
                "kind": "Namespace",
                "metadata": {"name": name, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
            },
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": "s3", "namespace": name},
                "stringData": {
                    "AWS_ACCESS_KEY_ID": place.s3_access_key,
                    "AWS_SECRET_ACCESS_KEY": place.s3_secret_key,
                },
            },
            *(_service("mlflow", name, place.mlflow_url) if place.mlflow_url else ()),
        ],
    }
    place.kubectl_run("apply", "-f", "-", stdin=json.dumps(objects))


def _service(name: str, namespace: str, url: str) -> list[dict[str, Any]]:
    """Pods reach the server at `url`, which is outside the cluster, as http://NAME:PORT."""
    where = urllib.parse.urlsplit(url)
    metadata = {"name": name, "namespace": namespace}
    port = {"name": "http", "port": 5000}
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {"ports": [{**port, "targetPort": where.port}]},
        },
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {**metadata, "labels": {"kubernetes.io/service-name": name}},
            "addressType": "IPv4",
            "endpoints": [{"addresses": [where.hostname]}],
            "ports": [{"name": "http", "port": where.port}],
        },
    ]
