"""Measures the overhead of a FineTuneJob over the same training started by torchrun.

    python benchmarks/overhead.py [--cluster NAME]

It compares examples/quickstart.yaml as a FineTuneJob (2 pods x 2 ranks on a local cluster, from
`kubectl apply` to completionTime) with `torchrun --nproc-per-node 4 -m finetune_trainer.rank` on
the same machine, with model and data on the local disk. Both may use both cores. It prints the
seconds of each part and writes benchmarks/results/overhead.json. Without --cluster, it creates a
cluster and removes it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "hack"))

import obstore  # noqa: E402

from demo import clusters, install, walkthrough, watch  # noqa: E402
from demo_assets import dataset, model  # noqa: E402
from finetune_api.messages import events  # noqa: E402
from finetune_api.messages.run import RunConfig  # noqa: E402
from finetune_api.names import HISTORY_PATH  # noqa: E402
from finetune_api.resource import parse  # noqa: E402
from finetune_api.yaml import load_all  # noqa: E402
from finetune_operator.core.plan import plan  # noqa: E402
from finetune_operator.settings import Settings  # noqa: E402
from finetune_trainer.paths import Paths  # noqa: E402

NAME = "overhead"
BOTH_CORES = {"cpu": "1", "memory": "4Gi"}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--cluster", default="", help="a running cluster to use")
    options = arguments.parse_args()
    (document,) = load_all((ROOT / "examples/quickstart.yaml").read_text())
    document["metadata"]["name"] = NAME
    document["spec"]["output"]["uri"] = f"s3://outputs/{NAME}"
    document["spec"]["resources"] = BOTH_CORES
    job = measured_job(document, options.cluster)
    torchrun = measured_torchrun(document)
    report(job, torchrun)


def measured_job(document: dict[str, Any], running: str) -> dict[str, float]:
    """Runs the FineTuneJob; returns its seconds by part."""
    images = clusters.build_images()
    cluster = clusters.access(running) if running else clusters.up("bench")
    try:
        clusters.load(cluster.name, *images)
        install.operator(cluster, *images, "replicaCount=1", "resources.requests.cpu=0")
        install.namespace(cluster, walkthrough.NAMESPACE)
        walkthrough.put_assets(cluster)
        cluster.kubectl_run("-n", walkthrough.NAMESPACE, "delete", "ftj", NAME, "--ignore-not-found", "--wait")
        walkthrough.clear_output(cluster, document["spec"]["output"]["uri"])
        begin = time.time()
        cluster.kubectl_run("-n", walkthrough.NAMESPACE, "apply", "-f", "-", stdin=json.dumps(document))
        *_, last = watch.follow(cluster, walkthrough.NAMESPACE, NAME, 1200, every=0.2)
        finished = time.time()
        if last.phase != "Succeeded":
            raise SystemExit(f"the job is {last.phase}: {last.message}")
        selector = f"finetune-operator.io/job-name={NAME}"
        listed = cluster.kubectl_run("-n", walkthrough.NAMESPACE, "get", "pods", "-l", selector, "-o", "json")
        pods = json.loads(listed)["items"]
        history = bytes(obstore.get(install.s3_store(cluster, "outputs"), f"{NAME}/{HISTORY_PATH}").bytes()).decode()
    finally:
        if not running:
            clusters.remove("bench")
    states = [pod["status"]["containerStatuses"][0]["state"]["terminated"] for pod in pods]
    started = max(_seconds(state["startedAt"]) for state in states)
    ended = max(_seconds(state["finishedAt"]) for state in states)
    return {"total": finished - begin, "until containers run": started - begin, **_parts(history, started, ended),
            "until status says so": finished - ended}  # fmt: skip


def measured_torchrun(document: dict[str, Any]) -> dict[str, float]:
    """Runs only the ranks, without supervisor and cluster; returns their seconds by part."""
    with tempfile.TemporaryDirectory() as folder:
        paths = Paths(Path(folder))
        config = plan(parse(document), Settings())
        world = config.world.model_copy(update={"nodes": 1, "processes_per_node": 4, "master_address": "127.0.0.1"})
        local: RunConfig = config.model_copy(update={"world": world, "scratch": folder, "progress": None})
        paths.run_config.write_text(local.model_dump_json(by_alias=True, exclude_none=True))
        paths.model.symlink_to(model.folder())
        paths.data("train").parent.mkdir()
        for split in ("train", "test"):
            paths.data(split).symlink_to(dataset.folder() / f"{split}.jsonl")
        for created in (paths.events, paths.checkpoints, paths.rank_log(0).parent):
            created.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "FINETUNE_SCRATCH": folder,
            "FINETUNE_RUN_CONFIG": str(paths.run_config),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": f"{ROOT / 'operator'}:{ROOT / 'trainer_image'}",
        }
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "4",
            "-m",
            "finetune_trainer.rank",
        ]
        begin = time.time()
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        end = time.time()
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        return {"total": end - begin, **_parts(paths.rank_events(0).read_text(), begin, end)}


def _parts(history: str, begin: float, end: float) -> dict[str, float]:
    """Returns the wall-clock seconds between the events of rank 0, by part."""
    parsed = [event for line in history.splitlines() if (event := events.decode(line)) is not None]
    steps = [event for event in parsed if event.type == "step"]
    first, last = steps[0], steps[-1]
    before = first.time - first.seconds["total"]
    return {
        "before the first step": before - begin,
        "training": last.time - before,
        "after the last step": end - last.time,
    }


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


def report(job: dict[str, float], torchrun: dict[str, float]) -> None:
    """Prints the table and writes the result file."""
    print(f"{'seconds':28} {'FineTuneJob':>12} {'torchrun':>10}")
    for part in ("until containers run", "before the first step", "training", "after the last step",
                 "until status says so", "total"):  # fmt: skip
        print(f"{part:28} {job.get(part, 0):12.1f} {torchrun.get(part, 0):10.1f}")
    overhead = job["total"] - torchrun["total"]
    print(f"overhead {overhead:+.1f} s, ratio {job['total'] / torchrun['total']:.3f}")
    result = {"finetunejob_seconds": job, "torchrun_seconds": torchrun, "overhead_seconds": overhead}
    (ROOT / "benchmarks/results/overhead.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
