"""Node: everything that the supervisor of one pod was told, read once at the door."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from finetune_api import run
from finetune_api.names import (
    ENV_NODE_RANK,
    ENV_RUN_CONFIG,
    ENV_TERMINATION_LOG,
    RUN_CONFIG_PATH,
    TERMINATION_LOG_PATH,
)
from finetune_trainer.failure import Failed
from finetune_trainer.paths import Paths
from finetune_trainer.ranks import RANK_COMMAND
from finetune_trainer.store import Access

ENV_TRACKING_PATIENCE = "FINETUNE_TRACKING_PATIENCE"

# What of our own environment the ranks may see; credentials aren't among it.
_FOR_RANKS = (
    "PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV",
    "POD_NAME", "SSL_CERT_FILE", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR",
    "GLIBC_TUNABLES",
)  # fmt: skip
_PREFIXES_FOR_RANKS = (
    "CUDA_",
    "NCCL_",
    "GLOO_",
    "NVIDIA_",
    "TORCH_",
    "DS_",
    "OMP_",
    "MKL_",
    "HF_HOME",
    "MPL",
    "FINETUNE_",
)


@dataclass(frozen=True)
class Timing:
    """Seconds. The defaults are a cluster's; tests take shorter ones."""

    tick: float = 0.1
    settle: float = 2.0
    """From the first death of a rank until the others' deaths are judged together with it."""
    terminate: float = 1.0
    """From SIGTERM to SIGKILL of a rank. Short: nothing is saved in it, stopping is agreed through the stop flag."""
    grace_margin: float = 10.0
    """Kept free of grace_seconds, for the result's last words."""
    upload_patience: float = 1800.0
    """How long the result's upload is tried again."""
    checkpoint_patience: float = 300.0
    marks_seconds: float = 60.0
    """How long node 0 waits at least for the other nodes' shards of a checkpoint, once its own are there."""
    tracking_patience: float = 30.0
    """How long trackers get at the end for what they don't have yet."""
    store_retries: int = 6
    store_seconds: float = 60.0


@dataclass(frozen=True)
class Node:
    """One pod's part of an attempt."""

    run: run.RunConfig
    rank: int
    termination_log: Path
    environment: Mapping[str, str] = field(repr=False)
    rank_command: tuple[str, ...] = RANK_COMMAND
    timing: Timing = Timing()

    @property
    def paths(self) -> Paths:
        return Paths(Path(self.run.scratch))

    @property
    def leads(self) -> bool:
        """Whether this node writes to the destination and reports progress."""
        return self.rank == 0

    def begin(self) -> None:
        """Takes away what an earlier attempt left on this node's disk, but not what it fetched."""
        for old in (self.paths.events, self.paths.checkpoints, self.paths.export, self.paths.resume):
            shutil.rmtree(old, ignore_errors=True)
        self.paths.stop.unlink(missing_ok=True)
        for new in (self.paths.events, self.paths.checkpoints, self.paths.model):
            new.mkdir(parents=True, exist_ok=True)
        self.paths.run_config.write_text(self.run.model_dump_json(by_alias=True, exclude_none=True))

    @property
    def access(self) -> Access:
        return Access(
            s3=self.run.s3,
            environment=self.environment,
            retries=self.timing.store_retries,
            retry_seconds=self.timing.store_seconds,
        )

    @property
    def rank_environment(self) -> dict[str, str]:
        return {
            key: value
            for key, value in self.environment.items()
            if key in _FOR_RANKS or key.startswith(_PREFIXES_FOR_RANKS)
        }


def termination_log(environment: Mapping[str, str]) -> Path:
    return Path(environment.get(ENV_TERMINATION_LOG, TERMINATION_LOG_PATH))


def parse(environment: Mapping[str, str], timing: Timing = Timing()) -> Node:
    """What this pod shall do. Raises Failed(InvalidConfig) naming the variable or the field."""
    path = Path(environment.get(ENV_RUN_CONFIG, RUN_CONFIG_PATH))
    try:
        config = run.parse(path.read_bytes())
    except OSError as error:
        raise Failed("InvalidConfig", f"{ENV_RUN_CONFIG}: {path} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise Failed("InvalidConfig", f"{path}: {error}") from None
    text = environment.get(ENV_NODE_RANK, "0")
    if not text.isdecimal() or int(text) >= config.world.nodes:
        raise Failed("InvalidConfig", f"{ENV_NODE_RANK}: {text!r} must be 0 to {config.world.nodes - 1}")
    patience = environment.get(ENV_TRACKING_PATIENCE, "")
    if patience.isdecimal():
        timing = replace(timing, tracking_patience=float(patience))
    return Node(config, int(text), termination_log(environment), environment, timing=timing)
