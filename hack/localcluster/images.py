"""Imports images into a cluster's containerd, among them the pause image, which is built here."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from localcluster import sandbox
from localcluster.errors import LocalClusterError
from localcluster.paths import ClusterPaths


@dataclass(frozen=True)
class Containerd:
    """The containerd of a running cluster, reached by `ctr` in its namespaces."""

    pid: int

    @classmethod
    def of(cls, paths: ClusterPaths) -> Containerd:
        """Returns the cluster's containerd. Raises LocalClusterError if the cluster is not up."""
        pid = sandbox.init_pid(paths.root)
        if pid is None:
            raise LocalClusterError(f"cluster {paths.root.name!r} is not up; run `up` first")
        return cls(pid)

    def _argv(self, *arguments: str) -> list[str]:
        return [*sandbox.enter(self.pid), "ctr", "--namespace", "k8s.io", *arguments]

    def ctr(self, *arguments: str) -> str:
        """Returns ctr's output. Raises LocalClusterError with its error message."""
        done = subprocess.run(self._argv(*arguments), capture_output=True, text=True, check=False)
        if done.returncode:
            raise LocalClusterError(f"ctr {' '.join(arguments[:2])} failed: {done.stderr.strip()}")
        return done.stdout

    def answers(self) -> bool:
        """Whether containerd responds."""
        return subprocess.run(self._argv("version"), capture_output=True, check=False).returncode == 0

    def has(self, reference: str) -> bool:
        """Whether an image of that name was imported."""
        return reference in self.ctr("images", "list", "--quiet", f"name=={reference}").split()

    def import_stream(self, write: Callable[[IO[bytes]], None]) -> None:
        """Imports the OCI archive that `write` writes. Raises LocalClusterError if that fails."""
        argv = self._argv("images", "import", "-")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        with subprocess.Popen(argv, **pipes) as ctr:  # type: ignore[call-overload]
            try:
                write(ctr.stdin)
                ctr.stdin.close()
            except BrokenPipeError:
                pass  # its message on stderr says more
            message = ctr.stderr.read().decode(errors="replace").strip()
        if ctr.returncode:
            raise LocalClusterError(f"containerd can't import the image: {message}")
        self.ctr("content", "prune", "references")  # unpacked layers aren't needed as blobs, too


def pause_image(program: Path) -> str:
    """Returns the name of the sandbox image.

    Its tag is the program's build key, so that an outdated image is never used.
    """
    return f"localhost/localcluster-pause:{program.parent.name.rsplit('-', 1)[-1]}"


def import_pause(runtime: Containerd, program: Path) -> None:
    """Imports the sandbox image that `program` makes, unless it was imported before."""
    name = pause_image(program)
    if runtime.has(name):
        return
    archive = one_file_image(name, "pause", program.read_bytes())
    runtime.import_stream(lambda pipe: pipe.writelines([archive]))


def one_file_image(name: str, file: str, content: bytes) -> bytes:
    """Returns an OCI archive of an image with one static program as its entrypoint.

    The same input gives the same bytes.
    """
    layer = _tar({file: content}, 0o755)
    architecture = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
    config = _json(
        {
            "architecture": architecture,
            "os": "linux",
            "config": {"Entrypoint": [f"/{file}"], "User": "65534:65534"},
            "rootfs": {"type": "layers", "diff_ids": [_sha(layer)]},
        }
    )
    compressed = gzip.compress(layer, mtime=0)
    kind = "application/vnd.oci.image"
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": f"{kind}.manifest.v1+json",
            "config": {"mediaType": f"{kind}.config.v1+json", "digest": _sha(config), "size": len(config)},
            "layers": [{"mediaType": f"{kind}.layer.v1.tar+gzip", "digest": _sha(compressed), "size": len(compressed)}],
        }
    )
    annotations = {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name.rsplit(":", 1)[-1]}
    index = _json(
        {
            "schemaVersion": 2,
            "manifests": [
                {
                    "mediaType": f"{kind}.manifest.v1+json",
                    "digest": _sha(manifest),
                    "size": len(manifest),
                    "annotations": annotations,
                }
            ],
        }
    )
    blobs = {f"blobs/sha256/{_sha(blob)[7:]}": blob for blob in (compressed, config, manifest)}
    return _tar({"oci-layout": _json({"imageLayoutVersion": "1.0.0"}), "index.json": index, **blobs}, 0o644)


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _sha(blob: bytes) -> str:
    return f"sha256:{hashlib.sha256(blob).hexdigest()}"


def _tar(files: dict[str, bytes], mode: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), mode
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()
