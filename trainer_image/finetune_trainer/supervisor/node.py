"""Reads everything that a pod's supervisor is configured with, once at the start, into a Node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from finetune_api.messages import run
from finetune_api.names import (
    ENV_NODE_RANK,
    ENV_RUN_CONFIG,
    ENV_TERMINATION_LOG,
    RENDEZVOUS_FILE,
    RUN_CONFIG_PATH,
    TERMINATION_LOG_PATH,
)
from finetune_api.spec.environment import is_allowed, is_credential
from finetune_trainer.errors import RunError
from finetune_trainer.paths import Paths
from finetune_trainer.reporting.trackers.process import Attempt
from finetune_trainer.storage.schemes import Access
from finetune_trainer.supervisor.processes import RANK_COMMAND

ENV_TRACKING_PATIENCE = "FINETUNE_TRACKING_PATIENCE"

# Only these variables of the supervisor's environment, and those that a job may set, are passed to
# the ranks: no credentials.
_RANK_VARIABLES = (
    "PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV",
    "POD_NAME", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR",
    "GLIBC_TUNABLES",
)  # fmt: skip
_RANK_VARIABLE_PREFIXES = ("CUDA_", "NVIDIA_", "TORCH_", "OMP_", "DS_", "MPL", "FINETUNE_")


@dataclass(frozen=True)
class Timing:
    """Holds the supervisor's timeouts and intervals, in seconds."""

    tick: float = 0.1
    """The loop looks at the ranks this often."""
    settle: float = 2.0
    """Ranks that die within this time after the first one are judged together with it."""
    terminate: float = 1.0
    """A rank gets SIGKILL this long after SIGTERM. It is short because nothing is saved in it:
    ranks agree to stop through the stop flag."""
    grace_margin: float = 10.0
    """This part of grace_seconds is reserved for writing the termination message."""
    operator_timeout: float = 30.0
    """The operator is waited for this long if it has to say who signed a manifest."""
    checkpoint_timeout: float = 300.0
    """The upload of a checkpoint is retried, and waited for at the end, for this long."""
    marker_timeout: float = 60.0
    """Node 0 waits at least this long for the other nodes' shards of a checkpoint after it has
    uploaded its own."""
    tracking_timeout: float = 30.0
    """At the end, trackers have this long to record what they lack."""
    storage_retries: int = 6
    storage_retry_seconds: float = 60.0
    """One request to a storage is retried this often, for this long."""


@dataclass(frozen=True)
class Node:
    """Describes one pod's part of an attempt. `rank` is the rank of the node, not of a process."""

    run: run.RunConfig
    rank: int
    termination_log: Path
    environment: Mapping[str, str] = field(repr=False)
    rank_command: tuple[str, ...] = RANK_COMMAND
    timing: Timing = Timing()
    rendezvous_secret: bytes = field(default=b"", repr=False)
    """What the pods of an attempt know and nobody else; empty if there is one node only."""

    @property
    def paths(self) -> Paths:
        """The paths on this node's scratch disk."""
        return Paths(Path(self.run.scratch))

    @property
    def leads(self) -> bool:
        """True if this node writes the result and reports progress."""
        return self.rank == 0

    @property
    def gpus_of_job(self) -> int:
        """The number of GPUs of all pods, one for each rank; 0 on a CPU."""
        return self.run.world.size if self.run.world.device == "cuda" else 0

    @property
    def tracked_attempt(self) -> Attempt:
        """The attempt as trackers record it."""
        return Attempt(self.run, self.paths, self.environment, self.leads, self.timing.tracking_timeout)

    @property
    def access(self) -> Access:
        """How to open a storage from this pod."""
        return Access(
            s3=self.run.s3,
            gcs=self.run.gcs,
            azure=self.run.azure,
            environment=self.environment,
            retries=self.timing.storage_retries,
            retry_seconds=self.timing.storage_retry_seconds,
        )

    @property
    def rank_environment(self) -> dict[str, str]:
        """The variables that ranks inherit; credentials aren't among them."""
        return {
            key: value
            for key, value in self.environment.items()
            if not is_credential(key)
            and (key in _RANK_VARIABLES or key.startswith(_RANK_VARIABLE_PREFIXES) or is_allowed(key))
        }


def termination_log(environment: Mapping[str, str]) -> Path:
    """Returns the file that the kubelet reads as the termination message."""
    return Path(environment.get(ENV_TERMINATION_LOG, TERMINATION_LOG_PATH))


def parse(environment: Mapping[str, str], timing: Timing = Timing()) -> Node:
    """Returns what this pod is configured to do.

    Raises RunError(InvalidConfig), which names the variable or the field.
    """
    path = Path(environment.get(ENV_RUN_CONFIG, RUN_CONFIG_PATH))
    try:
        config = run.parse(path.read_bytes())
    except OSError as error:
        raise RunError("InvalidConfig", f"{ENV_RUN_CONFIG}: {path} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise RunError("InvalidConfig", f"{path}: {error}") from None
    rank = environment.get(ENV_NODE_RANK, "0")
    if not rank.isdecimal() or int(rank) >= config.world.nodes:
        raise RunError("InvalidConfig", f"{ENV_NODE_RANK}: {rank!r} must be from 0 to {config.world.nodes - 1}")
    tracking_timeout = environment.get(ENV_TRACKING_PATIENCE, "")
    if tracking_timeout.isdecimal():
        timing = replace(timing, tracking_timeout=float(tracking_timeout))
    secret = path.with_name(RENDEZVOUS_FILE)
    return Node(
        config,
        int(rank),
        termination_log(environment),
        environment,
        timing=timing,
        rendezvous_secret=secret.read_bytes() if secret.is_file() else b"",
    )
