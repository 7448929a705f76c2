"""The pure functions of hack/localcluster: names, addresses, keys, targets, refusals."""

from __future__ import annotations

import ipaddress
import itertools
import json
import os
import shutil
import tarfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from localcluster import LocalClusterError, enforcement
from localcluster.bringup import check_host
from localcluster.builds import RECIPES, content_key, tool
from localcluster.components import Layout
from localcluster.discovery import targets
from localcluster.images import one_file_image
from localcluster.loading import from_archive, full_name, named_index, shared_layers
from localcluster.network import host_interface, network_for
from localcluster.packages import missing
from localcluster.paths import PACKAGE, ClusterPaths, cache_root
from localcluster.spec import MOST_NODES, ClusterSpec, checked, covers
from localcluster.toolchain import parsed_version


def test_a_name_has_the_same_network_on_every_run() -> None:
    assert network_for("demo", ["192.0.2.0/24"]) == network_for("demo", [])


def test_a_network_in_use_is_skipped() -> None:
    first = network_for("demo", [])
    second = network_for("demo", [first.block])
    assert second.octet != first.octet
    assert second.host_interface == first.host_interface


def test_without_any_free_network_the_remedy_is_named() -> None:
    with pytest.raises(LocalClusterError, match="take another cluster down"):
        network_for("demo", ["10.0.0.0/8"])


def test_nodes_have_addresses_of_their_own_inside_the_clusters() -> None:
    first = network_for("demo", [])
    nodes = [replace(first, node=number) for number in range(1, MOST_NODES + 1)]
    pods = [ipaddress.ip_network(node.pod_cidr) for node in nodes]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(pods, 2))
    assert all(one.subnet_of(ipaddress.ip_network(first.pods)) for one in pods)  # type: ignore[arg-type]
    links = [ipaddress.ip_network(f"{node.gateway_address}/30", strict=False) for node in nodes]
    assert len(set(links)) == MOST_NODES
    for node, link in zip(nodes, links, strict=True):
        assert set(map(str, link.hosts())) == {node.gateway_address, node.node_address}
    assert (first.gateway_address, first.node_address) == (first.host_address, first.server_address)


def test_an_interface_name_fits_the_kernel() -> None:
    assert len(host_interface("a" * 30)) <= 15


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        pytest.param(ClusterSpec(name="Demo"), "--name 'Demo'", id="upper case"),
        pytest.param(ClusterSpec(name="../x"), "--name '../x'", id="a path"),
        pytest.param(ClusterSpec(addons=frozenset({"mysql"})), "--addons mysql", id="unknown add-on"),
        pytest.param(ClusterSpec(pretend_gpus=-1), "--pretend-gpus -1", id="negative GPUs"),
        pytest.param(ClusterSpec(nodes=5), "--nodes 5: use a number from 1 to 4", id="too many nodes"),
        pytest.param(ClusterSpec(nodes=2, control_plane_only=True), "has no nodes", id="nodes of a control plane"),
        pytest.param(ClusterSpec(pretend_gpus=8, control_plane_only=True), "has no node", id="GPUs without a node"),
        pytest.param(
            ClusterSpec(network_policies=True, control_plane_only=True),
            "--network-policies: --control-plane-only has no node",
            id="policies without a node",
        ),
    ],
)
def test_a_wrong_option_is_named_with_its_value(spec: ClusterSpec, message: str) -> None:
    with pytest.raises(LocalClusterError, match=message):
        checked(spec)


def test_a_running_cluster_with_more_add_ons_is_accepted() -> None:
    running = ClusterSpec(addons=frozenset({"s3", "prometheus"}), audit=True)
    assert covers(running, ClusterSpec(addons=frozenset({"s3"})))
    assert not covers(running, ClusterSpec(control_plane_only=True))
    assert not covers(running, ClusterSpec(pretend_gpus=8))
    assert not covers(running, ClusterSpec(network_policies=True))


def test_a_program_is_rebuilt_when_its_sources_change(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE / "kube", tmp_path / "kube")
    kube = RECIPES[0]
    before = content_key(kube, tmp_path)
    assert before == content_key(kube)
    (tmp_path / "kube" / "main.go").write_text("package main\n")
    assert content_key(kube, tmp_path) != before


def test_a_program_with_a_module_of_its_own_is_rebuilt_when_that_changes(tmp_path: Path) -> None:
    [policies] = [recipe for recipe in RECIPES if recipe.name == "policies"]
    for folder in ("kube", "policies"):
        shutil.copytree(PACKAGE / folder, tmp_path / folder)
    before = content_key(policies, tmp_path)
    (tmp_path / "kube" / "go.mod").write_text("module other\n")
    assert content_key(policies, tmp_path) == before
    (tmp_path / "policies" / "go.mod").write_text("module other\n")
    assert content_key(policies, tmp_path) != before


