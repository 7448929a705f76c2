"""Debian's static busybox as an image, for pods that only listen, connect or wait."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from localcluster.images import one_file_image
from localcluster.paths import cache_root

BUSYBOX = "localhost/localcluster-busybox:test"


def busybox_archive(scratch: Path) -> Path:
    """Returns an OCI archive of the image BUSYBOX, in the empty folder `scratch`."""
    binary = cache_root() / "test" / "busybox"
    if not binary.exists():
        folder = scratch / "package"
        folder.mkdir()
        folder.chmod(0o777)
        subprocess.run(["apt-get", "-qq", "download", "busybox-static"], cwd=folder, check=True)
        [package] = folder.glob("*.deb")
        subprocess.run(["dpkg", "-x", package, folder], check=True)
        binary.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "bin" / "busybox", binary)
    archive = scratch / "busybox.tar"
    archive.write_bytes(one_file_image(BUSYBOX, "busybox", binary.read_bytes()))
    return archive
