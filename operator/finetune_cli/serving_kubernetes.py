"""Builds the manifests that serve a result in a cluster.

The module is pure. vLLM and TGI get a Deployment and a Service, KServe an InferenceService.
"""

from __future__ import annotations

from typing import Any

from finetune_cli.serving import Served, Target, max_lora_rank, parts

Manifest = dict[str, Any]
IMAGES = {
    "vllm": "vllm/vllm-openai:v0.28.0",
    "tgi": "ghcr.io/huggingface/text-generation-inference:3.3.7",  # the last release
}
IMAGES_CHECKED = "2026-11-29"
"""When the tags of IMAGES were last looked up. They are fixed, but haven't been run here."""
_DOWNLOAD_IMAGE = "amazon/aws-cli:2.31.0"
_MAINTENANCE = (
    "TGI has been in maintenance mode since December 2025: it gets minor fixes at most, and its authors recommend "
    "vLLM; use --for vllm if it can load the result."
)
_PORTS = {"vllm": 8000, "tgi": 8080}


def manifests(result: Served, target: Target, *, image: str, secret: str, gpus: int) -> list[Manifest]:
    """Returns the objects in the order in which they are applied."""
    if target == "kserve":
        return [_inference_service(result, secret=secret, gpus=gpus)]
    model, adapter = parts(result, target)
    sources = _Sources(secret)
    model_path = sources.path_in_pod(model, "model")
    adapter_path = sources.path_in_pod(adapter, "adapter") if adapter else None
    port = _PORTS[target]
    labels = {"app.kubernetes.io/name": target, "app.kubernetes.io/instance": result.label}
    tgi = ["--model-id", model_path, "--port", str(port)]
    arguments = _vllm_arguments(result, model_path, adapter_path) if target == "vllm" else tgi
    environment = [] if target == "vllm" or not adapter_path else [
        {"name": "LORA_ADAPTERS", "value": f"{result.label}={adapter_path}"}
    ]  # fmt: skip
    container = {
        "name": target,
        "image": image or IMAGES[target],
        **({"command": ["vllm", "serve"]} if target == "vllm" else {}),  # the image's own differs by version
        "args": arguments,
        "env": [*environment, *sources.hub_token()],
        "ports": [{"name": "http", "containerPort": port}],
        "readinessProbe": {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 10, "failureThreshold": 3},
        "startupProbe": {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 10, "failureThreshold": 180},
        "resources": {"limits": {"nvidia.com/gpu": str(gpus)}},
        "volumeMounts": [*sources.mounts(), {"name": "shm", "mountPath": "/dev/shm"}],  # noqa: S108
    }
    pod = {
        "initContainers": sources.init_containers(),
        "containers": [container],
        "volumes": [*sources.volumes(), {"name": "shm", "emptyDir": {"medium": "Memory"}}],
    }
    return [
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": result.label, "labels": labels},
            "spec": {
                "replicas": 1,
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": _without_empty(pod)},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": result.label, "labels": labels},
            "spec": {"selector": labels, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
        },
    ]


def comments(target: Target, image: str) -> list[str]:
    """Returns what is printed above the objects. `image` is the user's, or empty."""
    lines = [_MAINTENANCE] if target == "tgi" else []
    if target in IMAGES and not image:
        lines.append(f"The tag of {IMAGES[target]} was checked on {IMAGES_CHECKED}; --image replaces it.")
    return lines


def _inference_service(result: Served, *, secret: str, gpus: int) -> Manifest:
    """Uses KServe's Hugging Face runtime, which runs vLLM.

    KServe's storage initializer downloads `storageUri` to /mnt/models.
    """
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
                "model": _without_empty({
                    "modelFormat": {"name": "huggingface"},
                    "storageUri": adapter or model,
                    "args": arguments,
                    "env": environment,
                    "resources": {"limits": {"nvidia.com/gpu": str(gpus)}},
                }),
            },
        },
    }  # fmt: skip


def _vllm_arguments(result: Served, model: str, adapter: str | None) -> list[str]:
    if adapter is None:
        return [model, "--served-model-name", result.label]
    return [
        model, "--enable-lora", "--max-lora-rank", str(max_lora_rank(result)),
        "--lora-modules", f"{result.label}={adapter}",
    ]  # fmt: skip


class _Sources:
    """Makes models available in a pod.

    Volume claims are mounted, buckets are downloaded by an init container, and the server itself
    downloads from the Hugging Face Hub.
    """

    def __init__(self, secret: str) -> None:
        self._secret = secret
        self._claims: dict[str, str] = {}
        self._downloads: dict[str, str] = {}
        self._hub = False

    def path_in_pod(self, uri: str, role: str) -> str:
        """Returns what the server has to load, and notes the mounts and downloads that it needs.

        `role` is model or adapter; it names the folder of a download.
        """
        scheme, _, rest = uri.partition("://")
        if scheme == "hf":
            self._hub = True
            return rest
        if scheme == "pvc":
            claim, _, path = rest.partition("/")
            self._claims[claim] = f"claim-{len(self._claims)}"
            return f"/mnt/{claim}/{path}".rstrip("/")
        if scheme == "s3":
            self._downloads[uri] = f"/fetched/{role}"
            return f"/fetched/{role}"
        return uri

    def mounts(self) -> list[Manifest]:
        """Returns the container's volumeMounts."""
        claims = [
            {"name": name, "mountPath": f"/mnt/{claim}", "readOnly": True} for claim, name in self._claims.items()
        ]
        return [*claims, *([{"name": "fetched", "mountPath": "/fetched"}] if self._downloads else [])]

    def volumes(self) -> list[Manifest]:
        """Returns the pod's volumes."""
        claims = [
            {"name": name, "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}
            for claim, name in self._claims.items()
        ]
        return [*claims, *([{"name": "fetched", "emptyDir": {}}] if self._downloads else [])]

    def init_containers(self) -> list[Manifest]:
        """Returns one container for each download from a bucket."""
        keys = [{"secretRef": {"name": self._secret}}] if self._secret else []
        return [
            _without_empty({
                "name": f"fetch-{target.rsplit('/', 1)[-1]}",
                "image": _DOWNLOAD_IMAGE,
                "args": ["s3", "cp", "--recursive", "--only-show-errors", "--exclude", "checkpoints/*", uri, target],
                "envFrom": keys,
                "volumeMounts": [{"name": "fetched", "mountPath": "/fetched"}],
            })
            for uri, target in self._downloads.items()
        ]  # fmt: skip

    def hub_token(self) -> list[Manifest]:
        """Returns the environment variable for the hub's token, if it is needed."""
        if not self._hub or not self._secret:
            return []
        key = {"name": self._secret, "key": "HF_TOKEN", "optional": True}
        return [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": key}}]


def _without_empty(manifest: Manifest) -> Manifest:
    """Leaves out entries that are empty."""
    return {key: value for key, value in manifest.items() if value not in (None, "", [], {})}