def test_each_node_enforces_policies_with_tables_and_a_marker_of_its_own() -> None:
    network = network_for("demo", [])
    spec, cluster = ClusterSpec(nodes=2, network_policies=True), ClusterPaths(Path("/cache/clusters/demo"))
    first = Layout(spec, cluster, network)
    second = Layout(spec, cluster.node(2), replace(network, node=2))
    one, other = (enforcement.component(node, Path("/bin/policies"), Path("/admin")) for node in (first, second))
    assert [part for part in one.argv if part in other.argv] == [
        "/bin/policies",
        "--kubeconfig=/admin",
        f"--services={network.service_cidr}",
        "--v=1",
    ]
    assert "--node=demo-node" in one.argv
    assert "--node=demo-node-2" in other.argv
    assert dict(one.env)["PATH"].startswith("/cache/clusters/demo/run/etc/iptables:")
    assert dict(other.env)["PATH"].startswith("/cache/clusters/demo/nodes/2/run/etc/iptables:")


def test_every_kubernetes_module_is_pinned_to_the_version_that_it_reports() -> None:
    pins = [line for line in (PACKAGE / "kube" / "go.mod").read_text().splitlines() if "=>" in line]
    assert len(pins) == 33
    assert all(line.endswith(" v0.36.3") for line in pins)
    assert "k8s.io/client-go v0.36.3" in (PACKAGE / "policies" / "go.mod").read_text()
    assert "gitVersion=v1.36.3" in RECIPES[0].ldflags


def test_an_unknown_tool_lists_the_known_ones() -> None:
    with pytest.raises(LocalClusterError, match=r"'docker'.*helm.*kubectl"):
        tool("docker")


def test_the_version_of_go_is_read_as_numbers() -> None:
    assert parsed_version("go version go1.26.8 linux/amd64") == (1, 26)
    assert parsed_version("no go") == (0, 0)


def test_a_missing_program_is_reported_by_its_package() -> None:
    assert missing({"no-such-program": "some-package", "sh": "dash"}) == ["some-package"]


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("trainer", "docker.io/library/trainer:latest"),
        ("trainer:dev", "docker.io/library/trainer:dev"),
        ("team/trainer:dev", "docker.io/team/trainer:dev"),
        ("localhost/trainer:dev", "localhost/trainer:dev"),
        ("registry.example:5000/trainer", "registry.example:5000/trainer:latest"),
    ],
)
def test_an_image_is_named_as_the_kubelet_will_look_it_up(name: str, full: str) -> None:
    assert full_name(name) == full


def test_only_layers_in_the_same_positions_are_shared() -> None:
    assert shared_layers(("a", "b", "c"), [["a", "x", "c"], ["a", "b", "d"]]) == {"a", "b"}
    assert shared_layers(("a", "b"), [["b", "a"]]) == frozenset()
    assert shared_layers(("a",), []) == frozenset()


def test_a_layer_that_repeats_higher_up_is_not_considered_unpacked() -> None:
    assert shared_layers(("a", "b", "a"), [["a", "c"]]) == frozenset()


def test_an_archive_is_copied_with_the_name_that_containerd_reads(tmp_path: Path) -> None:
    archive = tmp_path / "image.tar"
    archive.write_bytes(one_file_image("localhost/thing:1", "thing", b"program"))
    source = from_archive(archive)
    copy = BytesIO()
    source.write(copy, frozenset())
    copy.seek(0)
    with tarfile.open(fileobj=copy) as tar:
        index = tar.extractfile("index.json")
        assert index is not None
        [manifest] = json.load(index)["manifests"]
    assert source.name == "localhost/thing:1"
    assert manifest["annotations"]["io.containerd.image.name"] == "localhost/thing:1"


def test_a_file_that_is_not_an_image_is_refused_with_how_to_write_one(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("hello")
    with pytest.raises(LocalClusterError, match="buildah push"):
        from_archive(file)


def test_naming_an_index_keeps_its_other_annotations() -> None:
    index = json.dumps({"manifests": [{"digest": "sha256:1", "annotations": {"a": "b"}}]}).encode()
    [manifest] = json.loads(named_index(index, "localhost/x:1"))["manifests"]
    assert manifest["annotations"] == {"a": "b", "io.containerd.image.name": "localhost/x:1"}


def _pod(name: str, phase: str, *ports: str) -> dict[str, Any]:
    container = {"ports": [{"name": port, "containerPort": 8000} for port in ports]}
    return {
        "metadata": {"name": name, "namespace": "team"},
        "spec": {"containers": [container]},
        "status": {"phase": phase, "podIP": "10.0.0.9"},
    }


def test_prometheus_scrapes_the_metrics_port_of_running_pods_only() -> None:
    pods = [_pod("runs", "Running", "http", "metrics"), _pod("done", "Succeeded", "metrics"), _pod("no", "Running")]
    assert targets(pods) == [{"targets": ["10.0.0.9:8000"], "labels": {"namespace": "team", "pod": "runs"}}]


def test_a_cache_that_the_cluster_would_hide_is_refused() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with pytest.raises(LocalClusterError, match="hides /var/lib"):
        check_host(ClusterSpec(control_plane_only=True), ClusterPaths(Path("/var/lib/cache/clusters/demo")))


def test_a_user_who_is_not_root_is_refused() -> None:
    paths = ClusterPaths(cache_root() / "clusters" / "demo")
    if os.geteuid() != 0:
        with pytest.raises(LocalClusterError, match="needs root"):
            check_host(ClusterSpec(), paths)
        return
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        try:
            check_host(ClusterSpec(), paths)
        except LocalClusterError as error:
            os._exit(0 if "needs root (user id is 65534)" in str(error) else 1)
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
