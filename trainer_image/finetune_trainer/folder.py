"""FolderPlace: file:// places (a mounted claim, or a folder of this machine). Opened by `store` only.

Plain pathlib rather than obstore's local store: errors keep their errno, names aren't percent-encoded, and a link
that leads out of the claim is seen. Writes are atomic (a temporary name, then rename or link).
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from finetune_trainer import digests
from finetune_trainer.failure import Failed
from finetune_trainer.place import FIELD, NOT_FOUND, Entry, Role


@contextmanager
def _translated(role: Role, display: str) -> Iterator[None]:
    """OSError → Failed, by errno."""
    try:
        yield
    except OSError as error:
        what = f"{FIELD[role]}: {display}: {error.strerror or error}"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise Failed("AccessDenied", f"{what}; check owner and mode (pods run as user 65532)") from None
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Failed("DiskFull", f"{what}; free space on that volume") from None
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
            raise Failed(NOT_FOUND[role], what) from None
        raise Failed("StorageUnavailable", what) from None


class FolderPlace:
    """`root` is the folder; nothing outside `bounds` (the mount) is ever read or written."""

    def __init__(self, root: Path, *, role: Role, display: str, bounds: Path | None = None) -> None:
        self._root = root
        self._role = role
        self._display = display
        self._bounds = bounds.resolve() if bounds else None

    @property
    def display(self) -> str:
        return self._display

    def local_path(self, path: str) -> Path:
        """Where a file really lies, so that a big one can be linked to instead of copied."""
        full = (self._root / path).resolve()
        if self._bounds and not full.is_relative_to(self._bounds):
            raise Failed(
                "AccessDenied",
                f"{FIELD[self._role]}: {self._display}/{path} is a link that leads out of its volume; copy the file",
            )
        return full

    def list(self, under: str = "") -> tuple[Entry, ...]:
        base = self._root / under if under else self._root
        with _translated(self._role, self._display):
            if not base.is_dir():
                return ()
            found = []
            for folder, _, names in os.walk(base, onerror=_raise):
                for name in names:
                    file = Path(folder, name)
                    path = file.relative_to(self._root).as_posix()
                    with suppress(FileNotFoundError):  # another node may be at work there
                        if self.local_path(path).is_file():
                            found.append(Entry(path, file.stat().st_size))
            return tuple(sorted(found, key=lambda entry: entry.path))

    def head(self, path: str) -> Entry | None:
        with _translated(self._role, self._display):
            try:
                full = self.local_path(path)
                return Entry(path, full.stat().st_size) if full.is_file() else None
            except (FileNotFoundError, NotADirectoryError):
                return None

    def read(self, path: str) -> bytes | None:
        if self.head(path) is None:
            return None
        with _translated(self._role, self._display):
            return self.local_path(path).read_bytes()

    def download(self, entry: Entry, target: Path) -> str:
        with _translated(self._role, self._display):
            source = self.local_path(entry.path)
            digest = digests.of_file(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            target.symlink_to(source)
            return digest

    def upload(self, source: Path, path: str) -> None:
        with _translated(self._role, self._display), self._aside(path) as aside:
            shutil.copyfile(source, aside)
            os.replace(aside, self._root / path)

    def write(self, path: str, data: bytes) -> None:
        with _translated(self._role, self._display), self._aside(path) as aside:
            _write_synced(aside, data)
            os.replace(aside, self._root / path)

    def create(self, path: str, data: bytes) -> bool:
        with _translated(self._role, self._display), self._aside(path) as aside:
            _write_synced(aside, data)
            try:
                os.link(aside, self._root / path)
            except FileExistsError:
                return False
            return True

    def delete(self, paths: tuple[str, ...]) -> None:
        with _translated(self._role, self._display):
            for path in paths:
                full = self._root / path
                with suppress(FileNotFoundError, NotADirectoryError):
                    full.unlink()
                    self._drop_empty(full.parent)

    def _drop_empty(self, folder: Path) -> None:
        while folder != self._root and folder.is_relative_to(self._root):
            try:
                folder.rmdir()
            except OSError:
                return
            folder = folder.parent

    @contextmanager
    def _aside(self, path: str) -> Iterator[Path]:
        """A temporary name beside `path`, gone afterwards; the folders above are made."""
        full = self._root / path
        if self._bounds:
            self.local_path(path)
        full.parent.mkdir(parents=True, exist_ok=True)
        aside = full.parent / f".{full.name}.{uuid.uuid4().hex[:8]}.part"
        try:
            yield aside
        finally:
            aside.unlink(missing_ok=True)


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
