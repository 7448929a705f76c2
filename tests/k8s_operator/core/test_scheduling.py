"""Network profiles of the administrator, and where the pods of a group are placed."""

from __future__ import annotations

from typing import Any

import pytest
from kubernetes.aio.client.models import V1Job

from finetune_api.status import Restarts
from finetune_operator.core.plan import plan
from finetune_operator.core.pods import manifests
from finetune_operator.core.pods.offers import NotOffered, check_offered
from finetune_operator.settings import Settings, parse
from k8s_operator.support.observed_states import a_job

_SETTINGS = parse("""
pods:
  env: [{name: NCCL_DEBUG, value: WARN}, {name: NCCL_SOCKET_IFNAME, value: eth0}]
  networkProfiles:
    infiniband:
      resources: {rdma/hca: 8}
      env: [{name: NCCL_DEBUG, value: INFO}, {name: NCCL_IB_HCA, value: mlx5}]
      annotations: {k8s.v1.cni.cncf.io/networks: ib0}
      capabilities: [IPC_LOCK]
    tcpx:
      volumes: [{name: socket, mountPath: /run/tcpx, readOnly: false, source: {emptyDir: {}}}]
      sidecars: [{name: daemon, image: "example.test/daemon:1"}]
""")
_GROUP: dict[str, Any] = {"resources": {"gpu": {}}, "distribution": {"nodes": 2, "processesPerNode": 4}}


def _template(settings: Settings = _SETTINGS, avoided: tuple[str, ...] = (), **sections: Any) -> dict[str, Any]:
    job = a_job(**{**_GROUP, **sections})
    body = manifests.attempt_job(job, plan(job, settings), settings, Restarts(), avoided)
    V1Job.model_validate(body)
    template: dict[str, Any] = body["spec"]["template"]
    return template


def test_a_profile_adds_devices_variables_annotations_and_a_capability() -> None:
    template = _template(pod={"network": "infiniband", "env": [{"name": "NCCL_IB_HCA", "value": "mlx5_0"}]})
    (container,) = template["spec"]["containers"]
    assert container["resources"]["limits"]["rdma/hca"] == container["resources"]["requests"]["rdma/hca"] == "8"
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert (env["NCCL_DEBUG"], env["NCCL_SOCKET_IFNAME"], env["NCCL_IB_HCA"]) == ("INFO", "eth0", "mlx5_0")
    assert template["metadata"]["annotations"]["k8s.v1.cni.cncf.io/networks"] == "ib0"
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}


def test_a_job_replaces_an_amount_of_its_profile() -> None:
    resources = {"gpu": {}, "extra": {"rdma/hca": 4}}
    (container,) = _template(pod={"network": "infiniband"}, resources=resources)["spec"]["containers"]
    assert container["resources"]["limits"]["rdma/hca"] == "4"


def test_volumes_and_sidecars_of_a_profile_start_before_the_trainer() -> None:
    spec = _template(pod={"network": "tcpx"})["spec"]
    assert spec["initContainers"] == [{"name": "daemon", "image": "example.test/daemon:1", "restartPolicy": "Always"}]
    (container,) = spec["containers"]
    assert {"name": "network-socket", "mountPath": "/run/tcpx"} in container["volumeMounts"]
    assert {"name": "network-socket", "emptyDir": {}} in spec["volumes"]


