"""A real MLflow server: its packages, pinned, and how it is started. Called by components, demo.kind and tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from localcluster.environments import environment

VERSION = "3.17.2"
# What the server needs and its client doesn't. `mlflow` itself asks for much that only training with it would use.
_PACKAGES = (
    f"mlflow-skinny=={VERSION}", "flask", "flask-cors", "sqlalchemy", "alembic", "graphene", "huey", "gunicorn",
    "aiohttp", "prometheus-flask-exporter", "tensorboard==2.21.0", "numpy", "pandas",
)  # fmt: skip
_ALONE = (f"mlflow=={VERSION}", f"mlflow-tracing=={VERSION}")
ENVIRONMENT = (("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false"), ("MLFLOW_DISABLE_TELEMETRY", "true"))


def programs() -> Path:
    """bin/ of an environment with MLflow's server and TensorBoard; installed the first time."""
    return environment(f"mlflow-{VERSION}", *_PACKAGES, alone=_ALONE) / "bin"


def command(bin_folder: Path, folder: Path, host: str, port: int, names: Sequence[str] = ()) -> tuple[str, ...]:
    """Serves on host:port, and answers to `names` too (it refuses others' names); all that it keeps is in `folder`."""
    hosts = ",".join(f"{name}:*" for name in (host, *names))
    return (
        str(bin_folder / "mlflow"),
        "server",
        *("--host", host, "--port", str(port), "--workers", "1", "--allowed-hosts", hosts),
        *("--cors-allowed-origins", f"http://{host}:{port}"),  # of its own page
        *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db"),
        *("--artifacts-destination", str(folder / "artifacts")),
    )
