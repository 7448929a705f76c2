"""Reconciles one FineTuneJob: observe, decide, act, write status.

It may run twice, late, or after a crash, and keeps no state that mustn't be lost in a restart.
"""

from __future__ import annotations

import logging
import time
from datetime import datetime

from finetune_api.resource import FineTuneJob
from finetune_api.status import TERMINAL_PHASES, Status, read
from finetune_operator.controller.deletion.ending import Ending
from finetune_operator.controller.deletion.finalizer import Finalizer
from finetune_operator.controller.event_recorder import EventRecorder
from finetune_operator.controller.executor import Executor
from finetune_operator.controller.snapshot import JobSnapshot, Key
from finetune_operator.controller.spec_reader import SpecReader
from finetune_operator.controller.state import ControllerState
from finetune_operator.controller.status_writer import StatusWriter
from finetune_operator.controller.warning_events import WarningEvents
from finetune_operator.controller.workqueue import WriteTurns
from finetune_operator.core import decide, plan, reduced_status, status, verdict, write_policy
from finetune_operator.core.actions import Blocked, Decision, DesiredStatus, NameTaken, OutOfDate, SpecRefused
from finetune_operator.core.objects import Observed, seconds_between
from finetune_operator.core.plan import PlanError
from finetune_operator.core.pods.digest import PodsDigests
from finetune_operator.core.pods.offers import NotOffered
from finetune_operator.core.reduced_status import OPERATOR_ERROR, OPERATOR_TOO_OLD, SPEC_UNREADABLE
from finetune_operator.kube.client import ApiError, Conflict, KubeClient, NotFound
from finetune_operator.settings import Settings

log = logging.getLogger(__name__)

_BLOCKED_SECONDS = 10.0
_LOOK_UP_SECONDS = 5.0  # until a pod that no watch reports is looked up again
_UPGRADE_SECONDS = 60.0  # how long the operator may be older than its CRD before a job's status says so
_FIRST_EVENTS_SECONDS = 3.0  # until events are read to explain why a pod doesn't start
_LONGEST_EVENTS_INTERVAL_SECONDS = 30.0
_FIRST_SERVICE_SECONDS = 10.0  # until a group that hasn't trained yet is checked to still have its Service
_SERVICE_INTERVAL_SECONDS = 10.0
_WRITES_AT_A_TIME = 4  # of status: several hundred a second, unless the API server is overloaded


