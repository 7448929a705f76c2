"""`finetune serve-manifest RESULT --for SERVER`: what loads a finished result there."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml

from finetune_api.names import MANIFEST_PATH
from finetune_cli import serving, serving_cloud, serving_kubernetes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "result", metavar="RESULT", help="folder of this machine, or URI (s3://…), of a finished result"
    )
    parser.add_argument("--for", dest="target", choices=serving.TARGETS, required=True, help="the server")
    parser.add_argument("--uri", metavar="URI", help="where the server finds it; default RESULT, e.g. pvc://claim/path")
    parser.add_argument("--base", metavar="URI", help="where the server finds the base model; default the job's")
    parser.add_argument("--name", help="of the model and the objects; default the job's")
    parser.add_argument("--image", default="", help="the server's image; default one that was current")
    parser.add_argument("--secret", default="", help="Secret in the namespace with AWS_* or HF_TOKEN")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs of one replica; default 1")


def run(options: argparse.Namespace) -> int:
    """0, or 1 where that server can't load it, 2 where there is no result."""
    try:
        result = _served(options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"finetune serve-manifest: {options.result} holds no finished result: {error}", file=sys.stderr)
        return 2
    why_not = serving.refusal(result, options.target) or _unreachable(result, options.target)
    if why_not:
        print(f"finetune serve-manifest: {why_not}", file=sys.stderr)
        return 1
    for note in serving.notes(result, options.target):
        print(f"note: {note}", file=sys.stderr)
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
    return str(yaml.safe_dump_all(objects, sort_keys=False))


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
    """Keys and endpoint from the environment, as `finetune run` takes them."""
    import os

    from finetune_api.run import Location, S3Config
    from finetune_trainer.failure import Failed
    from finetune_trainer.store import Access, open_folder

    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    insecure = bool(endpoint and endpoint.startswith("http://"))
    s3 = S3Config(endpoint=endpoint, region=os.environ.get("AWS_REGION", "us-east-1"), allow_http=insecure)
    try:
        return open_folder(Location(uri=uri, display=uri), "output", Access(s3, os.environ)).read(path)
    except Failed as failed:
        raise ValueError(failed.message) from None


def _unreachable(result: serving.Served, target: str) -> str | None:
    """A path of this machine says nothing to a server elsewhere."""
    model, adapter = serving.parts(result, target)  # type: ignore[arg-type]
    needed = {"s3"} if target == "sagemaker" else {"s3", "pvc", "gs"} if target == "vertex" else {"s3", "pvc", "hf"}
    for uri, option in ((model, "--base" if adapter else "--uri"), (adapter, "--uri")):
        scheme = (uri or "").partition("://")[0] if "://" in (uri or "") else "a path of this machine"
        if uri and scheme not in needed:
            return f"{target} can't reach {uri} ({scheme}); say where it finds it by {option} ({', '.join(sorted(needed))}://…)"
    return None
