"""Runs real ranks on tiny models: writes run.json and the rows, starts the processes, and reads the
events that they reported."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from finetune_api.messages import events
from finetune_api.messages.run import CheckpointSpec, DataConfig, JobRef, Location, ModelConfig, RunConfig, WorldConfig
from finetune_api.resource import EvaluationSpec, FullSpec, LoraSpec, TrainingSpec
from finetune_trainer.paths import Paths
from trainer.support import forked_ranks
from trainer.support.forked_ranks import ForkedRank, KillPoint, Preparation

E = TypeVar("E")
K = TypeVar("K")
V = TypeVar("V")
_MAX_PARALLEL = 3  # ranks wait for disks and for each other, so more than one group fits on two cores


@dataclass(frozen=True)
class FinishedRun:
    """The exit codes of a run's ranks, their logs, and the events that they wrote."""

    paths: Paths
    codes: tuple[int, ...]
    logs: str

    def events(self, kind: type[E], rank: int = 0) -> list[E]:
        path = self.paths.rank_events(rank)
        lines = path.read_text().splitlines() if path.is_file() else []
        return [event for event in map(events.decode, lines) if isinstance(event, kind)]

    @property
    def losses(self) -> list[float]:
        return [event.loss for event in self.events(events.StepEvent)]

    def evals(self, split: str) -> dict[int, float]:
        """Returns the losses of a split, by step."""
        return {e.step: e.loss for e in self.events(events.EvalEvent) if e.split == split}

    def decision(self, topic: str) -> events.DecisionEvent:
        """Returns the first decision on a topic. Raises StopIteration if there's none."""
        return next(event for event in self.events(events.DecisionEvent) if event.topic == topic)

    @property
    def failure(self) -> events.ErrorEvent:
        """The first error of any rank that isn't about a lost peer."""
        errors = [e for rank in range(len(self.codes)) for e in self.events(events.ErrorEvent, rank)]
        return min(errors, key=lambda event: (event.reason == "PeerLost", event.time))

    def check(self) -> FinishedRun:
        """Asserts that all ranks ended with code 0, and returns the run."""
        assert set(self.codes) == {0}, self.logs
        return self


@dataclass(frozen=True)
class Job:
    """A run on one machine. `prepare` creates its `scratch` folder."""

    scratch: Path
    run: RunConfig

    @property
    def paths(self) -> Paths:
        return Paths(self.scratch)

    def node(self, rank: int) -> Paths:
        """Returns the disk of the node that a rank runs on. Node 0's is `paths`."""
        node = rank // self.run.world.processes_per_node
        return Paths(self.scratch / f"node-{node}") if node else self.paths

    def start(self, *, kill_point: KillPoint | None = None) -> RunningRanks:
        return RunningRanks(self, kill_point=kill_point)

    def finish(self, timeout: float = 120) -> FinishedRun:
        """Waits for the run's end, and asserts nothing about it."""
        return self.start().wait(timeout)


def prepare(
    scratch: Path,
    model: Path,
    rows: Iterable[Mapping[str, Any]] | str,
    *,
    world: int = 1,
    nodes: int = 1,
    strategy: str = "ddp",
    offload: str = "none",
    sequence: int = 1,
    lora: Mapping[str, Any] | None = None,
    full: bool | FullSpec = False,
    validation: Iterable[Mapping[str, Any]] | float | None = None,
    test: Iterable[Mapping[str, Any]] | None = None,
    data: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    every: int | str = "auto",
    shards: Literal["auto", "always", "never"] = "auto",
    samples: int = 0,
    merge: bool = False,
    evaluation: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    quantization: str = "none",
    resume: Path | None = None,
) -> Job:
    """Fills a scratch folder as the supervisor does.

    The defaults are LoRA on q and v, no dropout, and 8 examples a step. `world` ranks run on
    `nodes` nodes; node 1's disk is the folder `node-1` in `scratch`. `sequence` ranks share each
    row.
    """
    paths = Paths(scratch)
    paths.data("train").parent.mkdir(parents=True, exist_ok=True)
    paths.model.symlink_to(model)
    _write(paths.data("train"), rows)
    own_validation = validation is not None and not isinstance(validation, float)
    if own_validation:
        _write(paths.data("validation"), validation)  # type: ignore[arg-type]
    if test is not None:
        _write(paths.data("test"), test)
    if resume is not None:
        paths.resume.symlink_to(resume)
    run = RunConfig(
        job=JobRef(namespace="default", name="tiny", uid="u-1", attempt=1),
        model=ModelConfig(location=_location("hf://tiny/model"), dtype=dtype, quantization=quantization),  # type: ignore[arg-type]
        data=DataConfig(
            train=_location("train.jsonl"),
            validation=_location("validation.jsonl") if own_validation else None,
            validation_fraction=validation if isinstance(validation, float) else None,
            test=_location("test.jsonl") if test is not None else None,
            **{"max_sequence_length": 96, **(data or {})},
        ),
        method="full" if full else "lora",
        lora=None if full else LoraSpec(**{"rank": 4, "alpha": 8, "dropout": 0.0, **(lora or {})}),
        full=full if isinstance(full, FullSpec) else None,
        training=TrainingSpec(
            **{"global_batch_size": 8, "learning_rate": 1e-2, "warmup_ratio": 0.0, "max_steps": 6, **(training or {})}
        ),
        world=WorldConfig(
            nodes=nodes,
            processes_per_node=world // nodes,
            strategy=strategy,
            offload=offload,  # type: ignore[arg-type]
            sequence_parallel_size=sequence,
        ),
        checkpoint=CheckpointSpec(every=every, shards=shards),
        evaluation=EvaluationSpec(**{"samples": samples, "max_new_tokens": 12, **(evaluation or {})}),
        output=_location("out"),
        merge=merge,
        scratch=str(scratch),
    )
    paths.run_config.write_text(json.dumps(run.to_json()))
    for node in range(1, nodes):
        (scratch / f"node-{node}").mkdir()
        for name in ("model", "data", "run.json", *(["resume"] if resume is not None else [])):
            (scratch / f"node-{node}" / name).symlink_to(scratch / name)
    return Job(scratch, run)


