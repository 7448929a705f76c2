"""HubPlace: hf:// models and data sets, by huggingface_hub. Opened by `store` only; read-only.

HF_ENDPOINT and the hub's other variables come from the environment, which huggingface_hub reads itself.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

from huggingface_hub import DatasetInfo, HfApi, ModelInfo, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]  # its HTTP client's own

from finetune_api.names import SECRET_HF_TOKEN
from finetune_trainer import digests
from finetune_trainer.failure import Failed
from finetune_trainer.place import FIELD, NOT_FOUND, Entry, Role

_WAITS = (0.5, 1.0, 2.0)
T = TypeVar("T")
_LFS_DIGEST = re.compile(r"[0-9a-f]{64}")


class HubPlace:
    """One repository at one commit; the revision is resolved once, when it is opened."""

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
        info = self._tried(lambda: self._info(revision))
        self.commit = info.sha or ""
        self._entries = tuple(
            sorted(
                (
                    Entry(file.rfilename, int(file.size or 0), file.lfs.sha256 if file.lfs else file.blob_id)
                    for file in info.siblings or ()
                ),
                key=lambda entry: entry.path,
            )
        )

    @property
    def display(self) -> str:
        return self._display

    def list(self, under: str = "") -> tuple[Entry, ...]:
        prefix = f"{under.strip('/')}/" if under else ""
        return tuple(entry for entry in self._entries if entry.path.startswith(prefix))

    def head(self, path: str) -> Entry | None:
        return next((entry for entry in self._entries if entry.path == path), None)

    def read(self, path: str) -> bytes | None:
        entry = self.head(path)
        if entry is None:
            return None
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder, "file")
            self.download(entry, target)
            return target.read_bytes()

    def download(self, entry: Entry, target: Path) -> str:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.parent / f".{target.name}.hub"
        try:
            os.replace(self._tried(lambda: self._fetch(entry.path, aside)), target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        digest = digests.of_file(target)
        if entry.etag and _LFS_DIGEST.fullmatch(entry.etag) and digest != entry.etag:
            raise Failed("StorageUnavailable", f"{FIELD[self._role]}: {self._display}/{entry.path} arrived damaged")
        return digest

    def upload(self, source: Path, path: str) -> None:
        raise self._read_only(path)

    def write(self, path: str, data: bytes) -> None:
        raise self._read_only(path)

    def create(self, path: str, data: bytes) -> bool:
        raise self._read_only(path)

    def delete(self, paths: tuple[str, ...]) -> None:
        raise self._read_only(str(paths))

    def _info(self, revision: str | None) -> ModelInfo | DatasetInfo:
        ask = self._api.model_info if self._kind == "model" else self._api.dataset_info
        with self._translated(revision):
            return ask(self._repository, revision=revision, files_metadata=True, timeout=30)

    def _fetch(self, path: str, folder: Path) -> str:
        with self._translated(self.commit):
            return hf_hub_download(
                self._repository,
                path,
                revision=self.commit,
                repo_type=self._kind,
                local_dir=folder,
                token=self._token or False,
            )

    def _tried(self, action: Callable[[], T]) -> T:
        """Again, a few times, while the hub doesn't answer."""
        for wait in _WAITS:
            try:
                return action()
            except Failed as failed:
                if failed.reason != "StorageUnavailable":
                    raise
            time.sleep(wait)
        return action()

    def _read_only(self, path: str) -> Failed:
        return Failed("InvalidConfig", f"{FIELD[self._role]}: {self._display} is read-only ({path})")

    @contextmanager
    def _translated(self, revision: str | None) -> Iterator[None]:
        """The hub's errors → Failed. The hub answers 401 for what is private and for what isn't there alike."""
        at = f"{FIELD[self._role]}: {self._display}"
        try:
            yield
        except GatedRepoError:
            what = f"{at} is gated: accept its licence on the hub, and give {SECRET_HF_TOKEN}"
            raise Failed("AccessDenied", what) from None
        except RevisionNotFoundError:
            raise Failed(NOT_FOUND[self._role], f"{at} has no revision {revision!r}") from None
        except RepositoryNotFoundError:
            told = "the token may not see it" if self._token else f"it is private and there is no {SECRET_HF_TOKEN}"
            raise Failed(NOT_FOUND[self._role], f"{at}: the hub has no such repository, or {told}") from None
        except HFValidationError as error:
            raise Failed("InvalidConfig", f"{at}: {error}") from None
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if status in (401, 403):
                raise Failed("AccessDenied", f"{at}: the hub answered {status}; check {SECRET_HF_TOKEN}") from None
            raise Failed("StorageUnavailable", f"{at}: the hub answered {status or error}") from None
        except LocalEntryNotFoundError as error:
            raise Failed("StorageUnavailable", f"{at}: the hub can't be reached ({error})") from None
        except EntryNotFoundError as error:
            raise Failed(NOT_FOUND[self._role], f"{at}: {error}") from None
        except (TransportError, ConnectionError, TimeoutError) as error:
            raise Failed("StorageUnavailable", f"{at}: the hub can't be reached ({error})") from None
