"""What has to exist before an example can run: Secrets, files, buckets, claims, GPUs, servers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Raw = Mapping[str, Any]

HEADING = "# Must exist:"
_KEYS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "HF_TOKEN",
    "https": "MLFLOW_TRACKING_TOKEN and MLFLOW_TRACKING_URI, which is the server's URL",
}
# Bytes that a job downloads: the safetensors files and the tokenizer of the published repository.
MODEL_BYTES = {
    "HuggingFaceTB/SmolLM2-135M": 272e6,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 272e6,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 727e6,
    "Qwen/Qwen2.5-0.5B-Instruct": 999e6,
    "Qwen/Qwen3-0.6B": 1.52e9,
    "meta-llama/Llama-3.1-8B-Instruct": 16.1e9,
    "mistralai/Mistral-7B-Instruct-v0.3": 14.5e9,
}


def required(spec: Raw) -> list[str]:
    """Return what the spec refers to, a line for each thing, in a fixed order and once."""
    lines = [*_secrets(spec), *_inputs(spec), *_outputs(spec), *_hardware(spec), *_offers(spec), *_servers(spec)]
    return list(dict.fromkeys(lines))


def comment(spec: Raw) -> str:
    """Return the comment that an example of this spec must have."""
    return "".join(f"{line}\n" for line in (HEADING, *(f"#   {line}" for line in required(spec))))


def uris(value: Any) -> Iterator[str]:
    """Yield every URI in a section, in order."""
    if isinstance(value, Mapping):
        for key, content in value.items():
            if key == "uri":
                yield content
            else:
                yield from uris(content)
    elif isinstance(value, list):
        for content in value:
            yield from uris(content)


def _secrets(spec: Raw) -> Iterator[str]:
    tracking = spec.get("tracking", {})
    sections = [spec["model"], spec["dataset"], spec["output"], tracking.get("mlflow", {})]
    for section in sections:
        reference = section.get("credentialsRef")
        if reference:
            scheme = next(uris(section)).partition("://")[0]
            yield f"Secret {reference['name']} with {_KEYS[scheme]}"
    if "credentialsRef" in tracking.get("wandb", {}):
        yield f"Secret {tracking['wandb']['credentialsRef']['name']} with WANDB_API_KEY"


def _inputs(spec: Raw) -> Iterator[str]:
    for uri in (*uris(spec["model"]), *uris(spec["dataset"])):
        if not uri.startswith("hf://"):
            yield uri


def _outputs(spec: Raw) -> Iterator[str]:
    scheme, _, path = spec["output"]["uri"].partition("://")
    place = path.partition("/")[0]
    if scheme == "volume":
        (place,) = (v["claim"]["name"] for v in spec["pod"]["volumes"] if v["name"] == place)
    claim = f"PersistentVolumeClaim {place}, writable by user 65532"
    kind = "container" if scheme == "az" else "bucket"
    mounted = scheme in ("pvc", "volume")
    yield claim if mounted else f"{kind} {place}, in which the job may write and delete"


def _offers(spec: Raw) -> Iterator[str]:
    """Yield what an administrator has to set up."""
    network, queue = spec.get("pod", {}).get("network"), spec.get("runPolicy", {}).get("queueName")
    if network:
        yield f"network profile {network} in the chart's pods.networkProfiles"
    volumes = spec.get("pod", {}).get("volumes", [])
    yield from (f"CSI driver {v['csi']['driver']} in the chart's pods.allowedCsiDrivers" for v in volumes if "csi" in v)
    yield from (f"image {v['image']['reference']}" for v in volumes if "image" in v)
    if queue:
        yield f"Kueue with the LocalQueue {queue}"


def _hardware(spec: Raw) -> Iterator[str]:
    if "gpu" not in spec.get("resources", {}):
        return
    distribution = spec.get("distribution", {})
    count, nodes = distribution.get("processesPerNode", 1), distribution.get("nodes", 1)
    name = spec["resources"]["gpu"].get("name", "nvidia.com/gpu")
    each = "a node" if nodes == 1 else f"{nodes} nodes, each"
    devices = {name: count, **spec["resources"].get("extra", {})}
    yield f"{each} with {' and '.join(f'{amount} x {device}' for device, amount in devices.items())} free"


def _servers(spec: Raw) -> Iterator[str]:
    if mlflow := spec.get("tracking", {}).get("mlflow"):
        yield f"an MLflow server at {mlflow['uri']}"
