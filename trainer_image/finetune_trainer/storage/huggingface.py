"""Implements a read-only Storage for hf:// models and data sets, by huggingface_hub.

huggingface_hub itself reads HF_ENDPOINT and its other variables from the environment.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar
from urllib.parse import urlsplit

from huggingface_hub import DatasetInfo, HfApi, ModelInfo, constants, hf_hub_download, hf_hub_url, set_client_factory
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]  # from its HTTP client
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import default_client_factory, hf_raise_for_status, http_stream_backoff

from finetune_api.names import SECRET_HF_TOKEN
from finetune_trainer import manifest
from finetune_trainer.errors import RunError
from finetune_trainer.storage.base import FIELD, NOT_FOUND, FileInfo, Role
from finetune_trainer.storage.bounds import INVALID, check_count, check_read, is_internal, is_of_node

_RETRY_SECONDS = (0.5, 1.0, 2.0)
T = TypeVar("T")
_LFS_DIGEST = re.compile(r"[0-9a-f]{64}")


class InternalRedirect(Exception):
    """Reports that a hub redirects to a server that only this pod can reach."""


def _check_target(request: Any) -> None:
    """Raises InternalRedirect for a request to a server in a private network, unless that has the
    hub itself."""
    host, hub = str(request.url.host), urlsplit(constants.ENDPOINT).hostname or ""
    if host != hub and (is_of_node(host) or (is_internal(host) and not is_internal(hub))):
        raise InternalRedirect(host)


def _client() -> Any:
    client = default_client_factory()
    hooks = client.event_hooks
    client.event_hooks = {**hooks, "request": [*hooks["request"], _check_target]}
    return client


set_client_factory(_client)


class HubStorage:
    """Reads one repository at one commit. Its revision is resolved when the storage is opened."""

    uses_scratch: ClassVar[bool] = True

    def __init__(
        self,
        repository: str,
        *,
        kind: Literal["model", "dataset"],
        role: Role,
        display: str,
        revision: str | None,
        token: str | None,
    ) -> None:
        self._repository = repository
        self._kind = kind
        self._role: Role = role
        self._display = display
        self._token = token
        self._api = HfApi(token=token or False)
        info = self._retry(lambda: self._info(revision))
        self.commit = info.sha or ""
        check_count(len(info.siblings or ()), role, display)
        self._entries = tuple(
            sorted(
                (
                    FileInfo(file.rfilename, int(file.size or 0), file.lfs.sha256 if file.lfs else file.blob_id)
                    for file in info.siblings or ()
                ),
                key=lambda entry: entry.path,
            )
        )

    @property
    def display(self) -> str:
        """The URI as the user wrote it."""
        return self._display

    def list(self, under: str = "") -> tuple[FileInfo, ...]:
        """Returns all files below a sub-folder, sorted by path."""
        prefix = f"{under.strip('/')}/" if under else ""
        return tuple(entry for entry in self._entries if entry.path.startswith(prefix))

    def head(self, path: str) -> FileInfo | None:
        """Returns a file's size and etag, or None if it doesn't exist."""
        return next((entry for entry in self._entries if entry.path == path), None)

    def read(self, path: str) -> bytes | None:
        """Returns the content of a small file, or None if it doesn't exist."""
        entry = self.head(path)
        if entry is None:
            return None
        check_read(entry.size, self._role, f"{self._display}/{path}")
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder, "file")
            self.download(entry, target)
            return target.read_bytes()

    def read_range(self, entry: FileInfo, start: int, end: int) -> bytes:
        """Returns the bytes of a file from `start` to `end`, or to its end if that comes first."""
        if start >= min(end, entry.size):
            return b""
        return self._retry(lambda: self._read_range(entry.path, start, min(end, entry.size)))[: end - start]

    def download(self, entry: FileInfo, target: Path) -> str:
        """Downloads a file and returns its sha256. Raises RunError if its LFS digest differs."""
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.parent / f".{target.name}.hub"
        try:
            os.replace(self._retry(lambda: self._download(entry.path, partial)), target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        digest = manifest.of_file(target)
        if entry.etag and _LFS_DIGEST.fullmatch(entry.etag) and digest != entry.etag:
            raise RunError(
                "StorageUnavailable", f"{FIELD[self._role]}: {self._display}/{entry.path} was damaged in transit"
            )
        return digest

    def upload(self, source: Path, path: str) -> None:
        """Raises RunError: a hub is read-only."""
        raise self._read_only(path)

    def write(self, path: str, data: bytes) -> None:
        """Raises RunError: a hub is read-only."""
        raise self._read_only(path)

    def create(self, path: str, data: bytes) -> bool:
        """Raises RunError: a hub is read-only."""
        raise self._read_only(path)

    def delete(self, paths: tuple[str, ...]) -> None:
        """Raises RunError: a hub is read-only."""
        raise self._read_only(str(paths))

    def _info(self, revision: str | None) -> ModelInfo | DatasetInfo:
        request = self._api.model_info if self._kind == "model" else self._api.dataset_info
        with self._translated_errors(revision):
            return request(self._repository, revision=revision, files_metadata=True, timeout=30)

    def _download(self, path: str, folder: Path) -> str:
        with self._translated_errors(self.commit):
            return hf_hub_download(
                self._repository,
                path,
                revision=self.commit,
                repo_type=self._kind,
                local_dir=folder,
                token=self._token or False,
            )

    def _read_range(self, path: str, start: int, end: int) -> bytes:
        """Requests a range. A server that ignores it is read only as far as the range goes."""
        url = hf_hub_url(self._repository, path, revision=self.commit, repo_type=self._kind)
        headers = {**build_hf_headers(token=self._token or False), "Range": f"bytes={start}-{end - 1}"}
        data = bytearray()
        with (
            self._translated_errors(self.commit),
            http_stream_backoff("GET", url, headers=headers, max_retries=0, timeout=30) as response,
        ):
            hf_raise_for_status(response)
            first = 0 if response.status_code == HTTPStatus.PARTIAL_CONTENT else start
            for part in response.iter_bytes():
                data += part
                if len(data) >= first + end - start:
                    break
        return bytes(data[first : first + end - start])

    def _retry(self, action: Callable[[], T]) -> T:
        """Runs `action`, up to four times if the hub doesn't respond."""
        for wait in _RETRY_SECONDS:
            try:
                return action()
            except RunError as error:
                if error.reason != "StorageUnavailable":
                    raise
            time.sleep(wait)
        return action()

    def _read_only(self, path: str) -> RunError:
        return RunError("InvalidConfig", f"{FIELD[self._role]}: {self._display} is read-only ({path})")

    @contextmanager
    def _translated_errors(self, revision: str | None) -> Iterator[None]:
        """Translates the hub's errors to RunError.

        The hub responds with 401 both for a private repository and for one that doesn't exist.
        """
        at = f"{FIELD[self._role]}: {self._display}"
        try:
            yield
        except InternalRedirect as error:
            raise RunError(
                INVALID[self._role],
                f"{at}: the hub redirects to {error}, which is in a private network; check HF_ENDPOINT",
            ) from None
        except GatedRepoError:
            message = f"{at} is gated: accept its license on the hub, and set {SECRET_HF_TOKEN}"
            raise RunError("AccessDenied", message) from None
        except RevisionNotFoundError:
            raise RunError(NOT_FOUND[self._role], f"{at} has no revision {revision!r}") from None
        except RepositoryNotFoundError:
            cause = "the token has no access to it; check" if self._token else "it is private; set"
            message = f"{at}: the hub has no such repository, or {cause} {SECRET_HF_TOKEN}"
            raise RunError(NOT_FOUND[self._role], message) from None
        except HFValidationError as error:
            raise RunError("InvalidConfig", f"{at}: {error}") from None
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if status in (401, 403):
                raise RunError(
                    "AccessDenied", f"{at}: the hub responded with {status}; check {SECRET_HF_TOKEN}"
                ) from None
            raise RunError("StorageUnavailable", f"{at}: the hub responded with {status or error}") from None
        except LocalEntryNotFoundError as error:
            raise RunError("StorageUnavailable", f"{at}: the hub can't be reached ({error})") from None
        except EntryNotFoundError as error:
            raise RunError(NOT_FOUND[self._role], f"{at}: {error}") from None
        except (TransportError, ConnectionError, TimeoutError) as error:
            raise RunError("StorageUnavailable", f"{at}: the hub can't be reached ({error})") from None
