"""Implements Storage for s3:// buckets, by obstore. No other module imports obstore."""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import obstore
from obstore import exceptions
from obstore.store import S3Store

from finetune_api.messages.run import S3Config
from finetune_api.names import SECRET_AWS_KEYS
from finetune_trainer.errors import RunError
from finetune_trainer.storage.base import FIELD, NOT_FOUND, FileInfo, Role

PART_BYTES = 16 << 20
PARTS_AT_ONCE = 8
_REFUSAL_CODES = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken",
            "XAdminUserNotFound")  # fmt: skip
_NO_BUCKET = "the bucket doesn't exist"
_DEFAULT_REGION = "us-east-1"
_PLACE_KEYS = frozenset(("AWS_REGION", "AWS_ENDPOINT_URL"))
"""Keys of a Secret that say where a bucket is, not who may access it."""
_IDENTITY_VARIABLES = (
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)


@dataclass(frozen=True)
class RetryPolicy:
    """Limits how often, and for how many seconds, one request is retried before it fails."""

    retries: int = 6
    seconds: float = 60.0
    first_wait: float = 0.2
    request_seconds: float = 120.0


def access_options(
    config: S3Config, secret: Mapping[str, str] | None, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Returns the keyword arguments of S3Store. It is pure.

    The keys are the Secret's, else those of the environment or the pod's identity, which obstore
    reads itself. If there are none and the endpoint isn't AWS, access is anonymous. Endpoint and
    region are the Secret's, else the administrator's, else the environment's; a Secret may have
    only these two, for use with the pod's identity. Raises RunError(CredentialsMissing) if the
    Secret lacks a key, and RunError(InvalidConfig) for an unencrypted endpoint that the
    administrator doesn't allow.
    """
    secret = secret or {}
    values = {key: secret[key] for key in SECRET_AWS_KEYS if secret.get(key)}
    endpoint = values.get("AWS_ENDPOINT_URL") or config.endpoint or environment.get("AWS_ENDPOINT_URL")
    if endpoint and endpoint.lower().startswith("http://") and not config.allow_http:
        source = "the Secret's AWS_ENDPOINT_URL" if values.get("AWS_ENDPOINT_URL") else "the S3 endpoint"
        raise RunError(
            "InvalidConfig",
            f"{source} {endpoint} isn't encrypted, which the administrator doesn't allow (storage.s3.allowHttp); "
            "use an https:// endpoint",
        )
    options: dict[str, Any] = {
        "region": values.get("AWS_REGION") or config.region or _region_of(environment),
        "client_options": {"allow_http": config.allow_http},
    }
    if endpoint:
        options["endpoint"] = endpoint
    pair = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    if any(key in values for key in pair):
        for key in pair:
            if key not in values:
                raise RunError("CredentialsMissing", f"the Secret has no key {key}; add it, both are needed")
        options["access_key_id"], options["secret_access_key"] = (values[key] for key in pair)
        if "AWS_SESSION_TOKEN" in values:
            options["session_token"] = values["AWS_SESSION_TOKEN"]
        return options
    anonymous = endpoint and not any(environment.get(name) for name in (pair[0], *_IDENTITY_VARIABLES))
    if secret and (anonymous or not _PLACE_KEYS.issuperset(secret)):
        raise RunError(
            "CredentialsMissing",
            f"the Secret has neither {pair[0]} nor {pair[1]}; add both. Only where the pod has an identity, a Secret "
            f"may do without them, and have just {' or '.join(sorted(_PLACE_KEYS, reverse=True))}",
        )
    if anonymous:
        options["skip_signature"] = True
    return options


def _region_of(environment: Mapping[str, str]) -> str:
    return environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or _DEFAULT_REGION


def open_bucket(
    bucket: str, prefix: str, *, role: Role, display: str, options: dict[str, Any], retries: RetryPolicy
) -> S3Storage:
    """Opens a prefix of a bucket. Sends no request. `options` come from `access_options`."""
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
    store = S3Store(bucket, **{**options, "client_options": client, "retry_config": retry})
    return S3Storage(store, prefix.strip("/"), role=role, display=display)


class S3Storage:
    """Accesses the objects of a bucket below a prefix."""

    uses_scratch: ClassVar[bool] = True

    def __init__(self, store: Any, prefix: str, *, role: Role, display: str) -> None:
        self._store = store
        self._prefix = prefix
        self._role: Role = role
        self._display = display

    @property
    def display(self) -> str:
        """The URI as the user wrote it."""
        return self._display

    def list(self, under: str = "") -> tuple[FileInfo, ...]:
        """Returns all files below a sub-folder, at any depth, sorted by path."""
        prefix = self._key(under)
        with self._translated_errors(if_missing=_NO_BUCKET):
            items = [item for page in obstore.list(self._store, prefix=prefix or None) for item in page]
        skip = len(self._prefix) + 1 if self._prefix else 0
        entries = [FileInfo(item["path"][skip:], int(item["size"]), item["e_tag"]) for item in items]
        return tuple(sorted((entry for entry in entries if entry.path), key=lambda entry: entry.path))

    def head(self, path: str) -> FileInfo | None:
        """Returns a file's size and etag, or None if it doesn't exist."""
        try:
            with self._translated_errors():
                item = obstore.head(self._store, self._key(path))
        except FileNotFoundError:
            self._explain_missing(path)
            return None
        return FileInfo(path, int(item["size"]), item["e_tag"])

    def read(self, path: str) -> bytes | None:
        """Returns the content of a small file, or None if it doesn't exist."""
        try:
            with self._translated_errors():
                return bytes(obstore.get(self._store, self._key(path)).bytes())
        except FileNotFoundError:
            self._explain_missing(path)
            return None

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
        with self._translated_errors(if_missing=_NO_BUCKET):
            obstore.put(self._store, self._key(path), source, chunk_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE)

    def write(self, path: str, data: bytes) -> None:
        """Stores bytes as a file, replacing an existing one."""
        with self._translated_errors(if_missing=_NO_BUCKET):
            obstore.put(self._store, self._key(path), data)

    def create(self, path: str, data: bytes) -> bool:
        """Stores bytes as a new file. Returns False, and changes nothing, if the file exists.

        A store without conditional writes is checked first, which isn't atomic.
        """
        try:
            with self._translated_errors(if_missing=_NO_BUCKET):
                obstore.put(self._store, self._key(path), data, mode="create")
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
            return False
        except exceptions.NotSupportedError:
            if self.head(path) is not None:
                return False
            self.write(path, data)
        return True

    def delete(self, paths: tuple[str, ...]) -> None:
        """Deletes files; ignores those that don't exist."""
        if not paths:
            return
        with self._translated_errors():
            try:
                obstore.delete(self._store, [self._key(path) for path in paths])
            except FileNotFoundError:
                return

    def _part(self, entry: FileInfo, start: int) -> bytes:
        end = min(start + PART_BYTES, entry.size)
        options: dict[str, Any] = {"range": (start, end)}
        if entry.etag:
            options["if_match"] = entry.etag
        with self._translated_errors():
            try:
                return bytes(obstore.get(self._store, self._key(entry.path), options=options).bytes())
            except exceptions.PreconditionError:
                raise RunError("StorageUnavailable", f"{self._at(entry.path)} changed while it was read") from None

    def _explain_missing(self, path: str) -> None:
        """Raises RunError if a 404 was due to a missing bucket or an unknown access key.

        The response to a HEAD has no body with the cause, but the response to a list has one.
        """
        with self._translated_errors(if_missing=_NO_BUCKET):
            next(iter(obstore.list(self._store, prefix=self._key(path))), None)

    def _key(self, path: str) -> str:
        return f"{self._prefix}/{path}".strip("/")

    def _at(self, path: str = "") -> str:
        return f"{FIELD[self._role]}: {self._display}{'/' + path if path else ''}"

    def _refused(self, error: Exception) -> RunError:
        return RunError("AccessDenied", f"{self._at()}: the store refused the credentials ({_first_line(error)})")

    @contextmanager
    def _translated_errors(self, *, if_missing: str | None = None) -> Iterator[None]:
        """Translates obstore's errors to RunError.

        A missing object raises FileNotFoundError, or RunError with the message `if_missing`.
        """
        try:
            yield
        except FileNotFoundError as error:
            if _is_refusal(error):
                raise self._refused(error) from None
            if if_missing is None:
                raise
            raise RunError(NOT_FOUND[self._role], f"{self._at()}: {if_missing}") from None
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
            raise self._refused(error) from None
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError, exceptions.NotSupportedError):
            raise
        except exceptions.BaseError as error:
            if _is_refusal(error):
                raise self._refused(error) from None
            if "NoSuchBucket" in str(error):  # obstore has no exception type for it
                raise RunError(NOT_FOUND[self._role], f"{self._at()}: {_NO_BUCKET}") from None
            if "169.254." in str(error):
                raise RunError(
                    "CredentialsMissing",
                    f"{self._at()}: there are no keys; name a Secret in credentialsRef, or give the pod an identity",
                ) from None
            raise RunError("StorageUnavailable", f"{self._at()}: {_first_line(error)}") from None


def _is_refusal(error: Exception) -> bool:
    """Whether the store refused the credentials.

    Some stores respond to an unknown key with a 404, and say why only in the body.
    """
    return any(f"<Code>{code}</Code>" in str(error) for code in _REFUSAL_CODES)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
