"""Trackers with a real supervisor: files that TensorBoard reads, a real MLflow server, and servers
that misbehave."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from finetune_api.messages.run import MlflowConfig, TrackingConfig, WandbConfig
from finetune_api.status import ArtifactStatus
from finetune_trainer.reporting.trackers.mlflow_tracker import Mlflow
from finetune_trainer.reporting.trackers.scalars import Point
from finetune_trainer.reporting.trackers.worker import Ending, Subject
from localcluster import mlflow as mlflow_server
from trainer.support import supervisor_process
from trainer.support.network_outage import Relay
from trainer.support.supervisor_process import FinishedSupervisor, JobSetup


@pytest.fixture(scope="module")
def programs() -> Path:
    """The bin/ folder of an environment with MLflow's server."""
    return mlflow_server.programs()


@pytest.fixture(scope="module", autouse=True)
def starting(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """MLflow's server, started early because it takes long: tests that don't need it run
    meanwhile."""
    folder = tmp_path_factory.mktemp("mlflow")
    port = _free_port()
    command = mlflow_server.command(programs, folder, "127.0.0.1", port)
    environment = {**os.environ, **dict(mlflow_server.ENVIRONMENT)}
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=folder, env=environment)
    yield f"http://127.0.0.1:{port}", folder / "log"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, 9)
    server.wait()


@pytest.fixture(scope="module")
def mlflow(starting: tuple[str, Path]) -> str:
    url, log = starting
    supervisor_process.wait_until(lambda: _answers(f"{url}/health") or "Traceback" in log.read_text(), timeout=180)
    assert _answers(f"{url}/health"), log.read_text()
    return url


@pytest.fixture
def setup(tmp_path: Path) -> JobSetup:
    return JobSetup(tmp_path).write_inputs()


