"""Implements Storage for file:// folders: a mounted claim, or a folder on this machine.

It uses plain pathlib rather than obstore's local store: errors keep their errno, names aren't
percent-encoded, and a link that leads out of the claim is noticed. Writes are atomic: they use a
temporary name, then rename or link (`no_replace`).
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

from finetune_trainer import opened_file
from finetune_trainer.errors import RunError, is_disk_full
from finetune_trainer.storage import no_replace
from finetune_trainer.storage.base import FIELD, NOT_FOUND, FileInfo, Role
from finetune_trainer.storage.bounds import INVALID, MAX_READ_BYTES, check_count, check_read

_COPIED_BYTES = 64 << 20


@contextmanager
def _translated_errors(role: Role, display: str) -> Iterator[None]:
    """Translates OSError to RunError by its errno."""
    try:
        yield
    except OSError as error:
        message = f"{FIELD[role]}: {display}: {error.strerror or error}"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise RunError("AccessDenied", f"{message}; check owner and mode (pods run as user 65532)") from None
        if is_disk_full(error):
            raise RunError("DiskFull", f"{message}; free space on that volume") from None
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
            raise RunError(NOT_FOUND[role], message) from None
        raise RunError("StorageUnavailable", message) from None
    except RuntimeError:  # also RecursionError, for thousands of nested folders
        raise RunError(
            INVALID[role],
            f"{FIELD[role]}: {display} has a link that leads to itself, or too many nested folders; remove them",
        ) from None


class LocalStorage:
    """Accesses the folder `root`. Nothing outside `bounds`, the mount, is ever read or written."""

    uses_scratch: ClassVar[bool] = False  # a download is a link

    def __init__(self, root: Path, *, role: Role, display: str, bounds: Path | None = None) -> None:
        self._root = root
        self._role = role
        self._display = display
        self._bounds = bounds.resolve() if bounds else None

    @property
    def display(self) -> str:
        """The URI as the user wrote it."""
        return self._display

    def local_path(self, path: str) -> Path:
        """Returns the resolved path of a file, so that a large one can be linked instead of copied.

        Raises RunError(AccessDenied) if the path leads out of the mount.
        """
        full = (self._root / path).resolve()
        if self._bounds and not full.is_relative_to(self._bounds):
            raise RunError(
                "AccessDenied",
                f"{FIELD[self._role]}: {self._display}/{path} is a link that leads out of its volume; copy the file",
            )
        return full

    def list(self, under: str = "") -> tuple[FileInfo, ...]:
        """Returns all files below a sub-folder, sorted by path; none if it doesn't exist."""
        with _translated_errors(self._role, self._display):
            base = self._own_path(f"{under}/file").parent if under else self._root
            if not base.is_dir():
                return ()
            entries = []
            for folder, _, names in os.walk(base, onerror=_raise):
                for name in names:
                    file = Path(folder, name)
                    path = file.relative_to(self._root).as_posix()
                    with suppress(FileNotFoundError):  # another node may be deleting files
                        if self.local_path(path).is_file():
                            entries.append(FileInfo(self._named(path), file.stat().st_size))
                check_count(len(entries), self._role, self._display)
            return tuple(sorted(entries, key=lambda entry: entry.path))

    def head(self, path: str) -> FileInfo | None:
        """Returns a file's size, or None if it doesn't exist."""
        with _translated_errors(self._role, self._display):
            try:
                full = self.local_path(path)
                return FileInfo(path, full.stat().st_size) if full.is_file() else None
            except (FileNotFoundError, NotADirectoryError):
                return None

    def read(self, path: str) -> bytes | None:
        """Returns the content of a small file, or None if it doesn't exist."""
        if self.head(path) is None:
            return None
        with _translated_errors(self._role, self._display), opened_file.opened(self.local_path(path)) as file:
            data = file.read(MAX_READ_BYTES + 1)
        check_read(len(data), self._role, f"{self._display}/{path}")
        return data

    def read_range(self, entry: FileInfo, start: int, end: int) -> bytes:
        """Returns the bytes of a file from `start` to `end`, or to its end if that comes first."""
        with _translated_errors(self._role, self._display), opened_file.opened(self.local_path(entry.path)) as file:
            file.seek(start)
            return file.read(end - start)

    def download(self, entry: FileInfo, target: Path) -> str:
        """Copies a small file, and links `target` to a large one. Returns the file's sha256.

        What is copied can't be replaced later. Whoever opens a link again checks what it opened.
        """
        with _translated_errors(self._role, self._display):
            path = self.local_path(entry.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            with opened_file.opened(path) as source:
                if os.fstat(source.fileno()).st_size <= _COPIED_BYTES:
                    return opened_file.copy(source, target)
                target.symlink_to(path)
                return opened_file.digest_of(source)

    def upload(self, source: Path, path: str) -> None:
        """Copies a file here, replacing an existing one. Never leaves a half-written file."""
        with _translated_errors(self._role, self._display), self._partial_file(path) as partial:
            shutil.copyfile(source, partial)
            os.replace(partial, self._root / path)

    def write(self, path: str, data: bytes) -> None:
        """Stores bytes as a file, replacing an existing one."""
        with _translated_errors(self._role, self._display), self._partial_file(path) as partial:
            _write_synced(partial, data)
            os.replace(partial, self._root / path)

    def create(self, path: str, data: bytes) -> bool:
        """Stores bytes as a new file. Returns False, and changes nothing, if the file exists."""
        with _translated_errors(self._role, self._display), self._partial_file(path) as partial:
            _write_synced(partial, data)
            try:
                no_replace.move(partial, self._root / path)
            except FileExistsError:
                return False
            except no_replace.NotSupported as error:
                raise RunError(
                    "InvalidConfig",
                    f"{FIELD[self._role]}: {self._display}: its file system ({error}) supports neither hard links nor "
                    "a rename that never replaces a file, so a manifest could overwrite another one; use a claim of "
                    "another storage class, such as NFS or a block device, or an s3://, gs:// or az:// URI",
                ) from None
            return True

    def delete(self, paths: tuple[str, ...]) -> None:
        """Deletes files, and then folders that are empty; ignores files that don't exist."""
        with _translated_errors(self._role, self._display):
            for path in paths:
                full = self._own_path(path)
                with suppress(FileNotFoundError, NotADirectoryError):
                    full.unlink()
                    self._remove_empty_folders(full.parent)

    def _remove_empty_folders(self, folder: Path) -> None:
        while folder != self._root and folder.is_relative_to(self._root):
            try:
                folder.rmdir()
            except OSError:
                return
            folder = folder.parent

    def _own_path(self, path: str) -> Path:
        """Returns the path of what is written, deleted or listed, which never leads through a link.

        Raises RunError(AccessDenied) if a folder on the way from `root` is one.
        """
        folder = (self._root / path).parent
        own = self._root.resolve() / Path(path).parent
        if folder.resolve() != own or (self._bounds and not own.is_relative_to(self._bounds)):
            raise RunError(
                "AccessDenied",
                f"{FIELD[self._role]}: {self._display}/{Path(path).parent} is or contains a link to another folder; "
                "replace it by a folder",
            )
        return self._root / path

    def _named(self, path: str) -> str:
        """Returns a path that was listed. Raises RunError if it has bytes that are no UTF-8."""
        try:
            path.encode()
        except UnicodeEncodeError:
            shown = ascii(path)[1:-1][:200]
            raise RunError(
                INVALID[self._role],
                f"{FIELD[self._role]}: {self._display} has a file whose name isn't UTF-8 ({shown}); rename it",
            ) from None
        return path

    @contextmanager
    def _partial_file(self, path: str) -> Iterator[Path]:
        """Yields a temporary path next to `path`, creates its folders, and deletes it at the
        end."""
        full = self._own_path(path)
        if self._bounds:
            self.local_path(path)
        full.parent.mkdir(parents=True, exist_ok=True)
        partial = full.parent / f".{full.name}.{uuid.uuid4().hex[:8]}.part"
        try:
            yield partial
        finally:
            partial.unlink(missing_ok=True)


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
