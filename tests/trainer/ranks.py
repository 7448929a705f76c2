"""Runs real ranks on tiny models: writes run.json and the rows, starts the processes, reads what they told."""

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

from finetune_api import events
from finetune_api.resource import EvaluationSpec, FullSpec, LoraSpec, TrainingSpec
from finetune_api.run import CheckpointSpec, DataConfig, JobRef, Location, ModelConfig, RunConfig, WorldConfig
from finetune_trainer.paths import Paths
from trainer import forked
from trainer.faults import Fault
from trainer.forked import Die, Forked

E = TypeVar("E")
K = TypeVar("K")
V = TypeVar("V")
_AT_ONCE = 3  # ranks wait for disks and for each other, so that more than one group has its turn on two cores


_WORDS = "define the noun wander tower light ship fox quick lazy dog again aim move about".split()  # noqa: SIM905


def pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Prompt and completion of mixed lengths, none like another."""
    made = []
    for index in range(count):
        at = index + seed * 1000
        prompt = " ".join(_WORDS[(at * 7 + k) % len(_WORDS)] for k in range(1 + at % 5))
        answer = " ".join(_WORDS[(at * 5 + 3 * k) % len(_WORDS)] for k in range(1 + (at * 3) % 9))
        made.append({"prompt": f"{at}: {prompt}?", "completion": f" {answer}."})
    return made


@dataclass(frozen=True)
class Ended:
    """What a group of ranks left behind."""

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
        return {e.step: e.loss for e in self.events(events.EvalEvent) if e.split == split}

    def decision(self, topic: str) -> events.DecisionEvent:
        return next(event for event in self.events(events.DecisionEvent) if event.topic == topic)

    @property
    def failure(self) -> events.ErrorEvent:
        """The first error of any rank that isn't about a lost peer."""
        told = [e for rank in range(len(self.codes)) for e in self.events(events.ErrorEvent, rank)]
        return min(told, key=lambda event: (event.reason == "PeerLost", event.time))

    def check(self) -> Ended:
        assert set(self.codes) == {0}, self.logs
        return self


