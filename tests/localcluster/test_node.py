"""A real cluster with a node: pods, names, services, fake GPUs, S3, Prometheus and kwok, and then
its removal."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import localcluster
from localcluster import Cluster, LocalClusterError, cluster
from localcluster.paths import cluster_paths
from localcluster.spec import BUCKETS

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(os.geteuid() != 0, reason="a cluster needs root"),
]
NAME = f"lcn-{os.getpid()}"
IMAGE = "localhost/localcluster-busybox:test"


@pytest.fixture(scope="module")
def made(busybox: Path) -> Iterator[Cluster]:
    one = localcluster.up(NAME, pretend_gpus=8, addons=("s3", "prometheus"), kwok_nodes=1)
    one.load(str(busybox))
    yield one
    cluster.down(NAME, purge=True)


def pod(name: str, script: str, **extra: Any) -> dict[str, Any]:
    """Return a pod that runs a busybox script; `extra` is merged into its container."""
    container = {"name": "main", "image": IMAGE, "command": ["/busybox", "sh", "-c", script], **extra}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name, "app.kubernetes.io/part-of": "finetune-operator"}},
        "spec": {"restartPolicy": "Never", "terminationGracePeriodSeconds": 0, "containers": [container]},
    }


def apply(made: Cluster, *objects: dict[str, Any]) -> None:
    made.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))


def wait(made: Cluster, condition: str, what: str) -> None:
    made.kubectl("wait", f"--for={condition}", what, "--timeout=60s")


def test_an_indexed_job_finds_its_peers_and_gets_fake_gpus(made: Cluster) -> None:
    script = (
        "until /busybox nslookup peers-0.peers.default.svc.cluster.local >/dev/null && "
        "/busybox nslookup peers-1.peers.default.svc.cluster.local >/dev/null; do /busybox sleep 0.2; done; "
        "echo index $JOB_COMPLETION_INDEX"
    )
    template = pod("peers", script, resources={"limits": {"nvidia.com/gpu": "2"}})
    template["spec"]["subdomain"] = "peers"
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "peers"},
        "spec": {"clusterIP": "None", "selector": {"app": "peers"}, "publishNotReadyAddresses": True},
    }
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "peers"},
        "spec": {
            "completions": 2,
            "parallelism": 2,
            "completionMode": "Indexed",
            "backoffLimit": 0,
            "template": {"metadata": {"labels": {"app": "peers"}}, "spec": template["spec"]},
        },
    }
    apply(made, service, job)
    wait(made, "condition=Complete", "job/peers")
    logs = made.kubectl("logs", "--selector=app=peers").split("\n")
    assert sorted(line for line in logs if line) == ["index 0", "index 1"]


def test_a_pod_that_requests_more_gpus_than_exist_stays_pending(made: Cluster) -> None:
    apply(made, pod("greedy", "true", resources={"limits": {"nvidia.com/gpu": "9"}}))
    wait(made, "jsonpath={.status.conditions[?(@.type=='PodScheduled')].reason}=Unschedulable", "pod/greedy")
    assert "Insufficient nvidia.com/gpu" in made.kubectl("get", "pod", "greedy", "-o", "json")
    made.kubectl("delete", "pod", "greedy", "--wait=false")


def test_a_service_answers_from_a_pod_and_from_the_host_and_prometheus_scrapes_it(made: Cluster) -> None:
    script = (
        "/busybox mkdir -p /tmp/w; echo 'finetune_loss{job=\"support\"} 1.5' > /tmp/w/metrics; "
        "exec /busybox httpd -f -p 8000 -h /tmp/w"
    )
    port = {"ports": [{"name": "metrics", "containerPort": 8000}]}
    web = pod("web", script, securityContext={"runAsUser": 0}, **port)
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web"},
        "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8000}]},
    }
    apply(made, web, service)
    wait(made, "condition=Ready", "pod/web")
    apply(made, pod("client", "/busybox wget -qO- http://web/metrics"))
    wait(made, "jsonpath={.status.phase}=Succeeded", "pod/client")
    assert "finetune_loss" in made.kubectl("logs", "client")
    assert "uid=0" in made.kubectl("exec", "web", "--", "/busybox", "id")
    address = made.kubectl("get", "service", "web", "-o", "jsonpath={.spec.clusterIP}")
    assert "finetune_loss" in fetch(f"http://{address}/metrics")
    query = urllib.parse.urlencode({"query": "finetune_loss"})
    [series] = eventually(lambda: json.loads(fetch(f"{made.prometheus_url}/api/v1/query?{query}"))["data"]["result"])
    assert series["metric"]["job"] == "support"
    assert (series["metric"]["namespace"], series["metric"]["pod"]) == ("default", "web")


def test_nothing_enforces_policies_unless_it_is_requested(made: Cluster) -> None:
    """The control of test_policies.py."""
    policy = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "closed"},
        "spec": {"podSelector": {}, "policyTypes": ["Ingress"]},
    }
    script = "/busybox mkdir -p /tmp/w; echo here > /tmp/w/index; exec /busybox httpd -f -p 8000 -h /tmp/w"
    server = pod("closed", script, securityContext={"runAsUser": 0})
    apply(made, policy, server)
    wait(made, "condition=Ready", "pod/closed")
    address = made.kubectl("get", "pod", "closed", "-o", "jsonpath={.status.podIP}")
    apply(made, pod("visitor", f"/busybox sleep 3; /busybox wget -qO- http://{address}:8000/index"))
    wait(made, "jsonpath={.status.phase}=Succeeded", "pod/visitor")
    assert made.kubectl("logs", "visitor").strip() == "here"
    made.kubectl("delete", "networkpolicy", "closed")


def test_object_storage_answers_from_a_pod_and_keeps_what_a_client_writes(made: Cluster) -> None:
    import obstore
    from obstore.store import S3Store

    assert made.s3 is not None
    for bucket in BUCKETS:
        store = S3Store(
            bucket,
            endpoint=made.s3.endpoint,
            access_key_id=made.s3.access_key_id,
            secret_access_key=made.s3.secret_access_key,
            region=made.s3.region,
            client_options={"allow_http": True},
        )
        obstore.put(store, "a/b", b"content", mode="create")
        assert bytes(obstore.get(store, "a/b").bytes()) == b"content"
    refused = f"/busybox wget -O- {made.s3.endpoint}/models/a/b 2>&1 | /busybox grep 403"  # no key: it answered
    apply(made, pod("s3", refused))
    wait(made, "jsonpath={.status.phase}=Succeeded", "pod/s3")


def test_a_fake_node_runs_pods_that_tolerate_it(made: Cluster) -> None:
    fake = pod("fake", "true")
    fake["spec"] |= {
        "nodeSelector": {"type": "kwok"},
        "tolerations": [{"key": "kwok.x-k8s.io/node", "operator": "Exists"}],
    }
    apply(made, fake)
    wait(made, "condition=Ready", "pod/fake")
    made.kubectl("delete", "pod", "fake", "--timeout=20s")


def test_an_image_that_is_there_is_not_loaded_again(
    made: Cluster, busybox: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()
    made.load(str(busybox))
    assert "is already on cluster" in capsys.readouterr().out
    assert time.monotonic() - started < 60
    with pytest.raises(LocalClusterError, match="neither a file nor an image"):
        made.load("localhost/no-such-image:dev")


def test_images_outlive_down_and_nothing_else_does(
    made: Cluster, busybox: Path, host: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    apply(made, pod("sleeper", "/busybox sleep 600"))
    wait(made, "condition=Ready", "pod/sleeper")
    running = host(NAME)
    assert running.cgroups
    assert running.processes
    made.down()
    after = host(NAME)
    assert (after.processes, after.mounts, after.interface, after.routes, after.cgroups) == ((), (), False, (), ())
    assert (after.firewall, after.folders, after.settings) == (running.firewall, running.folders, running.settings)
    assert {entry.name for entry in cluster_paths(NAME).root.iterdir()} <= {"containerd", "loaded.json", ".load.lock"}
    again = localcluster.up(NAME)
    again.load(str(busybox))
    assert "is already on cluster" in capsys.readouterr().out
    assert "sleeper" not in again.kubectl("get", "pods")
    apply(again, pod("later", "echo back"))
    wait(again, "jsonpath={.status.phase}=Succeeded", "pod/later")


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def eventually(look: Callable[[], Any], seconds: float = 20) -> Any:
    """Return the first answer of `look` that isn't empty."""
    deadline = time.monotonic() + seconds
    while not (answer := look()):
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.3)
    return answer