class Reconciler:
    """Reconciles any job; several workers may call it for different jobs at the same time."""

    def __init__(self, client: KubeClient, state: ControllerState, settings: Settings, recorder: EventRecorder) -> None:
        self._client = client
        self._cache = state.cache
        self._queue = state.queue
        self._progress = state.progress
        self._clock = state.clock
        self._settings = settings
        self._recorder = recorder
        self._finalizer = Finalizer(client, state.cache)
        self._executor = Executor(client, state.cache, settings, self._finalizer, state.clock)
        self._warning_events = WarningEvents(client)
        self._specs = SpecReader(client)
        self._ending = Ending(
            client, state, settings, self._executor, self._finalizer, self._specs, recorder, self._warning_events
        )
        self._digests = PodsDigests(settings)
        self._turns = WriteTurns(state.queue, _WRITES_AT_A_TIME)
        self._statuses = StatusWriter(client, state.queue)
        self._differs_since: dict[Key, float] = {}  # when the desired status first differed from the written one

    async def reconcile(self, key: Key) -> None:
        """Reconciles one job. Raises kube.client.Unavailable if it has to be retried later."""
        try:
            await self._reconcile(key)
        finally:
            self._turns.next()

    async def _reconcile(self, key: Key) -> None:
        snapshot = self._cache.snapshot(key)
        if snapshot is None or "deletionTimestamp" in snapshot.body["metadata"]:
            self._forget(key, snapshot)
            if snapshot:
                await self._ending.run(snapshot)
            return
        if await self._executor.look_up(snapshot):
            self._queue.add_after(key, _LOOK_UP_SECONDS)
            snapshot = self._cache.snapshot(key) or snapshot
        now = self._clock.now()
        reading = await self._specs.read(key, snapshot.body)
        job = reading.job
        if job is None:
            remedy = "upgrade the operator or, if the CRD is older than it, the CRD, and correct the field"
            message = f"{reading.problem}; this version of the operator can't read the spec: {remedy}"
            await self._stall(snapshot, SPEC_UNREADABLE, message, now)
            return
        observed = self._observe(snapshot, job)
        decision = decide.decide(observed, now)
        if reading.unknown and decision.creates_pods:
            await self._wait_for_upgrade(snapshot, reading.unknown, now)
            return
        try:
            await self._finalizer.follow(snapshot, job)
            if decision.status_first and await self._write_status_if_due(
                snapshot, observed, decision.desired, now, immediately=True
            ):
                self._queue.add(key)
                return
            desired = await self._act(snapshot, observed, decision)
            observed = self._observe(self._cache.snapshot(key) or snapshot, job)
            await self._write_status_if_due(snapshot, observed, desired, now)
        except OutOfDate:
            self._queue.add(key)
            return
        await self._schedule_requeue(key, observed, decision, now)

    def _observe(self, snapshot: JobSnapshot, job: FineTuneJob) -> Observed:
        """Combines a snapshot with what the cache doesn't contain."""
        return Observed(
            job=job,
            attempts=snapshot.attempts,
            preflight=snapshot.preflight,
            orphaned_pods=snapshot.orphaned_pods,
            warning_events=self._warning_events.messages,
            report=self._progress.get(snapshot.uid),
            image=plan.trainer_image(job, self._settings),
            pods_digest=self._digests.of(job),
        )

    async def _act(self, snapshot: JobSnapshot, observed: Observed, decision: Decision) -> DesiredStatus | None:
        """Carries out the actions.

        Returns the status to write, which depends on whether they succeeded.
        """
        desired = decision.desired
        try:
            for action in decision.actions:
                await self._executor.act(snapshot, observed, action)
        except NameTaken as error:
            return decide.failed_to_start(observed, desired, "NameConflict", str(error)) if desired else None
        except NotOffered as error:
            self._queue.add_after(snapshot.key, _BLOCKED_SECONDS)
            return decide.blocked(observed, desired, str(error), error.reason) if desired else None
        except (SpecRefused, PlanError) as error:
            return decide.failed_to_start(observed, desired, "InvalidSpec", str(error)) if desired else None
        except Blocked as error:
            self._queue.add_after(snapshot.key, _BLOCKED_SECONDS)
            return decide.blocked(observed, desired, str(error)) if desired else None
        return desired

    async def _write_status_if_due(
        self,
        snapshot: JobSnapshot,
        observed: Observed,
        desired: DesiredStatus | None,
        now: datetime,
        *,
        immediately: bool = False,
    ) -> bool:
        """Writes status if it is due, else requeues the job. Returns whether it was written."""
        key = snapshot.key
        before, generation = observed.job.status, observed.job.metadata.generation
        after = status.status(observed, desired, now) if desired else status.acknowledged(before, generation)
        pending = time.monotonic() - self._differs_since.setdefault(key, time.monotonic())
        due = write_policy.seconds_until_due(before, after, pending, self._settings.progress.write_every_seconds, now)
        if due is None:
            self._differs_since.pop(key, None)
        elif due > 0 and not immediately:
            self._queue.add_after(key, due)
        elif immediately:
            await self._write_with_events(snapshot, observed, after, now)
            return True
        elif self._turns.begin(key):
            try:
                await self._write_with_events(snapshot, observed, after, now)
            finally:
                self._turns.end()
            return True
        return False

    async def _write_with_events(self, snapshot: JobSnapshot, observed: Observed, after: Status, now: datetime) -> None:
        await self._write(snapshot, after)
        await self._recorder.record(observed.job, observed.job.status, after, now)

    async def _write(self, snapshot: JobSnapshot, after: Status) -> None:
        """Writes status if the object still has the version that the decision was based on.

        An outdated status therefore never overwrites a newer one. Raises OutOfDate if the version
        has changed.
        """
        namespace, name = snapshot.key
        try:
            body = await self._statuses.apply(snapshot, after)
        except Conflict as error:
            await self._executor.refresh(snapshot)
            raise OutOfDate from error
        except NotFound:
            self._cache.drop_body(snapshot.body)
            return
        if body is None:
            return
        self._differs_since.pop(snapshot.key, None)
        self._cache.put_body(body)
        log.info("status written: %s: %s", after.phase, after.message, extra={"namespace": namespace, "job": name})

    async def report_error(self, key: Key, error: Exception, delay: float) -> None:
        """Says in the status of a job that reconciling it failed unexpectedly. Never raises."""
        snapshot = self._cache.snapshot(key)
        if snapshot is None or "deletionTimestamp" in snapshot.body["metadata"]:
            return
        before = read(snapshot.body.get("status"))
        message = (
            f"the operator can't process this job: {type(error).__name__}; it tries again in {delay:.0f} s, and its "
            "log has the cause"
        )
        after = reduced_status.hindered(before, snapshot.generation, OPERATOR_ERROR, message, self._clock.now())
        reported = any(c.reason == OPERATOR_ERROR for c in before.conditions)
        if before.phase in TERMINAL_PHASES or reported:
            return
        try:
            await self._write(snapshot, after)
        except (ApiError, OutOfDate) as refusal:
            log.warning("the error isn't in status: %s", refusal, extra={"namespace": key[0], "job": key[1]})

    async def _schedule_requeue(self, key: Key, observed: Observed, decision: Decision, now: datetime) -> None:
        """Sets timers for what no watch reports: back-off, deadlines, and warning events."""
        if decision.requeue_after is not None:
            self._queue.add_after(key, max(0.05, decision.requeue_after))
        waiting = observed.current or observed.preflight
        if waiting is None or observed.job.status.phase in TERMINAL_PHASES:
            return
        age = seconds_between(waiting.job.created, now)
        if verdict.needs_service(observed) and not waiting.job.deleting:
            if age >= _FIRST_SERVICE_SECONDS:
                await self._executor.restore_service(observed, _SERVICE_INTERVAL_SECONDS)
            self._queue.add_after(key, max(_FIRST_SERVICE_SECONDS - age, _SERVICE_INTERVAL_SECONDS))
        uids = verdict.needs_warning_events(waiting)
        if not uids:
            return
        if age < _FIRST_EVENTS_SECONDS:
            self._queue.add_after(key, _FIRST_EVENTS_SECONDS - age)
            return
        if await self._warning_events.refresh(observed.job.metadata.namespace, uids):
            self._queue.add(key)
        self._queue.add_after(key, min(max(_FIRST_EVENTS_SECONDS, age / 2), _LONGEST_EVENTS_INTERVAL_SECONDS))

    async def _stall(self, snapshot: JobSnapshot, reason: str, message: str, now: datetime) -> None:
        """Reports that this version of the operator can't continue a job; its phase remains."""
        before = read(snapshot.body.get("status"))
        after = reduced_status.stalled(before, snapshot.generation, reason, message, now)
        if before.phase not in TERMINAL_PHASES and after != before:
            await self._write(snapshot, after)

    async def _wait_for_upgrade(self, snapshot: JobSnapshot, fields: tuple[str, ...], now: datetime) -> None:
        """Leaves a job without new pods that has fields of a newer CRD.

        During an upgrade, the CRD is newer for a few seconds, so this is reported only after a
        while.
        """
        since = self._differs_since.setdefault(snapshot.key, time.monotonic())
        wait = since + _UPGRADE_SECONDS - time.monotonic()
        if wait > 0:
            self._queue.add_after(snapshot.key, wait)
            return
        message = (
            f"{', '.join(fields)}: this operator doesn't know the field, so it creates no pods; upgrade the operator"
        )
        await self._stall(snapshot, OPERATOR_TOO_OLD, message, now)

    def _forget(self, key: Key, snapshot: JobSnapshot | None) -> None:
        """Removes all that is in memory about a job that is gone or being deleted."""
        self._differs_since.pop(key, None)
        self._statuses.forget(key)
        self._specs.forget(key)
        self._queue.forget(key)
        self._turns.forget(key)
        if snapshot:
            self._executor.forget(snapshot.uid)
            self._progress.forget(snapshot.uid)
            self._digests.forget(snapshot.uid)
            self._recorder.forget(snapshot.uid)
            self._warning_events.forget(snapshot.child_uids)
        else:
            self._ending.forget(key)
