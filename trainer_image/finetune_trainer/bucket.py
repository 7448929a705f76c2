"""BucketPlace: s3:// places, by obstore. Opened by `store` only; the one importer of obstore."""

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
from typing import Any

import obstore
from obstore import exceptions
from obstore.store import S3Store

from finetune_api.names import SECRET_AWS_KEYS
from finetune_api.run import S3Config
from finetune_trainer.failure import Failed
from finetune_trainer.place import FIELD, NOT_FOUND, Entry, Role

PART_BYTES = 16 << 20
PARTS_AT_ONCE = 8
_REFUSED = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken",
            "XAdminUserNotFound")  # fmt: skip
_IDENTITY = (
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)


@dataclass(frozen=True)
class Patience:
    """How long one request is tried again (a store's hiccup), before the caller hears of it."""

    retries: int = 6
    seconds: float = 60.0
    first_wait: float = 0.2
    request_seconds: float = 120.0


def access_options(
    config: S3Config, secret: Mapping[str, str] | None, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Keyword arguments of S3Store. Pure.

    Keys: the Secret's, else the environment's or the pod's identity (which obstore reads itself), else anonymous
    where the endpoint is the administrator's own. The endpoint: the Secret's, else the administrator's.
    Raises Failed(CredentialsMissing) for a Secret with half a key.
    """
    secret = secret or {}
    given = {key: secret[key] for key in SECRET_AWS_KEYS if secret.get(key)}
    endpoint = given.get("AWS_ENDPOINT_URL") or config.endpoint or environment.get("AWS_ENDPOINT_URL")
    options: dict[str, Any] = {
        "region": given.get("AWS_REGION") or config.region,
        "client_options": {"allow_http": config.allow_http or (endpoint or "").startswith("http://")},
    }
    if endpoint:
        options["endpoint"] = endpoint
    pair = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    if any(key in given for key in pair):
        for key in pair:
            if key not in given:
                raise Failed("CredentialsMissing", f"the Secret has no key {key}, but the other half of the pair")
        options["access_key_id"], options["secret_access_key"] = (given[key] for key in pair)
        if "AWS_SESSION_TOKEN" in given:
            options["session_token"] = given["AWS_SESSION_TOKEN"]
    elif secret:
        raise Failed("CredentialsMissing", f"the Secret has neither {pair[0]} nor {pair[1]}")
    elif endpoint and not environment.get(pair[0]) and not any(environment.get(name) for name in _IDENTITY):
        options["skip_signature"] = True
    return options


def open_bucket(bucket: str, prefix: str, *, role: Role, display: str, options: dict[str, Any], patience: Patience
                ) -> BucketPlace:  # fmt: skip
    client = {
        **options.get("client_options", {}),
        "connect_timeout": timedelta(seconds=5),
        "timeout": timedelta(seconds=patience.request_seconds),
    }
    retry = {
        "max_retries": patience.retries,
        "retry_timeout": timedelta(seconds=patience.seconds),
        "backoff": {
            "init_backoff": timedelta(seconds=patience.first_wait),
            "max_backoff": timedelta(seconds=10),
            "base": 2,
        },
    }
    store = S3Store(bucket, **{**options, "client_options": client, "retry_config": retry})
    return BucketPlace(store, prefix.strip("/"), role=role, display=display)


class BucketPlace:
    """A prefix of a bucket."""

    def __init__(self, store: Any, prefix: str, *, role: Role, display: str) -> None:
        self._store = store
        self._prefix = prefix
        self._role: Role = role
        self._display = display

    @property
    def display(self) -> str:
        return self._display

    def list(self, under: str = "") -> tuple[Entry, ...]:
        prefix = self._key(under)
        with self._translated(missing_is="the bucket isn't there"):
            found = [item for page in obstore.list(self._store, prefix=prefix or None) for item in page]
        skip = len(self._prefix) + 1 if self._prefix else 0
        entries = [Entry(item["path"][skip:], int(item["size"]), item["e_tag"]) for item in found]
        return tuple(sorted((entry for entry in entries if entry.path), key=lambda entry: entry.path))

    def head(self, path: str) -> Entry | None:
        try:
            with self._translated():
                item = obstore.head(self._store, self._key(path))
        except FileNotFoundError:
            self._explain_missing(path)
            return None
        return Entry(path, int(item["size"]), item["e_tag"])

    def read(self, path: str) -> bytes | None:
        try:
            with self._translated():
                return bytes(obstore.get(self._store, self._key(path)).bytes())
        except FileNotFoundError:
            self._explain_missing(path)
            return None

    def download(self, entry: Entry, target: Path) -> str:
        """In parts, several at once; written and hashed in order, so memory stays at PARTS_AT_ONCE parts."""
        target.parent.mkdir(parents=True, exist_ok=True)
        whole = hashlib.sha256()
        starts = range(0, entry.size, PART_BYTES)
        try:
            with target.open("wb") as file, ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
                rest = iter(starts)
                waiting: deque[Future[bytes]] = deque(
                    pool.submit(self._part, entry, start) for start in itertools.islice(rest, PARTS_AT_ONCE)
                )
                while waiting:
                    data = waiting.popleft().result()
                    waiting.extend(pool.submit(self._part, entry, start) for start in itertools.islice(rest, 1))
                    whole.update(data)
                    file.write(data)
        except FileNotFoundError:
            raise Failed(NOT_FOUND[self._role], f"{self._at(entry.path)} vanished while it was read") from None
        return whole.hexdigest()

    def upload(self, source: Path, path: str) -> None:
        with self._translated(missing_is="the bucket isn't there"):
            obstore.put(self._store, self._key(path), source, chunk_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE)

    def write(self, path: str, data: bytes) -> None:
        with self._translated(missing_is="the bucket isn't there"):
            obstore.put(self._store, self._key(path), data)

    def create(self, path: str, data: bytes) -> bool:
        try:
            with self._translated(missing_is="the bucket isn't there"):
                obstore.put(self._store, self._key(path), data, mode="create")
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
            return False
        except exceptions.NotSupportedError:
            if self.head(path) is not None:
                return False
            self.write(path, data)
        return True

    def delete(self, paths: tuple[str, ...]) -> None:
        if not paths:
            return
        with self._translated():
            try:
                obstore.delete(self._store, [self._key(path) for path in paths])
            except FileNotFoundError:
                return

    def _part(self, entry: Entry, start: int) -> bytes:
        end = min(start + PART_BYTES, entry.size)
        options: dict[str, Any] = {"range": (start, end)}
        if entry.etag:
            options["if_match"] = entry.etag
        with self._translated():
            try:
                return bytes(obstore.get(self._store, self._key(entry.path), options=options).bytes())
            except exceptions.PreconditionError:
                raise Failed("StorageUnavailable", f"{self._at(entry.path)} changed while it was read") from None

    def _explain_missing(self, path: str) -> None:
        """A 404 without a body may also mean a missing bucket or an unknown key: a list tells."""
        with self._translated(missing_is="the bucket isn't there"):
            next(iter(obstore.list(self._store, prefix=self._key(path))), None)

    def _key(self, path: str) -> str:
        return f"{self._prefix}/{path}".strip("/")

    def _at(self, path: str = "") -> str:
        return f"{FIELD[self._role]}: {self._display}{'/' + path if path else ''}"

    def _refused(self, error: Exception) -> Failed:
        return Failed("AccessDenied", f"{self._at()}: the store refused the credentials ({_first_line(error)})")

    @contextmanager
    def _translated(self, missing_is: str | None = None) -> Iterator[None]:
        """obstore's errors → Failed. A missing object stays FileNotFoundError, or is what `missing_is` says."""
        try:
            yield
        except FileNotFoundError as error:
            if _is_refusal(error):
                raise self._refused(error) from None
            if missing_is is None:
                raise
            raise Failed(NOT_FOUND[self._role], f"{self._at()}: {missing_is}") from None
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
            raise self._refused(error) from None
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError, exceptions.NotSupportedError):
            raise
        except exceptions.BaseError as error:
            if _is_refusal(error):
                raise self._refused(error) from None
            if "NoSuchBucket" in str(error):  # obstore has no type for it
                raise Failed(NOT_FOUND[self._role], f"{self._at()}: the bucket isn't there") from None
            if "169.254." in str(error):
                raise Failed(
                    "CredentialsMissing",
                    f"{self._at()}: no keys; name a Secret in credentialsRef, or give the pod an identity",
                ) from None
            raise Failed("StorageUnavailable", f"{self._at()}: {_first_line(error)}") from None


def _is_refusal(error: Exception) -> bool:
    """Some stores answer an unknown key with a 404, and tell only in the body."""
    return any(f"<Code>{code}</Code>" in str(error) for code in _REFUSED)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
