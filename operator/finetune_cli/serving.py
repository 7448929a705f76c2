"""Decides which servers can load a finished result, with which options, and why others can't.

The module is pure. The rules come from the documentation of the servers; docs/serving.md lists
them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from finetune_api import untrusted

Target = Literal["vllm", "tgi", "kserve", "sagemaker", "vertex"]
TARGETS: tuple[Target, ...] = ("vllm", "tgi", "kserve", "sagemaker", "vertex")
MERGED = "merged"

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values that vLLM's --max-lora-rank accepts
_REPOSITORY = re.compile(r"hf://[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,199}")
_EMBEDDING_LAYERS = ("embed_tokens", "lm_head", "wte", "shared")


@dataclass(frozen=True)
class Served:
    """Describes a finished result by its manifest.json and adapter_config.json.

    `uri` and `base` (the base model) are as the user wrote them. `merged` is set if the result also
    has a merged model, and `adapter` is the content of adapter_config.json.
    """

    name: str
    uri: str
    kind: Literal["adapter", "model"]
    base: str
    revision: str | None
    merged: bool
    adapter: Mapping[str, Any]
    files: tuple[str, ...]
    encoder_decoder: bool = False

    @property
    def full_model(self) -> str | None:
        """The URI of the model that needs no adapter, or None."""
        if self.kind == "model":
            return self.uri
        return f"{self.uri.rstrip('/')}/{MERGED}" if self.merged else None

    @property
    def label(self) -> str:
        """The job's name, changed to a valid name of a Kubernetes object."""
        return re.sub(r"[^a-z0-9-]+", "-", self.name.lower()).strip("-")[:50] or "model"


def served(uri: str, manifest: Mapping[str, Any], adapter: Mapping[str, Any] | None) -> Served:
    """Parses the two files. Raises ValueError if they don't describe a finished result."""
    kind = manifest.get("kind")
    if kind not in ("adapter", "model"):
        raise ValueError(f"its manifest describes a {kind}, not a result")
    files = tuple(str(file["path"]) for file in manifest.get("files", ()))
    if kind == "adapter" and adapter is None:
        raise ValueError("it has no adapter_config.json")
    origin = manifest.get("provenance", {}).get("model", {})
    base, revision = str(origin.get("uri", "")), origin.get("revision")
    if base.startswith("hf://") and not _REPOSITORY.fullmatch(base):
        raise ValueError(f"its base model {untrusted.line(base, 100)!r} isn't the name of a repository")
    if revision is not None and not _REVISION.fullmatch(str(revision)):
        raise ValueError(f"the revision {untrusted.line(str(revision), 100)!r} of its base model isn't one")
    return Served(
        name=manifest["job"]["name"],
        uri=uri,
        kind=kind,
        base=base,
        revision=revision,
        merged=any(path.startswith(f"{MERGED}/") for path in files),
        adapter=adapter or {},
        files=files,
        encoder_decoder=(adapter or {}).get("task_type") == "SEQ_2_SEQ_LM",
    )


def max_lora_rank(result: Served) -> int | None:
    """Returns the value for vLLM's --max-lora-rank; None if no value is large enough."""
    rank = _rank(result.adapter)
    return next((allowed for allowed in _RANKS if allowed >= rank), None)


def adapter_obstacles(result: Served, target: Target) -> list[str]:
    """Returns why a server can't load this adapter on its base model; empty if it can."""
    config = result.adapter
    if target in ("sagemaker", "vertex"):
        return ["it loads a single folder, and an adapter needs its base model as well"]
    reasons = []
    if "adapter_model.safetensors" not in result.files:
        reasons.append("adapter_model.safetensors is missing")
    if config.get("peft_type") != "LORA":
        reasons.append(f"it loads LoRA adapters only, not {config.get('peft_type')}")
    if config.get("use_dora"):
        reasons.append("it doesn't support DoRA")
    if config.get("modules_to_save"):
        reasons.append(f"it doesn't load full layers in an adapter ({', '.join(config['modules_to_save'])})")
    if config.get("trainable_token_indices"):
        reasons.append("it doesn't load trained tokens in an adapter")
    if config.get("bias", "none") != "none":
        reasons.append("it doesn't load biases in an adapter")
    embeddings = [name for name in _targets(config) if name.rsplit(".", 1)[-1] in _EMBEDDING_LAYERS]
    if embeddings:
        reasons.append(f"it doesn't load adapters on {', '.join(embeddings)}")
    if target == "tgi" and (config.get("rank_pattern") or config.get("alpha_pattern")):
        reasons.append("it supports only one rank and one alpha for all layers")
    if target in ("vllm", "kserve"):
        if result.encoder_decoder:
            reasons.append("vLLM doesn't support encoder-decoder models of this kind")
        if max_lora_rank(result) is None:
            reasons.append(f"rank {_rank(config)} is above vLLM's maximum of {_RANKS[-1]}")
    return reasons


def refusal(result: Served, target: Target) -> str | None:
    """Returns why a server can serve nothing of this result, and the remedy; None if it can."""
    if result.full_model is not None and not (target in ("vllm", "kserve") and result.encoder_decoder):
        return None
    unsupported = ["vLLM doesn't support models of this kind"]
    reasons = adapter_obstacles(result, target) if result.kind == "adapter" else unsupported
    if not reasons:
        return None
    remedy = (
        "serve it with TGI" if result.encoder_decoder else "train with output.merge: true and serve the merged model"
    )
    return f"{target} can't load this {result.kind}: {'; '.join(reasons)}. Remedy: {remedy}"


def notes(result: Served, target: Target) -> list[str]:
    """Returns what the user has to know besides the manifest."""
    messages = []
    rank = max_lora_rank(result)
    adapter = result.kind == "adapter" and not _uses_full_model(result, target)
    if adapter and target in ("vllm", "kserve") and rank is not None and rank > _RANKS[1]:
        messages.append(f"rank {_rank(result.adapter)} needs --max-lora-rank {rank}: vLLM's default is {_RANKS[1]}")
    if adapter:
        messages.append(f"request the model {result.label}; the base model is served under its own name")
    if not adapter and result.kind == "adapter":
        obstacle = adapter_obstacles(result, target)[0]
        messages.append(f"the merged model is served, because {target} can't load the adapter: {obstacle}")
    return messages


def _uses_full_model(result: Served, target: Target) -> bool:
    return result.kind == "model" or (result.merged and bool(adapter_obstacles(result, target)))


def parts(result: Served, target: Target) -> tuple[str, str | None]:
    """Returns the URI of the model to load, and that of the adapter to load on it or None."""
    if _uses_full_model(result, target):
        return str(result.full_model), None
    return result.base, result.uri


def _rank(config: Mapping[str, Any]) -> int:
    return max([int(config.get("r", 8)), *(int(rank) for rank in (config.get("rank_pattern") or {}).values())])


def _targets(config: Mapping[str, Any]) -> list[str]:
    targets = config.get("target_modules") or []
    return [targets] if isinstance(targets, str) else list(targets)
