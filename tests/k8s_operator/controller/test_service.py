"""The Service of a group is read now and then, however often the job is reconciled."""

from __future__ import annotations

from typing import Any

from finetune_operator.controller.cache import Cache
from finetune_operator.controller.deletion.finalizer import Finalizer
from finetune_operator.controller.executor import Executor
from finetune_operator.settings import Settings
from k8s_operator.support.observed_states import an_observation


class _ApiServer:
    """Has every Service, and counts how often one is read."""

    def __init__(self) -> None:
        self.reads = 0

    async def get(self, resource: str, namespace: str, name: str) -> dict[str, Any]:
        assert (resource, namespace, name) == ("services", "team", "train-ranks")
        self.reads += 1
        return {}


async def _reads(reconciles: int, interval: float) -> int:
    server: Any = _ApiServer()
    server: Any = _ApiServer()
    executor = Executor(server, Cache(), Settings(), Finalizer(server, Cache()))
    for _ in range(reconciles):
        await executor.restore_service(an_observation(), interval)
    reads: int = server.reads
    return reads


async def test_a_service_is_read_once_in_an_interval() -> None:
    assert await _reads(reconciles=5, interval=60.0) == 1
    assert await _reads(reconciles=5, interval=0.0) == 5
