"""Manifests that serve a result in a cluster: vLLM and TGI as Deployment and Service, an InferenceService. Pure."""

from __future__ import annotations

from typing import Any

from finetune_cli.serving import Served, Target, max_lora_rank, parts

Manifest = dict[str, Any]
IMAGES = {"vllm": "vllm/vllm-openai:v0.11.0", "tgi": "ghcr.io/huggingface/text-generation-inference:3.3.6"}
_FETCH = "amazon/aws-cli:2.31.0"
_PORTS = {"vllm": 8000, "tgi": 8080}


def manifests(result: Served, target: Target, *, image: str, secret: str, gpus: int) -> list[Manifest]:
    """In the order in which they are applied."""
    if target == "kserve":
        return [_inference_service(result, secret=secret, gpus=gpus)]
    model, adapter = parts(result, target)
    places = _Places(secret)
    at_model, at_adapter = places.seen(model, "model"), places.seen(adapter, "adapter") if adapter else None
    port = _PORTS[target]
    labels = {"app.kubernetes.io/name": target, "app.kubernetes.io/instance": result.label}
    command = _vllm(result, at_model, at_adapter) if target == "vllm" else ["--model-id", at_model, "--port", str(port)]
    environment = [] if target == "vllm" or not at_adapter else [
        {"name": "LORA_ADAPTERS", "value": f"{result.label}={at_adapter}"}
    ]  # fmt: skip
    container = {
        "name": target,
        "image": image or IMAGES[target],
        "args": command,
        "env": [*environment, *places.hub_token()],
        "ports": [{"name": "http", "containerPort": port}],
        "readinessProbe": {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 10, "failureThreshold": 3},
        "startupProbe": {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 10, "failureThreshold": 180},
        "resources": {"limits": {"nvidia.com/gpu": str(gpus)}},
        "volumeMounts": [*places.mounts(), {"name": "shm", "mountPath": "/dev/shm"}],  # noqa: S108
    }
    pod = {
        "initContainers": places.fetching(),
        "containers": [container],
        "volumes": [*places.volumes(), {"name": "shm", "emptyDir": {"medium": "Memory"}}],
    }
    return [
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": result.label, "labels": labels},
            "spec": {
                "replicas": 1,
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": _present(pod)},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": result.label, "labels": labels},
            "spec": {"selector": labels, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
        },
    ]


def _inference_service(result: Served, *, secret: str, gpus: int) -> Manifest:
    """KServe's Hugging Face runtime, which runs vLLM: the storage initializer puts `storageUri` into /mnt/models."""
    model, adapter = parts(result, "kserve")
    arguments = [f"--model_name={result.label}-base" if adapter else f"--model_name={result.label}"]
    if adapter:
        arguments += [f"--model_id={model.removeprefix('hf://')}", "--enable-lora", "--lora-modules",
                      f"{result.label}=/mnt/models", f"--max-lora-rank={max_lora_rank(result)}"]  # fmt: skip
    environment = [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {
        "name": secret, "key": "HF_TOKEN", "optional": True}}}] if adapter and secret else []  # fmt: skip
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": result.label},
        "spec": {
            "predictor": {
                "model": _present({
                    "modelFormat": {"name": "huggingface"},
                    "storageUri": adapter or model,
                    "args": arguments,
                    "env": environment,
                    "resources": {"limits": {"nvidia.com/gpu": str(gpus)}},
                }),
            },
        },
    }  # fmt: skip


def _vllm(result: Served, model: str, adapter: str | None) -> list[str]:
    if adapter is None:
        return ["--model", model, "--served-model-name", result.label]
    return [
        "--model", model, "--enable-lora", "--max-lora-rank", str(max_lora_rank(result)),
        "--lora-modules", f"{result.label}={adapter}",
    ]  # fmt: skip


class _Places:
    """Where the pod sees what lies elsewhere: claims are mounted, buckets are fetched first, hubs are asked."""

    def __init__(self, secret: str) -> None:
        self._secret = secret
        self._claims: dict[str, str] = {}
        self._fetched: dict[str, str] = {}
        self._hub = False

    def seen(self, uri: str, what: str) -> str:
        scheme, _, rest = uri.partition("://")
        if scheme == "hf":
            self._hub = True
            return rest
        if scheme == "pvc":
            claim, _, path = rest.partition("/")
            self._claims[claim] = f"claim-{len(self._claims)}"
            return f"/mnt/{claim}/{path}".rstrip("/")
        if scheme == "s3":
            self._fetched[uri] = f"/fetched/{what}"
            return f"/fetched/{what}"
        return uri

    def mounts(self) -> list[Manifest]:
        claims = [
            {"name": name, "mountPath": f"/mnt/{claim}", "readOnly": True} for claim, name in self._claims.items()
        ]
        return [*claims, *([{"name": "fetched", "mountPath": "/fetched"}] if self._fetched else [])]

    def volumes(self) -> list[Manifest]:
        claims = [
            {"name": name, "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}
            for claim, name in self._claims.items()
        ]
        return [*claims, *([{"name": "fetched", "emptyDir": {}}] if self._fetched else [])]

    def fetching(self) -> list[Manifest]:
        keys = [{"secretRef": {"name": self._secret}}] if self._secret else []
        return [
            _present({
                "name": f"fetch-{target.rsplit('/', 1)[-1]}",
                "image": _FETCH,
                "args": ["s3", "cp", "--recursive", "--only-show-errors", "--exclude", "checkpoints/*", uri, target],
                "envFrom": keys,
                "volumeMounts": [{"name": "fetched", "mountPath": "/fetched"}],
            })
            for uri, target in self._fetched.items()
        ]  # fmt: skip

    def hub_token(self) -> list[Manifest]:
        if not self._hub or not self._secret:
            return []
        key = {"name": self._secret, "key": "HF_TOKEN", "optional": True}
        return [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": key}}]


def _present(manifest: Manifest) -> Manifest:
    return {key: value for key, value in manifest.items() if value not in (None, "", [], {})}