def ask(url: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """Call MLflow's REST API without its client, and return the parsed answer."""
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(f"{url}/api/2.0/mlflow/{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def runs_of(url: str, experiment: str) -> list[Any]:
    answer = ask(url, f"experiments/get-by-name?experiment_name={experiment}")
    return ask(url, "runs/search", {"experiment_ids": [answer["experiment"]["experiment_id"]]})["runs"]  # type: ignore[no-any-return]


def with_mlflow(setup: JobSetup, url: str, name: str, **more: Any) -> JobSetup:
    return setup.with_changes(tracking=TrackingConfig(mlflow=MlflowConfig(uri=url, experiment=name, **more)))


def test_tensorboard_reads_the_curves_that_are_stored_next_to_the_result(setup: JobSetup, programs: Path) -> None:
    run = setup.with_changes(tracking=TrackingConfig(tensorboard=True)).run()
    assert supervisor_process.supervise(run, setup.folder).code == 0
    (file,) = (setup.output / "finetune" / "tensorboard").iterdir()
    assert file.name.startswith("events.out.tfevents.")
    assert file.name.endswith(".job")
    assert f"finetune/tensorboard/{file.name}" in [
        entry.path for entry in supervisor_process.manifest(setup.output).files
    ]
    read = (
        "import json, sys\n"
        "from tensorboard.backend.event_processing.event_accumulator import EventAccumulator\n"
        "all = EventAccumulator(sys.argv[1]).Reload()\n"
        "tags = all.Tags()['scalars']\n"
        "print(json.dumps({t: [(e.step, round(e.value, 5)) for e in all.Scalars(t)] for t in tags}))\n"
    )
    out = subprocess.run([programs / "python", "-c", read, file.parent], capture_output=True, text=True, check=True)
    scalars = json.loads(out.stdout)
    assert scalars["train/loss"] == [[1, 3.0], [2, 1.5], [3, 1.0], [4, 0.75]]
    assert scalars["validation/loss"] == [[4, 0.9]]
    assert scalars["test/loss"] == [[0, 4.0], [4, 1.5]]
    assert scalars["test/rougeL"] == [[0, 0.1], [4, 0.3]]
    assert {"train/learning_rate", "train/grad_norm", "train/tokens_per_second"} <= set(scalars)


def test_curves_are_there_during_training_and_continue_after_a_restart(setup: JobSetup, tmp_path: Path) -> None:
    setup = setup.with_changes(tracking=TrackingConfig(tensorboard=True))
    behavior = {"steps": 6, "hold": str(tmp_path / "go"), "hold_at": 3}
    running = supervisor_process.start(setup.run(), setup.folder, behavior=behavior)
    folder = setup.output / "finetune" / "tensorboard"
    supervisor_process.wait_until(lambda: folder.is_dir() and any(folder.iterdir()))
    running.terminate()
    assert running.wait().last.outcome == "preempted"
    (before,) = folder.iterdir()
    size = before.stat().st_size
    supervisor_process.supervise(setup.run(attempt=2), setup.folder, behavior={"steps": 6})
    (after,) = folder.iterdir()
    assert after.name == before.name
    assert after.stat().st_size > size


class _Misbehaving(BaseHTTPRequestHandler):
    how = ""

    def do_GET(self) -> None:
        if self.how == "slow":
            time.sleep(60)
        self.send_response(500 if self.how == "500" else 200)
        self.end_headers()
        self.wfile.write(b"this is no JSON, and the key is tr0ub4dor")

    do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def misbehaving(how: str) -> Iterator[str]:
    if how == "down":
        yield f"http://127.0.0.1:{_free_port()}"
        return
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Misbehaving,), {"how": how}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_server_that_misbehaves_costs_the_job_nothing(tmp_path: Path) -> None:
    """The result is the same, what is missing is logged once, and no key is shown. All servers are
    tried at the same time."""
    running = {}
    with contextlib.ExitStack() as servers:
        for how in ("down", "slow", "500", "nonsense"):
            setup = JobSetup(tmp_path / how)
            setup.folder.mkdir()
            setup.write_inputs()
            url = servers.enter_context(misbehaving(how))
            key = supervisor_process.secret(setup.folder / "secret", {"MLFLOW_TRACKING_TOKEN": "tr0ub4dor"})
            job = with_mlflow(setup, url, "x", credentials=str(key))
            behavior = {"hold": str(setup.folder / "go"), "hold_at": 3}
            patience = {"FINETUNE_TRACKING_PATIENCE": "1"}
            running[how] = (
                setup,
                supervisor_process.start(job.run(), setup.folder, behavior=behavior, environment=patience),
            )
        for how, (setup, process) in running.items():
            log = Path(setup.run().scratch) / "events" / "tracking.jsonl"
            if how != "slow":
                supervisor_process.wait_until(lambda log=log: log.exists() and log.stat().st_size > 0, timeout=60)  # type: ignore[misc]
            (setup.folder / "go").touch()
            ended = process.wait()
            assert (ended.code, ended.last.outcome) == (0, "succeeded"), ended.output
            assert supervisor_process.manifest(setup.output).step == 4
            lines = [json.loads(line) for line in ended.output.splitlines() if line.startswith("{")]
            once = 0 if how == "slow" else 1
            assert sum("can't record" in line["message"] for line in lines) == once, ended.output
            assert sum("didn't receive everything in 1 s" in line["message"] for line in lines) == 1
            everything = ended.output + "".join(
                path.read_text(errors="replace")
                for path in setup.folder.rglob("*")
                if path.is_file() and path.parent.name != "secret"
            )
            assert "tr0ub4dor" not in everything


def test_wandb_offline_leaves_its_files_next_to_the_result(setup: JobSetup) -> None:
    config = TrackingConfig(wandb=WandbConfig(project="support", mode="offline"))
    ended = supervisor_process.supervise(setup.with_changes(tracking=config).run(), setup.folder)
    assert ended.code == 0, ended.output
    (file,) = (setup.output / "finetune" / "wandb").rglob("*.wandb")
    assert any(entry.path.endswith(file.name) for entry in supervisor_process.manifest(setup.output).files)
    assert b"train/loss" in file.read_bytes()
    assert "wandb: done" in ended.output


def test_the_tracker_process_may_die(setup: JobSetup, tmp_path: Path) -> None:
    job = with_mlflow(setup, f"http://127.0.0.1:{_free_port()}", "x")
    running = supervisor_process.start(job.run(), setup.folder, behavior={"hold": str(tmp_path / "go"), "hold_at": 3})
    supervisor_process.wait_until(lambda: _trackers_of(running.process.pid))
    os.kill(_trackers_of(running.process.pid)[0], 9)
    (tmp_path / "go").touch()
    ended: FinishedSupervisor = running.wait()
    assert (ended.code, ended.last.outcome) == (0, "succeeded"), ended.output
    assert ended.output.count("the tracker process died; training continues") == 1


def test_mlflow_gets_everything_although_it_was_down_for_a_while(setup: JobSetup, mlflow: str, tmp_path: Path) -> None:
    with Relay(mlflow) as relay:
        relay.cut()
        job = with_mlflow(setup, relay.url, "complete", registered_model="support")
        running = supervisor_process.start(
            job.run(), setup.folder, behavior={"hold": str(tmp_path / "go"), "hold_at": 3}
        )
        supervisor_process.wait_until(lambda: relay.refused > 0, timeout=60)
        relay.restore()
        tracking_events = Path(setup.run().scratch) / "events" / "tracking.jsonl"
        supervisor_process.wait_until(lambda: '"recording"' in tracking_events.read_text(), timeout=60)
        (tmp_path / "go").touch()
        ended = running.wait()
    assert ended.code == 0, ended.output
    assert ended.output.count("mlflow can't record") == 1
    assert "mlflow: done" in ended.output
    (run,) = runs_of(mlflow, "complete")
    assert (run["info"]["run_name"], run["info"]["status"]) == ("job", "FINISHED")
    parameters = {item["key"]: item["value"] for item in run["data"]["params"]}
    assert (parameters["method"], parameters["lora.rank"], parameters["training.maxSteps"]) == ("lora", "16", "4")
    metrics = {item["key"]: item["value"] for item in run["data"]["metrics"]}
    assert (metrics["train/loss"], metrics["validation/loss"], metrics["test/loss"]) == (0.75, 0.9, 1.5)
    assert metrics["test/rougeL"] == 0.3
    identity = run["info"]["run_id"]
    history = ask(mlflow, f"metrics/get-history?run_id={identity}&metric_key=train/loss")["metrics"]
    assert [(item["step"], item["value"]) for item in history] == [(1, 3.0), (2, 1.5), (3, 1.0), (4, 0.75)]
    tags = {item["key"]: item["value"] for item in run["data"]["tags"]}
    assert ended.last.artifact is not None
    assert tags["finetune.manifest_digest"] == ended.last.artifact.manifest_digest
    assert "| rougeL | 0.1 | 0.3 |" in tags["mlflow.note.content"]
    assert not [key for key in parameters if key.endswith(".display")]
    files = {item["path"] for item in ask(mlflow, f"artifacts/list?run_id={identity}&path=finetune")["files"]}
    assert {"finetune/history.jsonl", "finetune/adapter_config.json"} <= files
    assert identity in supervisor_process.manifest(setup.output).provenance["tracking"]["mlflow"]


def test_attempts_share_a_run_and_a_result_becomes_one_version(mlflow: str, tmp_path: Path) -> None:
    run = JobSetup(tmp_path).run()
    config = MlflowConfig(uri=mlflow, experiment="attempts", registered_model="support.replies")
    artifact = ArtifactStatus(uri="s3://models/support/v1", manifest_digest="sha256:0", size_bytes=1)

    def points(*steps: int) -> list[Point]:
        return [Point(step, 1e9 + step, {"train/loss": 1 / step}) for step in steps]

    def status() -> str:
        (only,) = runs_of(mlflow, "attempts")
        return str(only["info"]["status"])

    first = Mlflow(config, Subject(run, tmp_path))
    assert first.open()[1] == -1
    first.send(points(1, 2, 3))
    first.close(Ending(how="preempted"))
    assert status() == "RUNNING"
    second = Mlflow(config, Subject(run, tmp_path))
    assert second.open()[1] == 3
    second.send(points(4))
    second.close(Ending(how="failed", message="NonFiniteLoss: at step 5"))
    assert status() == "FAILED"
    for _ in range(2):  # the answer to the first may be lost
        third = Mlflow(config, Subject(run, tmp_path))
        third.open()
        assert third.close(Ending(how="succeeded", artifact=artifact)) == "version 1 of support.replies"
    assert status() == "FINISHED"
    (version,) = ask(mlflow, "model-versions/search?filter=name%3D%27support.replies%27")["model_versions"]
    assert (version["source"], version["version"]) == ("s3://models/support/v1", "1")


def _trackers_of(parent: int) -> list[int]:
    pids = []
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        with contextlib.suppress(OSError):
            if b"finetune_trainer.reporting.trackers" in Path(f"/proc/{child}/cmdline").read_bytes():
                pids.append(int(child))
    return pids


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
