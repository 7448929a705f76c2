"""Where things lie: the cache and, inside it, a cluster's folder. Pure but for `cache_root`'s environment."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def cache_root() -> Path:
    """$FINETUNE_CACHE, else $XDG_CACHE_HOME/finetune-operator, else ~/.cache/finetune-operator."""
    if explicit := os.environ.get("FINETUNE_CACHE"):
        return Path(explicit).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().resolve() / "finetune-operator"


@dataclass(frozen=True)
class ClusterPaths:
    """One cluster's folder. `run`, `data` and `logs` go at down; `containerd` stays."""

    root: Path

    @property
    def lock(self) -> Path:
        return self.root.parent / f".{self.root.name}.lock"

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def containerd(self) -> Path:
        return self.root / "containerd"

    @property
    def loaded(self) -> Path:
        return self.root / "loaded.json"

    @property
    def pki(self) -> Path:
        return self.run / "pki"

    @property
    def etc(self) -> Path:
        return self.run / "etc"

    @property
    def targets(self) -> Path:
        return self.etc / "prometheus-targets.json"

    @property
    def kubeconfig(self) -> Path:
        return self.run / "kubeconfig"

    @property
    def info(self) -> Path:
        return self.run / "cluster.json"

    @property
    def audit_log(self) -> Path:
        return self.logs / "audit.jsonl"


def cluster_paths(name: str) -> ClusterPaths:
    return ClusterPaths(cache_root() / "clusters" / name)
