"""Implements Storage for s3:// and gs:// buckets and az:// containers, by obstore.

No other module imports obstore.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import obstore
from obstore import exceptions
from obstore.store import AzureStore, GCSStore, S3Store

from finetune_trainer.errors import RunError
from finetune_trainer.storage import refusals
from finetune_trainer.storage.base import FIELD, NOT_FOUND, FileInfo, Role
from finetune_trainer.storage.bounds import MAX_FILES, check_count, check_read, invalid_key, is_invalid_key
from finetune_trainer.storage.requests import redirects
from finetune_trainer.storage.requests.repeats import RetryPolicy, repeated

T = TypeVar("T")
PART_BYTES = 16 << 20
PARTS_AT_ONCE = 8
_REFUSED = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)
_CONDITIONAL = (exceptions.AlreadyExistsError, exceptions.PreconditionError, exceptions.NotSupportedError)
_STORES: dict[str, Callable[..., Any]] = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}
_CONTAINERS: dict[str, str] = {"s3": "bucket", "gs": "bucket", "az": "container"}


def open_bucket(
    scheme: str, path: str, *, role: Role, display: str, options: dict[str, Any], retries: RetryPolicy
) -> BucketStorage:
    """Opens the folder `path`, which begins with the bucket. Sends no request.

    `options` come from the `access_options` of the scheme. Raises RunError(CredentialsMissing) if
    obstore can't use them.
    """
    bucket, _, prefix = path.partition("/")
    client = {
        **options.get("client_options", {}),
        "connect_timeout": timedelta(seconds=5),
        "timeout": timedelta(seconds=retries.request_seconds),
    }
    retry = {
        "max_retries": retries.retries,
        "retry_timeout": timedelta(seconds=retries.seconds),
        "backoff": {
            "init_backoff": timedelta(seconds=retries.first_wait),
            "max_backoff": timedelta(seconds=10),
            "base": 2,
        },
    }
    try:
        store = _STORES[scheme](bucket, **{**options, "client_options": client, "retry_config": retry})
    except (ValueError, exceptions.BaseError) as error:
        cause = f"the credentials or the endpoint can't be used ({refusals.explanation(error)})"
        raise RunError("CredentialsMissing", f"{FIELD[role]}: {display}: {cause}; check them") from None
    return BucketStorage(store, prefix.strip("/"), _CONTAINERS[scheme], role=role, display=display, retries=retries)


class BucketStorage:
    """Accesses the objects of a bucket below a prefix. `container` is the store's word for it."""

    uses_scratch: ClassVar[bool] = True

    def __init__(
        self, store: Any, prefix: str, container: str, *, role: Role, display: str, retries: RetryPolicy
    ) -> None:
        self._store = store
        self._no_bucket = f"the {container} doesn't exist"
        self._prefix = prefix
        self._role: Role = role
        self._display = display
        self._retries = retries

    @property
    def display(self) -> str:
        """The URI as the user wrote it."""
        return self._display

    def list(self, under: str = "") -> tuple[FileInfo, ...]:
        """Returns all files below a sub-folder, at any depth, sorted by path."""
        prefix = self._key(under)
        with self._translated_errors(if_missing=self._no_bucket):
            items = self._repeated(lambda: self._items(prefix))
        check_count(len(items), self._role, self._display)
        skip = len(self._prefix) + 1 if self._prefix else 0
        entries = [FileInfo(item["path"][skip:], int(item["size"]), _quoted(item["e_tag"])) for item in items]
        return tuple(sorted((entry for entry in entries if entry.path), key=lambda entry: entry.path))

    def head(self, path: str) -> FileInfo | None:
        """Returns a file's size and etag, or None if it doesn't exist."""
        try:
            with self._translated_errors():
                item = self._repeated(lambda: obstore.head(self._store, self._key(path)))
        except FileNotFoundError:
            self._explain_missing(path)
            return None
        return FileInfo(path, int(item["size"]), _quoted(item["e_tag"]))

    def read(self, path: str) -> bytes | None:
        """Returns the content of a small file, or None if it doesn't exist."""
        try:
            with self._translated_errors():
                return self._repeated(lambda: self._content(path))
        except FileNotFoundError:
            self._explain_missing(path)
            return None

    def read_range(self, entry: FileInfo, start: int, end: int) -> bytes:
        """Returns the bytes of a file from `start` to `end`, or to its end if that comes first."""
        end = min(end, entry.size)
        try:
            return self._range(entry, start, end) if start < end else b""
        except FileNotFoundError:
            raise RunError(NOT_FOUND[self._role], f"{self._at(entry.path)} was deleted while it was read") from None

    def download(self, entry: FileInfo, target: Path) -> str:
        """Downloads a file in parallel parts and returns its sha256.

        The parts are written and hashed in order, so at most PARTS_AT_ONCE of them are in memory.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        starts = range(0, entry.size, PART_BYTES)
        try:
            with target.open("wb") as file, ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
                remaining = iter(starts)
                pending: deque[Future[bytes]] = deque(
                    pool.submit(self._part, entry, start) for start in itertools.islice(remaining, PARTS_AT_ONCE)
                )
                while pending:
                    data = pending.popleft().result()
                    pending.extend(pool.submit(self._part, entry, start) for start in itertools.islice(remaining, 1))
                    digest.update(data)
                    file.write(data)
        except FileNotFoundError:
            raise RunError(NOT_FOUND[self._role], f"{self._at(entry.path)} was deleted while it was read") from None
        return digest.hexdigest()

    def upload(self, source: Path, path: str) -> None:
        """Uploads a file, in parts if it is large, replacing an existing one."""
        with self._translated_errors(if_missing=self._no_bucket):
            options: dict[str, Any] = {"chunk_size": PART_BYTES, "max_concurrency": PARTS_AT_ONCE}
            self._repeated(lambda: obstore.put(self._store, self._key(path), source, **options))

    def write(self, path: str, data: bytes) -> None:
        """Stores bytes as a file, replacing an existing one."""
        with self._translated_errors(if_missing=self._no_bucket):
            self._repeated(lambda: obstore.put(self._store, self._key(path), data))

    def create(self, path: str, data: bytes) -> bool:
        """Stores bytes as a new file. Returns False, and changes nothing, if the file exists.

        A file with the same bytes counts as this one: the answer to an earlier try may have been
        lost. A store without conditional writes is checked first, which isn't atomic.
        """
        try:
            with self._translated_errors(if_missing=self._no_bucket, conditional=True):
                self._repeated(lambda: obstore.put(self._store, self._key(path), data, mode="create"))
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
            return self.read(path) == data
        except exceptions.NotSupportedError:
            if self.head(path) is not None:
                return False
            self.write(path, data)
        return True

    def delete(self, paths: tuple[str, ...]) -> None:
        """Deletes files; ignores those that don't exist."""
        if not paths:
            return
        keys = [self._key(path) for path in paths]
        with self._translated_errors():
            try:
                self._repeated(lambda: obstore.delete(self._store, keys))
                return
            except FileNotFoundError:  # Google's and Azure's stop at the first file that doesn't exist
                pass
        for key in keys if len(keys) > 1 else ():
            with suppress(FileNotFoundError), self._translated_errors():
                self._delete(key)

    def _items(self, prefix: str) -> tuple[Any, ...]:
        pages = obstore.list(self._store, prefix=prefix or None)
        return tuple(itertools.islice((item for page in pages for item in page), MAX_FILES + 1))

    def _content(self, path: str) -> bytes:
        response = obstore.get(self._store, self._key(path))
        check_read(int(response.meta["size"]), self._role, f"{self._display}/{path}")
        return bytes(response.bytes())

    def _delete(self, key: str) -> None:
        self._repeated(lambda: obstore.delete(self._store, key))

    def _repeated(self, action: Callable[[], T]) -> T:
        return repeated(action, self._retries)

    def _part(self, entry: FileInfo, start: int) -> bytes:
        return self._range(entry, start, min(start + PART_BYTES, entry.size))

    def _range(self, entry: FileInfo, start: int, end: int) -> bytes:
        options: dict[str, Any] = {"range": (start, end)}
        if entry.etag:
            options["if_match"] = entry.etag
        with self._translated_errors(conditional=True):
            try:
                key = self._key(entry.path)
                return self._repeated(lambda: bytes(obstore.get(self._store, key, options=options).bytes()))
            except exceptions.PreconditionError:
                raise RunError("StorageUnavailable", f"{self._at(entry.path)} changed while it was read") from None

    def _explain_missing(self, path: str) -> None:
        """Raises RunError if a 404 was due to a missing bucket or an unknown access key.

        The response to a HEAD has no body with the cause, but the response to a list has one.
        """
        with self._translated_errors(if_missing=self._no_bucket):
            self._repeated(lambda: next(iter(obstore.list(self._store, prefix=self._key(path))), None))

    def _key(self, path: str) -> str:
        return f"{self._prefix}/{path}".strip("/")

    def _at(self, path: str = "") -> str:
        return f"{FIELD[self._role]}: {self._display}{'/' + path if path else ''}"

    def _unavailable(self, error: Exception) -> RunError:
        return RunError("StorageUnavailable", f"{self._at()}: {refusals.explanation(error)}")

    @contextmanager
    def _translated_errors(self, *, if_missing: str | None = None, conditional: bool = False) -> Iterator[None]:
        """Translates obstore's errors to RunError.

        A missing object raises FileNotFoundError, or RunError with the message `if_missing`. The
        errors of a conditional request are obstore's own.
        """
        try:
            yield
        except (FileNotFoundError, exceptions.BaseError) as error:
            if redirects.is_redirect(error):
                message = f"{self._at()}: the store redirects to another server, which isn't followed; name that one"
                raise RunError("InvalidConfig", message) from None
            cause = refusals.cause(error)
            if cause == "full":
                message = f"{self._at()}: the store is full ({refusals.explanation(error)}); make room"
                raise RunError("DiskFull", message) from None
            if cause == "refused" or isinstance(error, _REFUSED):
                message = f"{self._at()}: the store refused the credentials ({refusals.explanation(error)})"
                raise RunError("AccessDenied", message) from None
            if isinstance(error, FileNotFoundError) and if_missing is None:
                raise
            if isinstance(error, FileNotFoundError) or cause == "no container":
                raise RunError(NOT_FOUND[self._role], f"{self._at()}: {if_missing or self._no_bucket}") from None
            if conditional and isinstance(error, _CONDITIONAL):
                raise
            if is_invalid_key(error):
                raise invalid_key(self._role, self._display, refusals.explanation(error)) from None
            if cause == "no identity":
                message = "there are no keys; name a Secret in credentialsRef, or give the pod an identity"
                raise RunError("CredentialsMissing", f"{self._at()}: {message}") from None
            raise self._unavailable(error) from None


def _quoted(etag: str | None) -> str | None:
    """Returns an etag as a condition has to name it. Azure's lists have it without its quotes."""
    return f'"{etag}"' if etag and not etag.endswith('"') else etag