@pytest.mark.parametrize("name", ["", "infiniband"])
def test_a_check_never_has_the_devices_of_a_network(name: str) -> None:
    job = a_job(**_GROUP, pod={"network": name})
    spec = manifests.preflight_job(job, plan(job, _SETTINGS), _SETTINGS)["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert "rdma/hca" not in container["resources"]["limits"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert "NCCL_IB_HCA" not in {entry["name"] for entry in container["env"]}


def test_an_unknown_profile_is_refused_with_those_that_exist() -> None:
    job = a_job(**_GROUP, pod={"network": "efa"})
    with pytest.raises(NotOffered, match=r"spec\.pod\.network: 'efa' .*: infiniband, tcpx") as refusal:
        check_offered(job, _SETTINGS)
    assert refusal.value.reason == "UnknownNetwork"
    with pytest.raises(NotOffered, match="there are none"):
        check_offered(job, Settings())
    check_offered(a_job(pod={"network": "tcpx"}), _SETTINGS)


_SELECTOR = {"finetune-operator.io/job-uid": "job-uid", "finetune-operator.io/attempt": "1"}


def test_all_pods_of_a_group_can_be_required_to_share_a_block() -> None:
    affinity = _template(pod={"topology": {"key": "cloud.test/block", "policy": "required"}})["spec"]["affinity"]
    (term,) = affinity["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term == {"topologyKey": "cloud.test/block", "labelSelector": {"matchLabels": _SELECTOR}}


def test_a_shared_block_is_a_preference_by_default() -> None:
    affinity = _template(pod={"topology": {"key": "cloud.test/block"}})["spec"]["affinity"]
    (entry,) = affinity["podAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert entry["podAffinityTerm"]["topologyKey"] == "cloud.test/block"


@pytest.mark.parametrize("key", ["topology.kubernetes.io/zone", "kubernetes.io/hostname"])
def test_pods_can_be_spread_over_zones_and_are_over_nodes(key: str) -> None:
    spec = _template(pod={"topology": {"key": key, "policy": "spread"}})["spec"]
    assert "affinity" not in spec
    keys = [constraint["topologyKey"] for constraint in spec["topologySpreadConstraints"]]
    assert keys == list(dict.fromkeys(["kubernetes.io/hostname", key])), "the API server refuses a key twice"


@pytest.mark.parametrize("policy", ["required", "preferred"])
def test_a_queue_chooses_the_block_of_a_group(policy: str) -> None:
    template = _template(
        pod={"topology": {"key": "cloud.test/block", "policy": policy}}, run_policy={"queueName": "team"}
    )
    assert template["metadata"]["annotations"][f"kueue.x-k8s.io/podset-{policy}-topology"] == "cloud.test/block"
    assert "affinity" not in template["spec"]


@pytest.mark.parametrize(
    ("processes", "pod", "pods", "required"),
    [
        (8, {}, "{}", True),
        (4, {}, "{}", False),
        (4, {}, "{gpusPerNode: 4}", True),
        (8, {"onePodPerNode": "preferred"}, "{}", False),
        (1, {"onePodPerNode": "required"}, "{}", True),
    ],
    ids=["a whole node", "half a node", "smaller nodes", "allowed by the job", "required by the job"],
)
def test_two_pods_with_all_gpus_of_a_node_never_share_one(
    processes: int, pod: dict[str, Any], pods: str, required: bool
) -> None:
    distribution = {"nodes": 2, "processesPerNode": processes}
    spec = _template(parse(f"pods: {pods}"), distribution=distribution, pod=pod)["spec"]
    anti = spec.get("affinity", {}).get("podAntiAffinity")
    if not required:
        assert anti is None
        assert spec["topologySpreadConstraints"][0]["whenUnsatisfiable"] == "ScheduleAnyway"
        return
    (term,) = anti["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term == {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": _SELECTOR}}


def test_node_affinity_of_a_job_and_nodes_to_avoid_are_combined() -> None:
    pod = {
        "nodeAffinity": {
            "required": [{"key": "cloud.test/kind", "operator": "NotIn", "values": ["spot"]}],
            "preferred": [{"key": "gpu.test/memory", "operator": "Gt", "values": ["40"], "weight": 7}],
        }
    }
    affinity = _template(avoided=("broken",), pod=pod)["spec"]["affinity"]["nodeAffinity"]
    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert term == {"matchExpressions": [{"key": "cloud.test/kind", "operator": "NotIn", "values": ["spot"]}]}
    own, avoided = affinity["preferredDuringSchedulingIgnoredDuringExecution"]
    assert own == {
        "weight": 7,
        "preference": {"matchExpressions": [{"key": "gpu.test/memory", "operator": "Gt", "values": ["40"]}]},
    }
    assert avoided["preference"]["matchFields"][0]["values"] == ["broken"]
