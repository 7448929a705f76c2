"""The paths of the cache and, inside it, of a cluster's folder.

Pure, except that `cache_root` reads the environment.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def cache_root() -> Path:
    """Returns the cache folder.

    It is $FINETUNE_CACHE, else $XDG_CACHE_HOME/finetune-operator, else ~/.cache/finetune-operator.
    """
    if explicit := os.environ.get("FINETUNE_CACHE"):
        return Path(explicit).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().resolve() / "finetune-operator"


@dataclass(frozen=True)
class ClusterPaths:
    """One cluster's folder. `down` removes `run`, `data` and `logs`; `containerd` stays."""

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

    def node(self, number: int) -> ClusterPaths:
        """The folders of a further node, which look like those of a cluster."""
        return ClusterPaths(self.nodes / str(number))

    @property
    def nodes(self) -> Path:
        return self.root / "nodes"

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
    def hosts(self) -> Path:
        return self.etc / "hosts"

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
    """Returns the paths of the cluster of that name, whether it exists or not."""
    return ClusterPaths(cache_root() / "clusters" / name)
