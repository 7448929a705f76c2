"""examples/gpu-check.yaml on a node without a GPU: the trainer's image contains all that the check
needs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import yaml

from e2e.support.jobs import World

FILE = Path(__file__).parents[2] / "examples" / "gpu-check.yaml"
NAME = "finetune-gpu-check"


def _rehearsing(image: str) -> dict[str, Any]:
    """Return the example with the image of this cluster, on the CPU, at tiny sizes, with only some
    stages."""
    job: dict[str, Any] = yaml.safe_load(FILE.read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    container["image"] = image
    container["args"] += ["--rehearse", "--here", "--short", "--stages", "machine,head,ranks"]
    container["resources"] = {"requests": {"cpu": "300m", "memory": "3Gi"}, "limits": {"memory": "3Gi"}}
    return job


def test_the_example_is_admitted_by_a_cluster_with_restricted_pods(world: World) -> None:
    output = world.kubectl("apply", "--dry-run=server", "-f", str(FILE))
    assert f"job.batch/{NAME} created (server dry run)" in output
    assert "Warning" not in output


def test_the_check_runs_from_the_trainers_image_and_its_log_contains_the_results(world: World) -> None:
    world.kubectl("apply", "-f", "-", stdin=json.dumps(_rehearsing(world.trainer_image)))
    try:
        world.kubectl("wait", f"job/{NAME}", "--for=jsonpath={.status.ready}=1", "--timeout=60s", check=False)
        for _ in range(4):  # on a machine that is busy with other tests, it takes minutes
            ended = world.kubectl("wait", f"job/{NAME}", "--for=condition=Complete", "--timeout=90s", check=False)
            if "condition met" in ended:
                break
        log = world.kubectl("logs", f"job/{NAME}")
        command = "sed -n '/^--- gpu-check.json/,$p' | tail -n +2"  # as described in the example's first lines
        assert command in FILE.read_text()
        text = subprocess.run(command, shell=True, input=log, capture_output=True, text=True, check=True).stdout
        document = json.loads(text)
        assert [stage["ended"] for stage in document["stages"]] == ["done"] * 3, log
        assert {finding["verdict"] for finding in document["findings"]} <= {"right", "figure", "skipped"}, log
        assert any(finding["name"] == "LoRA, fsdp" for finding in document["findings"])
    finally:
        world.kubectl("delete", "job", NAME, "--wait=false")


def test_the_trainers_image_has_what_triton_needs_to_build_a_launcher(world: World) -> None:
    """A C compiler and Python.h, whatever base the image was built on."""
    code = "from finetune_trainer.kernels.cuda import toolchain; print('missing:', toolchain.missing() or 'nothing')"
    pod = yaml.safe_load(FILE.read_text())["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    container |= {"image": world.trainer_image, "command": ["python", "-c", code], "args": []}
    container["resources"] = {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"memory": "1Gi"}}
    name = "finetune-toolchain-check"
    manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": pod}
    world.kubectl("apply", "-f", "-", stdin=json.dumps(manifest))
    try:
        world.kubectl("wait", f"pod/{name}", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=60s", check=False)
        assert world.kubectl("logs", name).strip() == "missing: nothing"
    finally:
        world.kubectl("delete", f"pod/{name}", "--ignore-not-found")
