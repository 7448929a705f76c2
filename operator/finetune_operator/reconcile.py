"""reconcile: one turn for one FineTuneJob: observe → decide → act → say. May run twice, late, or after a crash.

Called by the workers that empty the queue. It remembers nothing that a restart would miss.
"""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from finetune_api import errors
from finetune_api.resource import FineTuneJob
from finetune_api.status import TERMINAL_PHASES, Status
from finetune_operator import decide, judge, status
from finetune_operator.act import Blocked, Hands, NameTaken, OutOfDate, SpecRefused
from finetune_operator.cache import Cache, Family, Key
from finetune_operator.cluster import Cluster, Conflict, NotFound
from finetune_operator.decision import Decision, Outlook
from finetune_operator.observe import Attempt, Observed, seconds_between
from finetune_operator.plan import PlanError
from finetune_operator.queue import Queue
from finetune_operator.readings import Readings
from finetune_operator.recorder import Recorder
from finetune_operator.reports import Reports
from finetune_operator.settings import Settings
from finetune_operator.words import Words

log = logging.getLogger(__name__)

_BLOCKED_SECONDS = 10.0
_PATIENCE_SECONDS = 3.0  # before anybody is asked why a pod doesn't start
_LONGEST_PATIENCE_SECONDS = 30.0


class Reconciler:
    """All that a turn needs. One for all jobs."""

    def __init__(
        self, cluster: Cluster, cache: Cache, queue: Queue, reports: Reports, settings: Settings, recorder: Recorder
    ) -> None:
        self._cluster = cluster
        self._cache = cache
        self._queue = queue
        self._reports = reports
        self._settings = settings
        self._recorder = recorder
        self._hands = Hands(cluster, cache, settings)
        self._words = Words(cluster)
        self._readings = Readings()
        self._noticed: dict[Key, float] = {}  # when status first differed from what is written

    async def reconcile(self, key: Key) -> None:
        """One turn. Raises cluster.Unavailable where the API server has to be asked again later."""
        family = self._cache.family(key)
        if family is None or "deletionTimestamp" in family.body["metadata"]:
            self._forget(key, family)
            return
        now = datetime.now(UTC)
        try:
            job = self._readings.job(key, family.body)
        except ValidationError as error:
            await self._refuse(family, error, now)
            return
        seen = self._observe(family, job)
        decision = decide.decide(seen, now)
        try:
            if decision.say_first and await self._say(key, family, seen, decision.outlook, now, at_once=True):
                self._queue.add(key)
                return
            outlook = await self._act(family, seen, decision)
            seen = self._observe(self._cache.family(key) or family, job)
            await self._say(key, family, seen, outlook, now)
        except OutOfDate:
            self._queue.add(key)
            return
        await self._look_again_later(key, seen, decision, now)

    def _observe(self, family: Family, job: FineTuneJob) -> Observed:
        return Observed(
            job=job,
            attempts=family.attempts,
            preflight=family.preflight,
            strays=family.strays,
            words=self._words.said,
            report=self._reports.get(family.uid),
        )

    async def _act(self, family: Family, seen: Observed, decision: Decision) -> Outlook | None:
        """What is to be said once the actions are done, or weren't possible."""
        outlook = decision.outlook
        try:
            for action in decision.actions:
                await self._hands.act(family, seen, action)
        except NameTaken as taken:
            return decide.failed_to_start(seen, outlook, "NameConflict", str(taken)) if outlook else None
        except (SpecRefused, PlanError) as refused:
            return decide.failed_to_start(seen, outlook, "InvalidSpec", str(refused)) if outlook else None
        except Blocked as blocked:
            self._queue.add_after((seen.job.metadata.namespace, seen.job.metadata.name), _BLOCKED_SECONDS)
            return decide.blocked(seen, outlook, str(blocked)) if outlook else None
        return outlook

    async def _say(
        self,
        key: Key,
        family: Family,
        seen: Observed,
        outlook: Outlook | None,
        now: datetime,
        at_once: bool = False,
    ) -> bool:
        """Writes status if it is due; else sees to it that it will be. Returns whether it was written."""
        before, generation = seen.job.status, seen.job.metadata.generation
        after = status.status(seen, outlook, now) if outlook else status.acknowledged(before, generation)
        noticed = time.monotonic() - self._noticed.setdefault(key, time.monotonic())
        due = status.seconds_until_due(before, after, noticed, self._settings.progress.write_every_seconds, now)
        if due is None:
            self._noticed.pop(key, None)
        elif due > 0 and not at_once:
            self._queue.add_after(key, due)
        else:
            await self._write(key, family, after)
            await self._recorder.record(seen.job, before, after, now)
            return True
        return False

    async def _write(self, key: Key, family: Family, after: Status) -> None:
        """On the version that was decided on, so that a status that is out of date never overwrites a newer one."""
        namespace, name = key
        try:
            body = await self._cluster.apply_status(namespace, name, family.resource_version, after.to_json())
        except Conflict as error:
            await self._hands.refresh(family)
            raise OutOfDate from error
        except NotFound:
            self._cache.drop_body(family.body)
            return
        self._noticed.pop(key, None)
        self._cache.put_body(body)
        log.info("%s: %s", after.phase, after.message, extra={"namespace": namespace, "job": name})

    async def _look_again_later(self, key: Key, seen: Observed, decision: Decision, now: datetime) -> None:
        """Timers for what no event will tell: back-off, deadlines, and words about pods that don't start."""
        if decision.recheck is not None:
            self._queue.add_after(key, max(0.05, decision.recheck))
        waiting = seen.current or seen.preflight
        if waiting is None or seen.job.status.phase in TERMINAL_PHASES:
            return
        uids = judge.needs_words(waiting)
        if not uids:
            return
        age = seconds_between(waiting.job.created, now)
        if age < _PATIENCE_SECONDS:
            self._queue.add_after(key, _PATIENCE_SECONDS - age)
            return
        if await self._words.ask(seen.job.metadata.namespace, uids):
            self._queue.add(key)
        self._queue.add_after(key, min(max(_PATIENCE_SECONDS, age / 2), _LONGEST_PATIENCE_SECONDS))

    async def _refuse(self, family: Family, error: ValidationError, now: datetime) -> None:
        """A body that this version can't read: it fails, unless it has ended already."""
        before = _readable_status(family.body)
        if before.phase in TERMINAL_PHASES:
            return
        meta = family.body["metadata"]
        after = status.unreadable(before, int(meta.get("generation", 1)), "; ".join(errors.describe(error)), now)
        await self._write((meta["namespace"], meta["name"]), family, after)

    def _forget(self, key: Key, family: Family | None) -> None:
        self._noticed.pop(key, None)
        self._readings.forget(key)
        self._queue.forget(key)
        if family:
            self._reports.forget(family.uid)
            self._words.forget(_uids(family))


def _uids(family: Family) -> tuple[str, ...]:
    children: tuple[Attempt, ...] = (*family.attempts, *((family.preflight,) if family.preflight else ()))
    return tuple(uid for child in children for uid in (child.job.uid, *(pod.uid for pod in child.pods)))


def _readable_status(body: Any) -> Status:
    try:
        return Status.model_validate(body.get("status") or {})
    except ValidationError:
        return Status()
