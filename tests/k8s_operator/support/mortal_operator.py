"""An operator that dies at chosen writes and is started again with an empty memory.

It is the real reconciler against a real API server, in a thread of the test. Death is the end of
all of its tasks; what had been committed stays. Lists stand in for the watches: nothing depends on
having seen an event.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from finetune_operator.controller.event_recorder import EventRecorder
from finetune_operator.controller.reconcile import Reconciler
from finetune_operator.controller.resync import resync
from finetune_operator.controller.state import ControllerState
from finetune_operator.controller.workqueue import WorkQueue
from finetune_operator.kube.client import KubeClient, Unavailable, connect
from finetune_operator.settings import Settings

log = logging.getLogger(__name__)

Moment = Literal["before", "committed", "answered"]
"""Before a write is sent; after it was committed, but without its answer; after its answer."""

_WRITES = ("POST", "PUT", "PATCH", "DELETE")
_POLL_SECONDS = 0.1


class Death(BaseException):
    """Ends the operator, as SIGKILL does."""


class MortalOperator:
    """Dies once at each of its writes, at the same moment of each; never without a moment."""

    def __init__(self, kubeconfig: Path, namespace: str, settings: Settings, moment: Moment | None = None) -> None:
        self.writes: dict[str, int] = {}  # by what it writes: how often
        self.deaths: list[str] = []
        self.era = ""  # precedes what is written, so that the same write later is another one
        self._kubeconfig = kubeconfig
        self._namespace = namespace
        self._settings = settings
        self._moment = moment
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="mortal operator", daemon=True)

    def __enter__(self) -> MortalOperator:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=30)
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                asyncio.run(self._live())
            except (Death, asyncio.CancelledError):
                continue
            except BaseException as error:
                log.exception("the operator ended unexpectedly")
                self._error = error
                return

    async def _live(self) -> None:
        """Reconciles until the operator dies or is to stop."""
        client = await connect(1000.0, 1000, lambda *_: None, self._kubeconfig)
        client._api.call_api = self._mortal(client._api.call_api)  # type: ignore[method-assign]
        try:
            state = ControllerState(WorkQueue())
            reconciler = Reconciler(client, state, self._settings, EventRecorder(client, "mortal"))
            while not self._stop.is_set():
                await self._reconcile_all(client, state, reconciler)
                await asyncio.sleep(_POLL_SECONDS)
        finally:
            await client.close()

    async def _reconcile_all(self, client: KubeClient, state: ControllerState, reconciler: Reconciler) -> None:
        try:
            await resync(client, state, (self._namespace,), lambda: None, forget=False)
        except Unavailable:
            return
        while len(state.queue):
            key = await state.queue.take()
            try:
                await reconciler.reconcile(key)
            except Unavailable:
                state.queue.failed(key)
            else:
                state.queue.done(key)

    def _mortal(self, call_api: Any) -> Any:
        """Returns the function that sends all requests, which dies at the first of each write."""

        async def call(method: str, url: str, headers: Any, body: Any, **options: Any) -> Any:
            write = f"{self.era}{_described(method, url, body)}" if method in _WRITES else ""
            first = bool(write) and write not in self.writes
            if write:
                self.writes[write] = self.writes.get(write, 0) + 1
            moment = self._moment if first else None
            if moment:
                self.deaths.append(write)
            if moment == "before":
                raise Death
            response = await call_api(method, url, headers, body, **options)
            if moment is not None:
                await response.read()
            if moment == "committed":
                raise Death
            task = asyncio.current_task()
            if moment == "answered" and task is not None:
                asyncio.get_running_loop().call_soon(task.cancel)  # it goes on to its next wait
            return response

        return call


def _described(method: str, url: str, body: Any) -> str:
    """Returns what a request writes: verb, resource and name, and of a status what it says."""
    path = url.partition("?")[0].split("/namespaces/", 1)[1].split("/")[1:]
    resource, name = path[0], path[1] if len(path) > 1 else ""
    verb = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}[method]
    content: Mapping[str, Any] = json.loads(body) if isinstance(body, str) else body
    if resource == "events":
        return f"{verb} event {content.get('reason', '')}".strip()
    if path[2:] == ["status"]:
        return f"{verb} status {_summary(content['status'])}"
    return f"{verb} {resource} {name or content['metadata']['name']}"


def _summary(status: Mapping[str, Any]) -> str:
    suspended = next((c["reason"] for c in status["conditions"] if c["type"] == "Suspended"), "NotSuspended")
    announced = f" ({suspended})" if suspended != "NotSuspended" else ""
    return f"{status['phase']}{announced}, attempt {status['attempt']}"
