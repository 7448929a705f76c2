"""Groups the in-memory state that the reconciler and the servers of one replica share."""

from __future__ import annotations

from dataclasses import dataclass, field

from finetune_operator.controller.cache import Cache
from finetune_operator.controller.progress_store import ProgressStore
from finetune_operator.controller.workqueue import WorkQueue
from finetune_operator.kube.server_clock import ServerClock


@dataclass(frozen=True)
class ControllerState:
    """Holds the state that is lost when the process ends and rebuilt after a restart."""

    queue: WorkQueue
    cache: Cache = field(default_factory=Cache)
    progress: ProgressStore = field(default_factory=ProgressStore)
    clock: ServerClock = field(default_factory=ServerClock)
