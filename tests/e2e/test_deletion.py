"""What deleted jobs leave in a bucket and on a claim, and a job that continues another one, with
real pods."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import obstore

from demo import install
from e2e.support.jobs import World, fine_tune_job
from e2e.test_volumes import CLAIM, volume

__all__ = ["volume"]


def deleting(name: str, policy: str, **spec: Any) -> dict[str, Any]:
    """A job with checkpoints every few steps whose output has a deletion policy."""
    output = {**fine_tune_job(name)["spec"]["output"], **spec.pop("output", {}), "deletionPolicy": policy}
    return fine_tune_job(name, output=output, checkpoint={"every": 5}, **spec)


def long_training(steps: int) -> dict[str, Any]:
    return {"maxSteps": steps, "globalBatchSize": 8, "learningRate": 1e-3, "evalEverySteps": 0}


def delete(world: World, name: str, seconds: float = 360) -> list[str]:
    """Delete a job, wait until it is gone, and return its Events about the output."""
    world.delete(name)
    end = time.monotonic() + seconds
    while f"finetunejob.finetune-operator.io/{name}" in world.kubectl("get", "ftj", "-o", "name"):
        assert time.monotonic() < end, world.account(name)
        time.sleep(1)
    events = json.loads(world.kubectl("get", "events", "-o", "json"))["items"]
    return [
        f"{event['reason']}: {event['message']}"
        for event in events
        if event["involvedObject"]["name"] == name and event["reason"].startswith("Output")
    ]


def test_a_job_deleted_while_it_trains_leaves_only_what_is_not_its_own(world: World) -> None:
    name = world.apply(deleting("leaves-nothing", "Delete", training=long_training(400)))
    world.until(name, lambda s: s.get("checkpoint"), 360, "with a checkpoint")
    obstore.put(install.s3_store(world.cluster, "outputs"), f"{name}/notes.txt", b"the user's own")
    (message,) = delete(world, name)
    assert message.startswith("OutputCleaned: deleted "), message
    assert message.endswith("files that aren't proven to be this job's: notes.txt")
    assert world.files(name) == {"notes.txt"}


def test_a_result_and_its_job_are_deleted_together_on_a_claim(world: World, volume: Path) -> None:
    job = deleting(
        "on-a-volume",
        "Delete",
        model={"uri": f"pvc://{CLAIM}/tiny", "dtype": "float32"},
        dataset={"uri": f"pvc://{CLAIM}/train.jsonl", "maxSequenceLength": 64},
        training={"maxSteps": 4, "globalBatchSize": 8},
    )
    job["spec"]["output"] = {"uri": f"pvc://{CLAIM}/out", "deletionPolicy": "Delete"}
    world.apply(job)
    world.until_phase("on-a-volume", "Succeeded", seconds=360)
    (message,) = delete(world, "on-a-volume")
    assert "the result (" in message
    assert not [path for path in (volume / "out").rglob("*") if path.is_file()]
    assert (volume / "train.jsonl").is_file()


def test_another_job_continues_what_was_deleted_and_gets_the_result_it_would_have_had(world: World) -> None:
    whole = world.apply(fine_tune_job("whole", training=long_training(300)))
    first = world.apply(deleting("deleted-at-10", "Retain", training=long_training(300)))
    world.until(first, lambda s: (s.get("checkpoint") or {}).get("step", 0) >= 10, 360, "at step 10")
    assert delete(world, first) == []
    model = fine_tune_job("then")["spec"]["model"]
    place = {"uri": f"s3://outputs/{first}", "credentialsRef": {"name": "s3"}}
    then = world.apply(fine_tune_job("then", training=long_training(300), model={**model, "checkpoint": place}))
    world.until_phase(then, "Succeeded")
    world.until_phase(whole, "Succeeded")
    (line,) = world.artifact(then)["provenance"]["startedFrom"]
    assert line["job"].endswith("/deleted-at-10")
    weights = "adapter_model.safetensors"
    assert world.download(then, weights) == world.download(whole, weights)
