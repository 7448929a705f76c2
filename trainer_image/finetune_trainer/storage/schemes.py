"""Opens the storage that a Location names. No other module knows the URI schemes.

Credentials are read here, from mounted files, and are passed to the storage client only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from finetune_api.messages.run import AzureConfig, GcsConfig, Location, S3Config
from finetune_api.names import PVC_ROOT, SECRET_HF_TOKEN, VOLUMES_ROOT
from finetune_trainer.errors import RunError
from finetune_trainer.storage.base import FIELD, NOT_FOUND, FileInfo, Role, Storage
from finetune_trainer.storage.local import LocalStorage
from finetune_trainer.storage.renewal import RenewedStorage, Secret
from finetune_trainer.storage.requests.transfers import Transfers


@dataclass(frozen=True)
class Access:
    """Holds what is needed to open any storage.

    `s3`, `gcs` and `azure` are the administrator's endpoints and `environment` the environment of
    the process. A request is retried at most `retries` times, for at most `retry_seconds`.
    `transfers` shows what is being downloaded.
    """

    s3: S3Config
    environment: Mapping[str, str]
    gcs: GcsConfig = field(default_factory=GcsConfig)
    azure: AzureConfig = field(default_factory=AzureConfig)
    retries: int = 6
    retry_seconds: float = 60.0
    transfers: Transfers = field(default_factory=Transfers, compare=False, repr=False)


def open_folder(location: Location, role: Role, access: Access) -> Storage:
    """Opens the folder that a location names.

    Raises RunError if its scheme or its Secret can't be used.
    """
    scheme, _, rest = location.uri.partition("://")
    if scheme == "file":
        return _folder(Path(rest), location, role)
    if scheme in ("s3", "gs", "az"):
        return _bucket(scheme, rest, location, role, access)
    if scheme == "hf":
        return _hub(rest, location, role, access)
    raise RunError(
        "InvalidConfig",
        f"{FIELD[role]}: {location.display}: {scheme}:// is not supported; use pvc://, volume://, s3://, gs://, az:// "
        "or hf://",
    )


def open_file(location: Location, role: Role, access: Access) -> tuple[Storage, FileInfo]:
    """Returns the folder of the file that a location names, and the file.

    Raises RunError if it doesn't exist.
    """
    uri, _, name = location.uri.rstrip("/").rpartition("/")
    if location.uri.startswith("hf://"):
        owner, dataset, path = [*location.uri.removeprefix("hf://").split("/", 2), "", ""][:3]
        uri, name = f"hf://{owner}/{dataset}", path
    storage = open_folder(location.model_copy(update={"uri": uri}), role, access)
    entry = storage.head(name)
    if entry is None:
        storage.list()  # raises another error if the bucket is missing
        raise RunError(
            NOT_FOUND[role],
            f"{FIELD[role]}: {location.display} doesn't exist or is not a file; end the URI of a folder with /",
        )
    return storage, entry


def open_files(location: Location, role: Role, access: Access) -> tuple[Storage, tuple[FileInfo, ...]]:
    """Returns a folder, and the files in it that a location names, sorted by path.

    The location is a folder (a URI that ends with /), which names all files below it, or a pattern:
    * matches within a folder and ** across folders. The caller selects files by their names. Raises
    RunError if no file matches.
    """
    uri = location.uri
    first_star = uri.index("*") if "*" in uri else len(uri)
    root = uri[: uri.rindex("/", 0, first_star)]
    pattern = uri[len(root) + 1 :]
    if uri.startswith("hf://"):
        owner, dataset, below = [*root.removeprefix("hf://").split("/", 2), ""][:3]
        root, pattern = f"hf://{owner}/{dataset}", f"{below}/{pattern}" if below else pattern
    storage = open_folder(location.model_copy(update={"uri": root}), role, access)
    matches = re.compile(_as_regex(pattern)).fullmatch
    entries = tuple(entry for entry in storage.list() if matches(entry.path))
    if not entries:
        raise RunError(NOT_FOUND[role], f"{FIELD[role]}: {location.display} matches no file; check the URI")
    return storage, entries


def _as_regex(pattern: str) -> str:
    """Translates a pattern to a regular expression.

    `*` matches within a folder and `**` across folders. A pattern that is empty or ends with / also
    matches everything below it.
    """
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*"}
    regex = "".join(parts.get(part, re.escape(part)) for part in re.split(r"(\*\*/|\*\*|\*)", pattern))
    return regex + ".*" if not pattern or pattern.endswith("/") else regex


def resolved_revision(storage: Storage) -> str | None:
    """Returns the commit of an hf:// storage; None for other schemes."""
    return getattr(storage, "commit", None)


def _folder(root: Path, location: Location, role: Role) -> LocalStorage:
    mounts = next((mounts for mounts in map(Path, (PVC_ROOT, VOLUMES_ROOT)) if mounts in root.parents), None)
    bounds = mounts / root.relative_to(mounts).parts[0] if mounts else None
    return LocalStorage(root, role=role, display=location.display, bounds=bounds)


def _bucket(scheme: str, rest: str, location: Location, role: Role, access: Access) -> Storage:
    from finetune_trainer.storage import azure, gcs, s3
    from finetune_trainer.storage.bucket import open_bucket
    from finetune_trainer.storage.requests import redirects
    from finetune_trainer.storage.requests.repeats import RetryPolicy

    def open_with(secret: Secret | None) -> Storage:
        try:
            match scheme:
                case "s3":
                    options = s3.access_options(access.s3, secret, access.environment)
                case "gs":
                    options = gcs.access_options(access.gcs, secret, access.environment)
                case _:
                    options = azure.access_options(access.azure, secret, access.environment)
        except RunError as error:
            raise RunError(error.reason, f"{_credentials_field(role)}: {error.message}") from None
        options["client_options"] = redirects.client_options(scheme, options, access.environment)
        retries = RetryPolicy(retries=access.retries, seconds=access.retry_seconds)
        return open_bucket(scheme, rest, role=role, display=location.display, options=options, retries=retries)

    return _renewed(open_with, location)


def _hub(rest: str, location: Location, role: Role, access: Access) -> Storage:
    from finetune_trainer.storage.huggingface import HubStorage

    def open_with(secret: Secret | None) -> Storage:
        token = (secret or {}).get(SECRET_HF_TOKEN) or access.environment.get(SECRET_HF_TOKEN)
        if secret is not None and not token:
            raise RunError(
                "CredentialsMissing", f"{_credentials_field(role)}: the Secret has no key {SECRET_HF_TOKEN}; add it"
            )
        return HubStorage(
            rest.strip("/"),
            kind="model" if role == "model" else "dataset",
            role=role,
            display=location.display,
            revision=location.revision,
            token=token,
        )

    return _renewed(open_with, location)


def _renewed(open_with: Callable[[Secret | None], Storage], location: Location) -> Storage:
    """Opens a storage with the location's Secret, if it has one, and again when that changes."""
    if location.credentials is None:
        return open_with(None)
    folder = Path(location.credentials)
    return RenewedStorage(open_with, lambda: _secret(folder))


def _secret(folder: Path) -> dict[str, str]:
    """Reads the Secret's keys from the files that the kubelet mounts; skips its `..data` links."""
    if not folder.is_dir():
        return {}
    return {
        file.name: file.read_text().strip()
        for file in sorted(folder.iterdir())
        if file.is_file() and not file.name.startswith("..")
    }


def _credentials_field(role: Role) -> str:
    return FIELD[role].replace(".uri", ".credentialsRef")
