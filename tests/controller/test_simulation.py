"""Thousands of lives of a job in a small model of a cluster, with the operator dying between any two of its writes.

The model is of the API server, the Job controller and the kubelet; decide and status are the real ones. Whatever
happens: never two groups of pods, never an attempt after the end, and at last an end.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controller.builders import NOW, a_job, a_pod, an_attempt, failed
from finetune_api.result import Result
from finetune_api.status import TERMINAL_PHASES, Restarts
from finetune_operator.decide import decide
from finetune_operator.decision import CreateAttempt, DeleteJob
from finetune_operator.observe import SUCCEEDED, Attempt, Observed, Pod, Termination
from finetune_operator.status import seconds_until_due, status

NODES = 2


class Cluster:
    """What is stored, and what the Job controller and the kubelets make of it."""

    def __init__(self) -> None:
        self.job = a_job(
            distribution={"nodes": NODES}, run_policy={"maxRestarts": {"application": 3, "infrastructure": 5}}
        )
        self.attempts: dict[int, Attempt] = {}
        self.strays: tuple[Pod, ...] = ()
        self.created: list[int] = []
        self.now = NOW

    # -- the operator ------------------------------------------------------------------------------------------------

    def turn(self, writes: int) -> None:
        """One turn of the operator that dies after so many writes."""
        seen = Observed(self.job, tuple(self.attempts[n] for n in sorted(self.attempts)), strays=self.strays)
        decision = decide(seen, self.now)
        if decision.say_first and decision.outlook and writes > 0:
            after = status(seen, decision.outlook, self.now)
            if seconds_until_due(seen.job.status, after, None, 30, self.now) is not None:
                self.job = self.job.model_copy(update={"status": after})
                return
        for action in decision.actions:
            if writes == 0:
                return
            writes -= 1
            if isinstance(action, CreateAttempt):
                self._create(action)
            elif isinstance(action, DeleteJob):
                self._delete(action)
        if decision.outlook and writes > 0:
            seen = Observed(self.job, tuple(self.attempts[n] for n in sorted(self.attempts)), strays=self.strays)
            self.job = self.job.model_copy(update={"status": status(seen, decision.outlook, self.now)})

    def _create(self, action: CreateAttempt) -> None:
        assert not self.job.spec.run_policy.suspend
        assert self.job.status.phase not in TERMINAL_PHASES
        assert not self.strays
        assert not any(pod.is_live for attempt in self.attempts.values() for pod in attempt.pods)
        assert all(attempt.job.is_finished for attempt in self.attempts.values())
        # A Job that somebody took away before anybody had told of it is forgotten; its number may come again.
        assert action.number not in self.attempts
        assert action.number > self.job.status.attempt
        self.created.append(action.number)
        pods = tuple(
            replace(a_pod(index, "Pending"), name=f"train-{action.number}-{index}", uid=f"{action.number}-{index}")
            for index in range(NODES)
        )
        time = self.now.isoformat()
        self.attempts[action.number] = an_attempt(action.number, *pods, restarts=action.restarts, created=time)

    def _delete(self, action: DeleteJob) -> None:
        number = next((n for n, attempt in self.attempts.items() if attempt.job.uid == action.uid), None)
        if number is None:
            return
        attempt = self.attempts[number]
        if action.wait and attempt.is_live:
            self.attempts[number] = Attempt(replace(attempt.job, deleting=True), attempt.pods)
        else:
            del self.attempts[number]

    # -- the world ---------------------------------------------------------------------------------------------------

    def happen(self, event: str) -> None:
        number = max(self.attempts, default=0)
        attempt = self.attempts.get(number)
        if event == "time":
            self.now += timedelta(minutes=10)
        elif event in ("suspend", "resume"):
            self._suspend(event == "suspend")
        elif event == "strays end":
            self.strays = ()
        elif attempt is None:
            return
        elif event == "job deleted":
            self.strays += tuple(pod for pod in attempt.pods if pod.is_live)
            del self.attempts[number]
        elif event == "start":
            self._pods(number, lambda pod: replace(pod, phase="Running", started=True) if pod.is_live else pod)
        elif event == "finish":
            self._pods(number, lambda pod: _ended(pod, 0, Result(outcome="succeeded")) if pod.is_live else pod)
        elif event == "leave":
            self._pods(number, lambda pod: _ended(pod, 143, Result(outcome="preempted")) if pod.is_live else pod)
        else:
            first = min((pod.index for pod in attempt.pods if pod.is_live), default=-1)
            self._pods(number, lambda pod: _ended(pod, 1, failed(event)) if pod.index == first else pod)
        self._control_jobs()

    def _suspend(self, value: bool) -> None:
        policy = self.job.spec.run_policy.model_copy(update={"suspend": value})
        spec = self.job.spec.model_copy(update={"run_policy": policy})
        metadata = self.job.metadata.model_copy(update={"generation": self.job.metadata.generation + 1})
        self.job = self.job.model_copy(update={"spec": spec, "metadata": metadata})

    def _pods(self, number: int, change: object) -> None:
        attempt = self.attempts[number]
        self.attempts[number] = Attempt(attempt.job, tuple(change(pod) for pod in attempt.pods))  # type: ignore[operator]

    def _control_jobs(self) -> None:
        """One dead pod fails a Job once nobody of it lives; a deleted Job goes with its last pod."""
        for number, attempt in list(self.attempts.items()):
            if any(pod.is_live for pod in attempt.pods):
                continue
            done = all(pod.phase == SUCCEEDED for pod in attempt.pods)
            if attempt.job.deleting:
                del self.attempts[number]
            elif not attempt.job.is_finished:
                job = replace(attempt.job, complete=done, failed=not done, finished_at=self.now.isoformat())
                self.attempts[number] = Attempt(job, attempt.pods)


def _ended(pod: Pod, code: int, result: Result) -> Pod:
    return replace(
        pod, phase="Failed" if code else SUCCEEDED, started=False, termination=Termination(code), result=result
    )


_EVENTS = (
    "start", "start", "leave", "OutOfMemory", "RankKilled", "PeerLost", "job deleted", "strays end", "suspend",
    "resume", "time", "finish",
)  # fmt: skip
_STEP = st.tuples(st.sampled_from(_EVENTS), st.integers(min_value=0, max_value=4))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(_STEP, max_size=40))
def test_no_crash_and_no_order_of_events_makes_a_second_group(steps: list[tuple[str, int]]) -> None:
    cluster = Cluster()
    for event, writes in steps:
        before = cluster.job.status
        cluster.turn(writes)
        cluster.happen(event)
        if before.phase in TERMINAL_PHASES:
            assert cluster.job.status.phase == before.phase
        assert cluster.job.status.attempt <= max(cluster.created, default=0)
    for event in ("resume", "leave", "leave", "strays end"):
        cluster.happen(event)
        cluster.turn(9)
    for _ in range(6):
        cluster.happen("time")
        cluster.turn(9)
        cluster.happen("finish")
        cluster.turn(9)
    said = cluster.job.status
    assert said.phase in TERMINAL_PHASES
    assert said.attempt in cluster.created
    restarts = said.restarts
    assert restarts == Restarts() or restarts.application <= 3
    assert restarts.infrastructure <= 5
    assert said.restarts_total <= len(cluster.created) - 1
