"""`finetune serve-manifest RESULT --for SERVER`: prints what serves a finished result there."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import yaml

from finetune_api import untrusted
from finetune_api.names import MANIFEST_PATH
from finetune_cli import serving, serving_cloud, serving_kubernetes
from finetune_cli.local import azure_config, gcs_config, s3_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `finetune serve-manifest`."""
    parser.add_argument(
        "result",
        metavar="RESULT",
        help="folder of a finished result on this machine, or its URI (s3://…, gs://…, az://…)",
    )
    parser.add_argument(
        "--for", dest="target", choices=serving.TARGETS, required=True, help="the server; vllm is the usual choice"
    )
    parser.add_argument(
        "--uri", metavar="URI", help="URI of the result as the server sees it, such as pvc://claim/path; default RESULT"
    )
    parser.add_argument(
        "--base", metavar="URI", help="URI of the base model as the server sees it; default that of the job"
    )
    parser.add_argument("--name", help="name of the model and of the objects; default that of the job")
    parser.add_argument(
        "--image", default="", help="image of the server; default a fixed version, which a comment of the output names"
    )
    parser.add_argument(
        "--secret", default="", help="name of a Secret with the keys AWS_* or HF_TOKEN, in the server's namespace"
    )
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs per replica; default 1")


def run(options: argparse.Namespace) -> int:
    """Prints the manifest.

    Returns 0, 1 if the server can't load the result, or 2 if there is no result.
    """
    try:
        result = _served(options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(
            f"finetune serve-manifest: {options.result} is not a finished result: {untrusted.line(str(error))}",
            file=sys.stderr,
        )
        return 2
    obstacle = serving.refusal(result, options.target) or _unreachable(result, options.target)
    if obstacle:
        print(f"finetune serve-manifest: {untrusted.line(obstacle)}", file=sys.stderr)
        return 1
    for note in serving.notes(result, options.target):
        print(f"note: {untrusted.line(note)}", file=sys.stderr)
    print(_text(result, options), end="")
    return 0


def _text(result: serving.Served, options: argparse.Namespace) -> str:
    if options.target == "sagemaker":
        calls: dict[str, Any] = serving_cloud.sagemaker(result, image=options.image, gpus=options.gpus)
        return json.dumps(calls, indent=2) + "\n"
    if options.target == "vertex":
        return json.dumps(serving_cloud.vertex(result, image=options.image, gpus=options.gpus), indent=2) + "\n"
    objects = serving_kubernetes.manifests(
        result, options.target, image=options.image, secret=options.secret, gpus=options.gpus
    )
    comments = "".join(f"# {line}\n" for line in serving_kubernetes.comments(options.target, options.image))
    return comments + str(yaml.safe_dump_all(objects, sort_keys=False))


def _served(options: argparse.Namespace) -> serving.Served:
    read = _remote if "://" in options.result else _local
    data, config = read(options.result, MANIFEST_PATH), read(options.result, "adapter_config.json")
    if data is None:
        raise ValueError(f"there is no {MANIFEST_PATH}; has the job succeeded?")
    manifest = json.loads(data)
    if options.base:
        manifest["provenance"]["model"]["uri"] = options.base
    if options.name:
        manifest["job"]["name"] = options.name
    uri = options.uri or options.result
    return serving.served(uri, manifest, json.loads(config) if config is not None else None)


def _local(folder: str, path: str) -> bytes | None:
    file = Path(folder).expanduser() / path
    return file.read_bytes() if file.is_file() else None


def _remote(uri: str, path: str) -> bytes | None:
    """Reads a file. Keys and endpoint come from the environment, as for `finetune run`."""
    from finetune_api.messages.run import Location
    from finetune_trainer.errors import RunError
    from finetune_trainer.storage.schemes import Access, open_folder

    try:
        access = Access(s3_config(os.environ), os.environ, gcs_config(os.environ), azure_config(os.environ))
        return open_folder(Location(uri=uri, display=uri), "output", access).read(path)
    except RunError as error:
        raise ValueError(error.message) from None


def _unreachable(result: serving.Served, target: str) -> str | None:
    """Returns a message if the server can't reach a URI, such as a path of this machine."""
    model, adapter = serving.parts(result, target)  # type: ignore[arg-type]
    reachable = {"s3"} if target == "sagemaker" else {"s3", "pvc", "gs"} if target == "vertex" else {"s3", "pvc", "hf"}
    for uri, option in ((model, "--base" if adapter else "--uri"), (adapter, "--uri")):
        scheme = (uri or "").partition("://")[0] if "://" in (uri or "") else "a path of this machine"
        if uri and scheme not in reachable:
            schemes = ", ".join(sorted(reachable))
            return f"{target} can't reach {uri} ({scheme}); give a URI that it can reach with {option} ({schemes}://…)"
    return None
