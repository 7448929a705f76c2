"""A finished result and what servers can do with it: which of them load it, with which options, and why not. Pure.

Used by `serve_manifest`. The rules are the servers' documented ones; docs/serving.md names them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Target = Literal["vllm", "tgi", "kserve", "sagemaker", "vertex"]
TARGETS: tuple[Target, ...] = ("vllm", "tgi", "kserve", "sagemaker", "vertex")
MERGED = "merged"

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank takes
_OUTER = ("embed_tokens", "lm_head", "wte", "shared")


@dataclass(frozen=True)
class Served:
    """What `finetune/manifest.json` and `adapter_config.json` say. `uri` and `base` as the user wrote them."""

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
    def whole(self) -> str | None:
        """The folder of a model that needs no adapter, or None."""
        if self.kind == "model":
            return self.uri
        return f"{self.uri.rstrip('/')}/{MERGED}" if self.merged else None

    @property
    def label(self) -> str:
        """The job's name as a Kubernetes object's."""
        return re.sub(r"[^a-z0-9-]+", "-", self.name.lower()).strip("-")[:50] or "model"


def served(uri: str, manifest: Mapping[str, Any], adapter: Mapping[str, Any] | None) -> Served:
    """Raises ValueError where the folder holds no finished result."""
    kind = manifest.get("kind")
    if kind not in ("adapter", "model"):
        raise ValueError(f"its manifest is of a {kind}, not of a result")
    files = tuple(str(file["path"]) for file in manifest.get("files", ()))
    if kind == "adapter" and adapter is None:
        raise ValueError("it has no adapter_config.json")
    origin = manifest.get("provenance", {}).get("model", {})
    return Served(
        name=manifest["job"]["name"],
        uri=uri,
        kind=kind,
        base=str(origin.get("uri", "")),
        revision=origin.get("revision"),
        merged=any(path.startswith(f"{MERGED}/") for path in files),
        adapter=adapter or {},
        files=files,
        encoder_decoder=(adapter or {}).get("task_type") == "SEQ_2_SEQ_LM",
    )


def max_lora_rank(result: Served) -> int | None:
    """vLLM's --max-lora-rank for it; None where no value is large enough."""
    rank = _rank(result.adapter)
    return next((allowed for allowed in _RANKS if allowed >= rank), None)


def why_no_adapter(result: Served, target: Target) -> list[str]:
    """Why a server can't load this adapter on its base; empty where it can."""
    config = result.adapter
    if target in ("sagemaker", "vertex"):
        return ["it is given one folder, and an adapter needs its base beside it"]
    reasons = []
    if "adapter_model.safetensors" not in result.files:
        reasons.append("adapter_model.safetensors is missing")
    if config.get("peft_type") != "LORA":
        reasons.append(f"its adapters are LoRA only, not {config.get('peft_type')}")
    if config.get("use_dora"):
        reasons.append("it can't compute DoRA")
    if config.get("modules_to_save"):
        reasons.append(f"whole layers in an adapter aren't loaded ({', '.join(config['modules_to_save'])})")
    if config.get("trainable_token_indices"):
        reasons.append("trained tokens in an adapter aren't loaded")
    if config.get("bias", "none") != "none":
        reasons.append("biases in an adapter aren't loaded")
    outer = [name for name in _targets(config) if name.rsplit(".", 1)[-1] in _OUTER]
    if outer:
        reasons.append(f"adapters on {', '.join(outer)} aren't loaded")
    if target == "tgi" and (config.get("rank_pattern") or config.get("alpha_pattern")):
        reasons.append("it takes one rank and one alpha for all layers")
    if target in ("vllm", "kserve"):
        if result.encoder_decoder:
            reasons.append("vLLM has no encoder-decoder models of this kind")
        if max_lora_rank(result) is None:
            reasons.append(f"rank {_rank(config)} is more than vLLM's {_RANKS[-1]}")
    return reasons


def refusal(result: Served, target: Target) -> str | None:
    """Why nothing of this result can be served there, and what to do; None where something can."""
    if result.whole is not None and not (target in ("vllm", "kserve") and result.encoder_decoder):
        return None
    reasons = why_no_adapter(result, target) if result.kind == "adapter" else ["vLLM has no models of this kind"]
    if not reasons:
        return None
    remedy = (
        "serve it with TGI"
        if result.encoder_decoder
        else "train with output.merge: true, and the merged model is served"
    )
    return f"{target} can't load this adapter: {'; '.join(reasons)}. Way out: {remedy}"


def notes(result: Served, target: Target) -> list[str]:
    """What has to be known besides."""
    told = []
    rank = max_lora_rank(result)
    adapter = result.kind == "adapter" and not _takes_whole(result, target)
    if adapter and target in ("vllm", "kserve") and rank is not None and rank > _RANKS[1]:
        told.append(f"rank {_rank(result.adapter)} needs --max-lora-rank {rank}: vLLM's default is {_RANKS[1]}")
    if adapter:
        told.append(f"ask for the model {result.label}; the base answers under its own name")
    if not adapter and result.kind == "adapter":
        told.append(f"the merged model is served, since {why_no_adapter(result, target)[0]}")
    return told


def _takes_whole(result: Served, target: Target) -> bool:
    return result.kind == "model" or (result.merged and bool(why_no_adapter(result, target)))


def parts(result: Served, target: Target) -> tuple[str, str | None]:
    """(the model to load, the adapter to load on it or None)"""
    if _takes_whole(result, target):
        return str(result.whole), None
    return result.base, result.uri


def _rank(config: Mapping[str, Any]) -> int:
    return max([int(config.get("r", 8)), *(int(rank) for rank in (config.get("rank_pattern") or {}).values())])


def _targets(config: Mapping[str, Any]) -> list[str]:
    targets = config.get("target_modules") or []
    return [targets] if isinstance(targets, str) else list(targets)