def _location(uri: str) -> Location:
    return Location(uri=uri, display=uri)


def _write(path: Path, rows: Iterable[Mapping[str, Any]] | str) -> None:
    path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))


def finish_all(
    jobs: Sequence[Job], timeout: float = 600, faults: Mapping[int, Preparation] | None = None
) -> list[FinishedRun]:
    """Runs jobs of one world size in sequence in the same processes; all must succeed."""
    return [run.check() for run in _run_in_sequence(jobs, timeout, faults)]


def _run_in_sequence(
    jobs: Sequence[Job], timeout: float = 600, faults: Mapping[int, Preparation] | None = None
) -> list[FinishedRun]:
    group = RunningRanks(jobs[0], [job.scratch for job in jobs], faults=faults).wait(timeout)
    return [FinishedRun(job.paths, group.codes, group.logs) for job in jobs]


class CheckedRuns(dict[K, FinishedRun]):
    """Runs whose success is asserted when a test reads one, so a failed run fails that test instead
    of a fixture."""

    def __getitem__(self, key: K) -> FinishedRun:
        return super().__getitem__(key).check()


def finish_each(jobs: Mapping[K, Job], preparation: Preparation | None = None) -> CheckedRuns[K]:
    """Runs jobs of any world sizes: those of one size in sequence, the sizes at the same time.

    `preparation` changes the process of every rank.
    """
    sizes = sorted({job.run.world.size for job in jobs.values()})
    groups = [{name: job for name, job in jobs.items() if job.run.world.size == size} for size in sizes]
    runs = in_parallel(
        [
            partial(
                _run_in_sequence,
                list(group.values()),
                faults=None if preparation is None else dict.fromkeys(range(size), preparation),
            )
            for size, group in zip(sizes, groups, strict=True)
        ]
    )
    finished = {
        name: run for group, own in zip(groups, runs, strict=True) for name, run in zip(group, own, strict=True)
    }
    return CheckedRuns((name, finished[name]) for name in jobs)


def in_parallel(tasks: Sequence[Callable[[], V]]) -> list[V]:
    """Returns the results of tasks that mostly wait for processes; a few run at a time."""
    forked_ranks.start_server()  # changes the environment for a moment
    with ThreadPoolExecutor(_MAX_PARALLEL) as pool:
        return [future.result() for future in [pool.submit(task) for task in tasks]]


class RunningRanks:
    """The running processes of a job, one for each rank."""

    def __init__(
        self,
        job: Job,
        scratches: Sequence[Path] = (),
        *,
        kill_point: KillPoint | None = None,
        faults: Mapping[int, Preparation] | None = None,
    ) -> None:
        """Starts the processes.

        If `scratches` is set, each process does the runs of these folders in sequence (see
        `run_sequence`). Rank 0 kills itself at `kill_point`. `faults` are by rank.
        """
        self._job = job
        size, per_node = job.run.world.size, job.run.world.processes_per_node
        port = free_port()
        job.paths.rank_log(0).parent.mkdir(exist_ok=True)
        self._logs = [job.paths.rank_log(rank) for rank in range(size)]
        self.processes: list[ForkedRank] = []
        for rank in range(size):
            self._logs[rank].touch()
            environment = {
                **os.environ,
                "FINETUNE_SCRATCH": str(job.node(rank).scratch),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank % per_node),
                "WORLD_SIZE": str(size),
                "LOCAL_WORLD_SIZE": str(per_node),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
            }
            self.processes.append(
                ForkedRank(
                    environment, self._logs[rank], scratches, None if rank else kill_point, (faults or {}).get(rank)
                )
            )

    def wait_for_events(self, kind: type[events.Event], count: int = 1, timeout: float = 90) -> None:
        """Waits until rank 0 has reported `count` events of a kind. Asserts that nothing fails
        before."""
        deadline = time.monotonic() + timeout
        while len(self._finished(()).events(kind)) < count:
            assert time.monotonic() < deadline, self._finished(()).logs
            assert all(process.poll() in (None, 0) for process in self.processes), self._finished(()).logs
            time.sleep(0.005)

    def kill(self) -> FinishedRun:
        """Sends SIGKILL to all ranks."""
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
        return self.wait(30)

    def wait_for_crash(self, timeout: float = 60) -> FinishedRun:
        """Kills the other ranks once rank 0 has ended, like a machine that fails. An exit code of 0
        means that rank 0 wasn't killed."""
        self.processes[0].wait(timeout)
        return self.wait(30) if self.processes[0].poll() == 0 else self.kill()

    def wait(self, timeout: float = 120) -> FinishedRun:
        """Waits until all ranks have ended. After `timeout` seconds, raises TimeoutError and kills
        them."""
        deadline = time.monotonic() + timeout
        try:
            codes = tuple(p.wait(max(0.1, deadline - time.monotonic())) for p in self.processes)
        finally:
            for process in self.processes:
                if process.poll() is None:
                    process.kill()
        return self._finished(codes)

    def _finished(self, codes: tuple[int, ...]) -> FinishedRun:
        logs = "\n".join(f"--- rank {i}\n{log.read_text()[-6000:]}" for i, log in enumerate(self._logs))
        return FinishedRun(self._job.paths, codes, logs)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