@dataclass(frozen=True)
class Job:
    """A run on one machine. `scratch` is made by `prepare`."""

    scratch: Path
    run: RunConfig

    @property
    def paths(self) -> Paths:
        return Paths(self.scratch)

    def node(self, rank: int) -> Paths:
        """The disk of the node that a rank runs on. Node 0's is `paths`."""
        node = rank // self.run.world.processes_per_node
        return Paths(self.scratch / f"node-{node}") if node else self.paths

    def start(self, *, die: Die | None = None) -> Ranks:
        return Ranks(self, die=die)

    def finish(self, timeout: float = 120) -> Ended:
        """Runs to the end; asserts nothing."""
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
    """Fills a scratch folder as the supervisor does. Defaults: LoRA on q and v, no dropout, 8 examples a step.

    `world` ranks on `nodes` nodes; node 1's disk lies in the scratch folder's `node-1`.
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
        model=ModelConfig(location=_place("hf://tiny/model"), dtype=dtype, quantization=quantization),  # type: ignore[arg-type]
        data=DataConfig(
            train=_place("train.jsonl"),
            validation=_place("validation.jsonl") if own_validation else None,
            validation_fraction=validation if isinstance(validation, float) else None,
            test=_place("test.jsonl") if test is not None else None,
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
        ),
        checkpoint=CheckpointSpec(every=every, shards=shards),
        evaluation=EvaluationSpec(**{"samples": samples, "max_new_tokens": 12, **(evaluation or {})}),
        output=_place("out"),
        merge=merge,
        scratch=str(scratch),
    )
    paths.run_config.write_text(json.dumps(run.to_json()))
    for node in range(1, nodes):
        (scratch / f"node-{node}").mkdir()
        for name in ("model", "data", "run.json"):
            (scratch / f"node-{node}" / name).symlink_to(scratch / name)
    return Job(scratch, run)


def _place(uri: str) -> Location:
    return Location(uri=uri, display=uri)


def _write(path: Path, rows: Iterable[Mapping[str, Any]] | str) -> None:
    path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))


def finish_all(jobs: Sequence[Job], timeout: float = 600, faults: Mapping[int, Fault] | None = None) -> list[Ended]:
    """Several jobs of one world size, one after the other in the same processes; all must end well."""
    return [ended.check() for ended in _one_after_the_other(jobs, timeout, faults)]


def _one_after_the_other(
    jobs: Sequence[Job], timeout: float = 600, faults: Mapping[int, Fault] | None = None
) -> list[Ended]:
    ended = Ranks(jobs[0], [job.scratch for job in jobs], faults=faults).wait(timeout)
    return [Ended(job.paths, ended.codes, ended.logs) for job in jobs]


class Checked(dict[K, Ended]):
    """Runs that a test asks for must have ended well; so what went wrong is told by the test, and not by a fixture."""

    def __getitem__(self, key: K) -> Ended:
        return super().__getitem__(key).check()


def finish_each(jobs: Mapping[K, Job]) -> Checked[K]:
    """Jobs of any world sizes: those of one size as `finish_all`, the sizes at the same time."""
    sizes = sorted({job.run.world.size for job in jobs.values()})
    groups = [{name: job for name, job in jobs.items() if job.run.world.size == size} for size in sizes]
    ended = at_once([partial(_one_after_the_other, list(group.values())) for group in groups])
    done = {name: one for group, some in zip(groups, ended, strict=True) for name, one in zip(group, some, strict=True)}
    return Checked((name, done[name]) for name in jobs)


def at_once(tasks: Sequence[Callable[[], V]]) -> list[V]:
    """Things that mostly wait for processes, a few at a time."""
    forked.begin()  # changes the environment for a moment
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return [future.result() for future in [pool.submit(task) for task in tasks]]


class Ranks:
    """Running processes of a job, one a rank."""

    def __init__(
        self,
        job: Job,
        scratches: Sequence[Path] = (),
        *,
        die: Die | None = None,
        faults: Mapping[int, Fault] | None = None,
    ) -> None:
        """`scratches`: many.py instead of one run. `die`: where rank 0 kills itself. `faults`: by rank."""
        self._job = job
        size, here = job.run.world.size, job.run.world.processes_per_node
        port = _free_port()
        job.paths.rank_log(0).parent.mkdir(exist_ok=True)
        self._logs = [job.paths.rank_log(rank) for rank in range(size)]
        self.processes: list[Forked] = []
        for rank in range(size):
            self._logs[rank].touch()
            environment = {
                **os.environ,
                "FINETUNE_SCRATCH": str(job.node(rank).scratch),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank % here),
                "WORLD_SIZE": str(size),
                "LOCAL_WORLD_SIZE": str(here),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
            }
            self.processes.append(
                Forked(environment, self._logs[rank], scratches, None if rank else die, (faults or {}).get(rank))
            )

    def until(self, kind: type[events.Event], count: int = 1, timeout: float = 90) -> None:
        """Waits until rank 0 has told so many events of a kind."""
        end = time.monotonic() + timeout
        while len(self._ended(()).events(kind)) < count:
            assert time.monotonic() < end, self._ended(()).logs
            assert all(process.poll() in (None, 0) for process in self.processes), self._ended(()).logs
            time.sleep(0.005)

    def kill(self) -> Ended:
        """SIGKILL to all."""
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
        return self.wait(30)

    def died(self, timeout: float = 60) -> Ended:
        """Once rank 0 is no more, SIGKILL to the others: a machine that fails. A code of 0 says that it didn't die."""
        self.processes[0].wait(timeout)
        return self.wait(30) if self.processes[0].poll() == 0 else self.kill()

    def wait(self, timeout: float = 120) -> Ended:
        end = time.monotonic() + timeout
        try:
            codes = tuple(p.wait(max(0.1, end - time.monotonic())) for p in self.processes)
        finally:
            for process in self.processes:
                if process.poll() is None:
                    process.kill()
        return self._ended(codes)

    def _ended(self, codes: tuple[int, ...]) -> Ended:
        logs = "\n".join(f"--- rank {i}\n{log.read_text()[-6000:]}" for i, log in enumerate(self._logs))
        return Ended(self._job.paths, codes, logs)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
