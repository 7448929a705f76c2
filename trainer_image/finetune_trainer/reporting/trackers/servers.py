"""Decides which servers get the keys of a tracker's Secret. It does no I/O except resolving names.

Who may create a FineTuneJob may name any Secret of the namespace and any server, but mayn't read
the Secret. So the keys go to a server only if the administrator or the Secret itself names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from finetune_api.destinations import is_listed_url
from finetune_api.messages.run import TrackingConfig
from finetune_trainer.storage import bounds

_WANDB = "https://api.wandb.ai"


def check_mlflow(config: TrackingConfig, keys: Mapping[str, str]) -> None:
    """Checks the MLflow server. Raises RuntimeError if it mustn't get the keys."""
    if config.mlflow is None or config.servers is None:
        return
    url, field = config.mlflow.uri, "spec.tracking.mlflow.uri"
    if is_listed_url(url, config.servers):
        return
    _check_list(field, url, config.servers)
    _check_place(field, url)
    if config.mlflow.credentials is None:
        return
    _check_encrypted(field, url)
    if not is_listed_url(url, (keys.get("MLFLOW_TRACKING_URI", ""),)):
        raise RuntimeError(
            f"{field}: {url} isn't the server that the Secret names; add MLFLOW_TRACKING_URI with it to the Secret, or "
            "have it added to the operator's tenants.trackers"
        )


def check_wandb(config: TrackingConfig, keys: Mapping[str, str]) -> None:
    """Checks the server of Weights & Biases, which the Secret names.

    Raises RuntimeError if it mustn't get the keys.
    """
    if config.wandb is None or config.wandb.mode == "offline" or config.servers is None:
        return
    url, field = keys.get("WANDB_BASE_URL") or _WANDB, "WANDB_BASE_URL of the Secret"
    if not is_listed_url(url, config.servers):
        _check_list(field, _shown(url), config.servers)
        _check_place(field, url)
        _check_encrypted(field, _shown(url))


def _check_list(field: str, url: str, allowed: tuple[str, ...]) -> None:
    if allowed:
        raise RuntimeError(f"{field}: {url} is not among the operator's tenants.trackers: {', '.join(allowed)}")


def _check_place(field: str, url: str) -> None:
    host = urlsplit(url).hostname or ""
    if bounds.is_of_node(host) or bounds.is_of_machine(host):
        raise RuntimeError(
            f"{field}: {_shown(url)} is on the node or in the pod itself; name a tracker, or have it added to the "
            "operator's tenants.trackers"
        )


def _shown(url: str) -> str:
    """Returns a URL without what may be a password."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _check_encrypted(field: str, url: str) -> None:
    if not url.lower().startswith("https://"):
        raise RuntimeError(
            f"{field}: {url} would get the keys of the Secret without encryption; use https://, or have it added to "
            "the operator's tenants.trackers"
        )
