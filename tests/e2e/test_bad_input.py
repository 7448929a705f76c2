"""A user's mistakes are reported immediately, by field; nothing is lost, and nothing is retried in
vain."""

from __future__ import annotations

import json

import obstore
import pytest

from demo import install
from e2e.support.jobs import NAMESPACE, World, fine_tune_job

KEY = {"credentialsRef": {"name": "s3"}}


def _failed(world: World, name: str, reason: str, *parts: str) -> None:
    status = world.until_phase(name, "Failed", seconds=120)
    assert status["failure"]["reason"] == reason, world.account(name)
    for word in parts:
        assert word in status["failure"]["message"], status["failure"]
    assert status["failure"]["hint"]
    assert status["attempt"] <= 1, "a person's mistake is not retried"


def test_a_missing_data_set_is_named(world: World) -> None:
    name = world.apply(fine_tune_job("no-data", dataset={"uri": "s3://data/tiny/nothing.jsonl", **KEY}))
    _failed(world, name, "DatasetNotFound", "s3://data/tiny/nothing.jsonl")


def test_a_broken_row_is_reported_by_its_number(world: World) -> None:
    name = world.apply(fine_tune_job("broken-row", dataset={"uri": "s3://data/tiny/broken.jsonl", **KEY}))
    _failed(world, name, "DatasetInvalid", "7")


def test_a_missing_model_is_named(world: World) -> None:
    name = world.apply(fine_tune_job("no-model", model={"uri": "s3://models/nothing", **KEY}))
    _failed(world, name, "ModelNotFound", "s3://models/nothing")


def test_a_missing_bucket_is_reported_before_training(world: World) -> None:
    name = world.apply(fine_tune_job("no-bucket", output={"uri": "s3://no-such-bucket/x", **KEY}))
    _failed(world, name, "OutputNotFound", "no-such-bucket")


def test_a_destination_with_another_jobs_result_is_refused(world: World) -> None:
    world.apply(fine_tune_job("first"))
    world.until_phase("first", "Succeeded")
    before = world.artifact("first")
    name = world.apply(fine_tune_job("second", output={"uri": "s3://outputs/first", **KEY}))
    _failed(world, name, "OutputOccupied", "s3://outputs/first")
    assert world.artifact("first") == before


def test_a_wrong_key_is_reported(world: World) -> None:
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "wrong", "namespace": NAMESPACE},
        "stringData": {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "canary-5f2c"},
    }
    world.kubectl("apply", "-f", "-", stdin=json.dumps(secret))
    name = world.apply(
        fine_tune_job("wrong-key", model={"uri": "s3://models/tiny-llama", "credentialsRef": {"name": "wrong"}})
    )
    _failed(world, name, "AccessDenied", "s3://models/tiny-llama")
    everything = world.account(name) + world.kubectl("get", "ftj,jobs,pods,events", "-o", "yaml")
    assert "canary-5f2c" not in everything, "a secret leaked"


def test_a_missing_secret_shows_in_status_and_the_job_recovers_without_help(world: World) -> None:
    job = fine_tune_job("late-secret", output={"uri": "s3://outputs/late-secret", "credentialsRef": {"name": "late"}})
    name = world.apply(job)
    status = world.until(name, lambda s: '"late"' in s.get("message", ""), 120, "telling of the missing Secret")
    assert status["phase"] in ("Pending", "Starting")
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "late", "namespace": NAMESPACE},
        "stringData": {
            "AWS_ACCESS_KEY_ID": world.cluster.s3_access_key,
            "AWS_SECRET_ACCESS_KEY": world.cluster.s3_secret_key,
        },
    }
    world.kubectl("apply", "-f", "-", stdin=json.dumps(secret))
    world.until_phase(name, "Succeeded", seconds=300)


def test_a_check_that_takes_too_long_says_what_it_was_doing(world: World) -> None:
    name = world.apply(fine_tune_job("slow-check", runPolicy={"preflight": "always", "preflightSeconds": 1}))
    _failed(world, name, "PreflightTimeout", "runPolicy.preflightSeconds", "the last one: ")


def test_a_pod_that_fits_no_node_is_reported_with_the_schedulers_message(world: World) -> None:
    job = fine_tune_job("too-big", resources={"cpu": "64", "memory": "2Gi"})
    name = world.apply(job)
    status = world.until(name, lambda s: "Insufficient cpu" in s.get("message", ""), 60, "the message of the scheduler")
    assert status["phase"] == "Pending"
    world.delete(name)


def test_gpus_that_no_node_has_leave_the_job_pending_after_its_check(world: World) -> None:
    job = fine_tune_job("no-gpu", resources={"cpu": "200m", "memory": "1500Mi", "scratch": "1Gi", "gpu": {}})
    name = world.apply(job)
    world.until(
        name, lambda s: "Insufficient nvidia.com/gpu." in s.get("message", ""), 120, "a message about missing GPUs"
    )
    jobs = world.kubectl("get", "jobs", "-o", "name")
    assert f"{name}-check" in jobs
    world.delete(name)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"methd": {}}, "methd"),
        ({"method": {"type": "lora"}}, "lora"),
        ({"method": {"type": "lora", "lora": {"rank": 0}}}, "rank"),
        ({"training": {"epochs": 1, "maxSteps": 2}}, "maxSteps"),
        ({"training": {"learningRate": "NaN"}}, "learningRate"),
    ],
    ids=["unknown-field", "no-lora", "rank-0", "epochs-and-steps", "lr-nan"],
)
def test_kubectl_apply_refuses_an_invalid_job_and_names_the_field(
    world: World, part: dict[str, object], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        world.apply(fine_tune_job("refused", **part))


def test_what_is_stored_in_the_destination_survives_a_refused_job(world: World) -> None:
    store = install.s3_store(world.cluster, "outputs")
    obstore.put(store, "mine/notes.txt", b"do not touch")
    name = world.apply(fine_tune_job("next-to-it", output={"uri": "s3://outputs/mine", **KEY}))
    world.until_phase(name, "Succeeded")
    assert bytes(obstore.get(store, "mine/notes.txt").bytes()) == b"do not touch"
