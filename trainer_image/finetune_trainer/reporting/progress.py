"""Posts progress to the operator from a thread of its own.

A lost post is harmless: the values are absolute, a failure is logged when the response changes, and
training never waits for a post.
"""

from __future__ import annotations

import http.client
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin, urlsplit

from finetune_api.messages.progress import PostAnswer, Progress, Storing
from finetune_api.messages.run import ProgressConfig
from finetune_api.status import ArtifactStatus, CheckpointStatus, ModelStatus, StragglerStatus
from finetune_trainer.log import Log
from finetune_trainer.reporting.gpus.watch import Gpus
from finetune_trainer.reporting.run_state import RunState, accuracy, loss, margin

_MAX_REDIRECTS = 3


@dataclass(frozen=True)
class Stored:
    """Says what the destination holds, whether it accepts more, and whose signature that has."""

    checkpoint: CheckpointStatus | None = None
    storing: Storing | None = None
    artifact: ArtifactStatus | None = None
    signer: str | None = None


def progress_of(
    state: RunState,
    *,
    attempt: int,
    phase: str,
    message: str,
    stored: Stored,
    model: ModelStatus | None,
) -> Progress:
    """Returns the message to post. It is pure."""
    return Progress(
        attempt=attempt,
        phase=phase,
        message=message,
        step=state.step,
        total_steps=state.total_steps,
        epoch=state.last.epoch if state.last else 0.0,
        train_loss=loss(state.last),
        eval_loss=loss(state.evaluated),
        reward_margin=margin(state.last),
        reward_accuracy=accuracy(state.last),
        eval_reward_margin=margin(state.evaluated),
        eval_reward_accuracy=accuracy(state.evaluated),
        test_loss_before=loss(state.test_before),
        test_loss_after=loss(state.test_after),
        test_reward_margin=margin(state.test_after),
        test_reward_accuracy=accuracy(state.test_after),
        learning_rate=state.last.learning_rate if state.last else None,
        grad_norm=state.last.grad_norm if state.last else None,
        tokens_per_second=state.tokens_per_second,
        tokens=state.tokens,
        samples=state.samples,
        eta_seconds=state.eta_seconds,
        skipped_steps=state.skipped_steps,
        straggler=_straggler(state),
        overfitting=state.overfitting,
        checkpoint=stored.checkpoint,
        storing=stored.storing,
        artifact=stored.artifact,
        signer=stored.signer,
        model=model,
        data=state.data,
    )


def _straggler(state: RunState) -> StragglerStatus | None:
    event = state.straggler
    return None if event is None else StragglerStatus(rank=event.rank, node=event.node, ratio=round(event.ratio, 2))


@dataclass(frozen=True)
class PostResult:
    """Holds the operator's response. `status` is an HTTP status, or 0 without a response; `signers`
    are the public keys by which earlier pods of the job have signed."""

    status: int
    detail: str = ""
    signers: tuple[str, ...] = ()

    @property
    def accepted(self) -> bool:
        """Whether the operator has stored the progress."""
        return self.status == 200


def post(config: ProgressConfig, progress: Progress, timeout: float = 5.0) -> PostResult:
    """Posts once, following redirects from a replica that isn't the leader. Never raises.

    `timeout` is in seconds and applies to each request.
    """
    try:
        token = Path(config.token_path).read_text().strip()
    except OSError as error:
        return PostResult(0, f"no token: {error}")
    body = progress.model_dump_json(by_alias=True, exclude_none=True).encode()
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    url = config.url
    try:
        for _ in range(_MAX_REDIRECTS + 1):
            status, location, answer = _post_once(url, body, headers, timeout)
            if status != 307 or not location:
                return PostResult(status, signers=_signers(answer))
            url = urljoin(url, location)
        return PostResult(307, "too many redirects")
    except (OSError, http.client.HTTPException, ValueError) as error:
        return PostResult(0, str(error) or type(error).__name__)


def _signers(answer: bytes) -> tuple[str, ...]:
    """Returns the public keys in the operator's answer; none if an older operator has sent it."""
    try:
        return PostAnswer.model_validate_json(answer).signers
    except ValueError:
        return ()


def _post_once(url: str, body: bytes, headers: dict[str, str], timeout: float) -> tuple[int, str | None, bytes]:
    """Returns the HTTP status, the Location header and the body."""
    parts = urlsplit(url)
    if parts.hostname is None:
        raise ValueError(f"{url!r} is not a URL")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname, parts.port, timeout=timeout)
    try:
        connection.request("POST", parts.path or "/", body=body, headers=headers)
        response = connection.getresponse()
        answer = response.read(65536)
        return response.status, response.getheader("Location"), answer
    finally:
        connection.close()


def _is_news(before: Progress, after: Progress) -> bool:
    """Whether somebody who watches the job would want to see a change at once."""
    return before.phase != after.phase or (before.step == 0) != (after.step == 0)


class Poster:
    """Posts the latest value at most every `interval_seconds`, and news immediately: another phase,
    and the first step.

    The GPUs are sampled when a value is posted.
    """

    def __init__(self, config: ProgressConfig | None, gpus: Gpus, log: Log) -> None:
        self._config = config
        self._gpus = gpus
        self._log = log
        self._changed = threading.Condition()
        self._latest: Progress | None = None
        self._urgent = False
        self._closing = False
        self._logged_status: int | None = None
        self._signers: tuple[str, ...] | None = None
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        if config is not None:
            self._thread.start()

    def offer(self, progress: Progress) -> None:
        """Replaces the value to post. Returns immediately."""
        if self._config is None:
            return
        with self._changed:
            self._urgent |= self._latest is None or _is_news(self._latest, progress)
            self._latest = progress
            if self._urgent:
                self._changed.notify()

    def signers(self, timeout: float) -> tuple[str, ...]:
        """Returns the public keys that the operator knows. Waits until it has answered, for at most
        `timeout` seconds."""
        with self._changed:
            if self._config is not None:
                self._changed.wait_for(lambda: self._signers is not None, timeout)
            return self._signers or ()

    def close(self, timeout: float = 6.0) -> None:
        """Posts the last value and stops the thread. Waits for at most `timeout` seconds."""
        if self._config is None:
            return
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout=timeout)

    def _run(self) -> None:
        assert self._config is not None  # noqa: S101 (the thread runs only then)
        sent: Progress | None = None
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._urgent or self._closing, self._config.interval_seconds)
                latest, closing, self._urgent = self._latest, self._closing, False
            if latest is not None and (latest != sent or closing):
                result = post(self._config, latest.model_copy(update={"gpus": self._gpus.sample()}))
                self._log_change(result)
                self._keep_signers(result)
                sent = latest
            if closing:
                return
            time.sleep(min(0.2, self._config.interval_seconds))

    def _keep_signers(self, result: PostResult) -> None:
        if result.accepted:
            with self._changed:
                self._signers = result.signers
                self._changed.notify_all()

    def _log_change(self, result: PostResult) -> None:
        """Logs the first failure, and each change of the status after that."""
        if result.status == self._logged_status:
            return
        if not result.accepted:
            self._log.warning("the operator didn't accept progress", status=result.status, detail=result.detail)
        elif self._logged_status is not None:
            self._log.info("the operator accepts progress again")
        self._logged_status = result.status
