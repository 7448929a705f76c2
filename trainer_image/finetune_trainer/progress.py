"""Posts progress to the operator, from a thread of its own. Fed by the supervisor's loop on node 0.

Losing a post is harmless: values are absolute, failures are logged once per change, training never waits.
"""

from __future__ import annotations

import http.client
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin, urlsplit

from finetune_api.progress import Progress
from finetune_api.run import ProgressConfig
from finetune_api.status import CheckpointStatus, ModelStatus
from finetune_trainer.gpu import Gpus
from finetune_trainer.log import Log
from finetune_trainer.state import TrainingState, accuracy, loss, margin

_REDIRECTS = 3


def progress_of(
    state: TrainingState,
    *,
    attempt: int,
    phase: str,
    message: str,
    checkpoint: CheckpointStatus | None,
    model: ModelStatus | None,
) -> Progress:
    """What is posted. Pure."""
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
        overfitting=state.overfitting,
        checkpoint=checkpoint,
        model=model,
        data=state.data,
    )


@dataclass(frozen=True)
class Answer:
    """What the operator said; `status` 0 means that nobody answered."""

    status: int
    detail: str = ""

    @property
    def taken(self) -> bool:
        return self.status == 200


def post(config: ProgressConfig, progress: Progress, timeout: float = 5.0) -> Answer:
    """One post, following a replica that isn't leader to the leader. Never raises."""
    try:
        token = Path(config.token_path).read_text().strip()
    except OSError as error:
        return Answer(0, f"no token: {error}")
    body = progress.model_dump_json(by_alias=True, exclude_none=True).encode()
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    url = config.url
    try:
        for _ in range(_REDIRECTS + 1):
            status, location = _once(url, body, headers, timeout)
            if status != 307 or not location:
                return Answer(status)
            url = urljoin(url, location)
        return Answer(307, "too many redirects")
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Answer(0, str(error) or type(error).__name__)


def _once(url: str, body: bytes, headers: dict[str, str], timeout: float) -> tuple[int, str | None]:
    parts = urlsplit(url)
    if parts.hostname is None:
        raise ValueError(f"{url!r} is no URL")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname, parts.port, timeout=timeout)
    try:
        connection.request("POST", parts.path or "/", body=body, headers=headers)
        answer = connection.getresponse()
        answer.read(65536)
        return answer.status, answer.getheader("Location")
    finally:
        connection.close()


class Poster:
    """Posts the newest value at most every `interval_seconds`; a change of phase goes at once. The GPUs are sampled
    when something is posted."""

    def __init__(self, config: ProgressConfig | None, gpus: Gpus, log: Log) -> None:
        self._config = config
        self._gpus = gpus
        self._log = log
        self._changed = threading.Condition()
        self._latest: Progress | None = None
        self._urgent = False
        self._closing = False
        self._said: int | None = None
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        if config is not None:
            self._thread.start()

    def offer(self, progress: Progress) -> None:
        """Takes the newest value; returns at once."""
        if self._config is None:
            return
        with self._changed:
            self._urgent |= self._latest is None or self._latest.phase != progress.phase
            self._latest = progress
            if self._urgent:
                self._changed.notify()

    def close(self, patience: float = 6.0) -> None:
        """Posts the last value, at most `patience` seconds long."""
        if self._config is None:
            return
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout=patience)

    def _run(self) -> None:
        assert self._config is not None  # noqa: S101 (the thread runs only then)
        sent: Progress | None = None
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._urgent or self._closing, self._config.interval_seconds)
                latest, closing, self._urgent = self._latest, self._closing, False
            if latest is not None and (latest != sent or closing):
                self._tell(post(self._config, latest.model_copy(update={"gpus": self._gpus.sample()})))
                sent = latest
            if closing:
                return
            time.sleep(min(0.2, self._config.interval_seconds))

    def _tell(self, answer: Answer) -> None:
        if answer.status == self._said:
            return
        if not answer.taken:
            self._log.warning("progress isn't taken by the operator", status=answer.status, detail=answer.detail)
        elif self._said is not None:
            self._log.info("progress is taken by the operator again")
        self._said = answer.status
