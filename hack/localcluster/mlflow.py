"""A real MLflow server: its pinned packages and its command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from localcluster.environments import environment

VERSION = "3.17.2"
# What the server needs and its client doesn't. The package `mlflow` itself depends on much that
# only training needs, so it is installed without its dependencies.
_PACKAGES = (
    f"mlflow-skinny=={VERSION}", "flask", "flask-cors", "sqlalchemy", "alembic", "graphene", "huey", "gunicorn",
    "aiohttp", "prometheus-flask-exporter", "tensorboard==2.21.0", "numpy", "pandas",
)  # fmt: skip
_WITHOUT_DEPENDENCIES = (f"mlflow=={VERSION}", f"mlflow-tracing=={VERSION}")
ENVIRONMENT = (("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false"), ("MLFLOW_DISABLE_TELEMETRY", "true"))


def programs() -> Path:
    """Returns bin/ of an environment with MLflow and TensorBoard, installed on first use."""
    return environment(f"mlflow-{VERSION}", *_PACKAGES, without_dependencies=_WITHOUT_DEPENDENCIES) / "bin"


def command(bin_folder: Path, folder: Path, host: str, port: int, names: Sequence[str] = ()) -> tuple[str, ...]:
    """Returns the command of a server on host:port that stores everything in `folder`.

    It accepts requests to `host` and to `names`, and refuses those to other host names.
    """
    hosts = ",".join(f"{name}:*" for name in (host, *names))
    return (
        str(bin_folder / "mlflow"),
        "server",
        *("--host", host, "--port", str(port), "--workers", "1", "--allowed-hosts", hosts),
        *("--cors-allowed-origins", f"http://{host}:{port}"),  # its own web page
        *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db"),
        *("--artifacts-destination", str(folder / "artifacts")),
    )
