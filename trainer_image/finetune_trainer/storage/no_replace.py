"""Gives a complete file its final name only if that name is free, in one atomic step.

A hard link does so on POSIX file systems. Some others (vfat, exfat, CIFS) have no hard links but a
rename that fails if the target exists.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
_NO_SUCH_RENAME = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)


class NotSupported(Exception):
    """Reports that a file system can do neither; the message has what it answered."""


def move(source: Path, target: Path) -> None:
    """Gives the file `source` the name `target`; `source` may remain as a second name of it.

    Raises FileExistsError if the name is taken, by whomever. Raises NotSupported, or another
    OSError. In all of these cases, nothing has changed.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        _rename(source, target, error)


def _rename(source: Path, target: Path, cause: OSError) -> None:
    """Renames a file, unless `target` exists, on a file system that refused a link by `cause`."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        raise NotSupported(f"link: {cause.strerror}") from None
    if renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE) == 0:
        return
    number = ctypes.get_errno()
    if number in _NO_SUCH_RENAME:
        raise NotSupported(f"link: {cause.strerror}; rename: {os.strerror(number)}")
    raise OSError(number, os.strerror(number), str(target))
