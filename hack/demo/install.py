"""Installs the operator with Helm, creates namespaces with their Secret, and uploads to S3.

Each function does one thing and can be repeated.
"""

from __future__ import annotations

import json
import subprocess
import urllib.parse
from pathlib import Path
from typing import Any

import obstore
from obstore.store import S3Store

from demo.clusters import ROOT, ClusterAccess

OPERATOR_NAMESPACE = "finetune-system"


def s3_store(cluster: ClusterAccess, bucket: str) -> S3Store:
    """Returns a bucket of the cluster's object storage."""
    return S3Store(
        bucket,
        endpoint=cluster.s3_endpoint,
        access_key_id=cluster.s3_access_key,
        secret_access_key=cluster.s3_secret_key,
        region=cluster.s3_region,
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )


def put_folder(store: S3Store, folder: Path, prefix: str) -> int:
    """Copies a folder's files under a prefix, except those already there with the same size.

    Returns the number of bytes copied.
    """
    sizes = {meta["path"]: meta["size"] for batch in obstore.list(store, prefix=prefix) for meta in batch}
    copied = 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        key = f"{prefix}/{path.relative_to(folder)}"
        size = path.stat().st_size
        if sizes.get(key) != size:
            obstore.put(store, key, path)
            copied += size
    return copied


def operator(cluster: ClusterAccess, operator_image: str, trainer_image: str, *settings: str) -> None:
    """Installs or upgrades the chart and waits until the operator is ready.

    `settings` are passed to --set. Raises RuntimeError with Helm's message.
    """
    repository, _, tag = operator_image.rpartition(":")
    trainer_repository, _, trainer_tag = trainer_image.rpartition(":")
    command = [
        cluster.helm, "upgrade", "--install", "finetune-operator", str(ROOT / "charts/finetune-operator"),
        "--kubeconfig", cluster.kubeconfig, "--namespace", OPERATOR_NAMESPACE, "--create-namespace",
        "--set", f"image.repository={repository}", "--set", f"image.tag={tag}",
        "--set", f"trainer.image.repository={trainer_repository}", "--set", f"trainer.image.tag={trainer_tag}",
        "--set", f"storage.s3.endpoint={cluster.s3_endpoint}", "--set", "storage.s3.allowHttp=true",
        "--set", "resources.requests.cpu=50m",
        # Prometheus isn't in the cluster: it comes from the address of a node.
        "--set", "networkPolicy.metricsFrom[0].ipBlock.cidr=0.0.0.0/0",
        *(word for setting in settings for word in ("--set", setting)),
        "--wait", "--timeout", "120s",
    ]  # fmt: skip
    done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"helm: {done.stderr.strip()}")


def namespace(cluster: ClusterAccess, name: str) -> None:
    """Creates a namespace that admits only restricted pods, with the Secret `s3`.

    If MLflow runs, it also gets MLflow's Service.
    """
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
                    "AWS_ACCESS_KEY_ID": cluster.s3_access_key,
                    "AWS_SECRET_ACCESS_KEY": cluster.s3_secret_key,
                },
            },
            *(_service("mlflow", name, cluster.mlflow_url) if cluster.mlflow_url else ()),
        ],
    }
    cluster.kubectl_run("apply", "-f", "-", stdin=json.dumps(objects))


def _service(name: str, namespace: str, url: str) -> list[dict[str, Any]]:
    """Returns a Service and its EndpointSlice for the server at `url` outside the cluster.

    Pods reach it as http://NAME:5000.
    """
    address = urllib.parse.urlsplit(url)
    metadata = {"name": name, "namespace": namespace}
    port = {"name": "http", "port": 5000}
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {"ports": [{**port, "targetPort": address.port}]},
        },
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {**metadata, "labels": {"kubernetes.io/service-name": name}},
            "addressType": "IPv4",
            "endpoints": [{"addresses": [address.hostname]}],
            "ports": [{"name": "http", "port": address.port}],
        },
    ]
