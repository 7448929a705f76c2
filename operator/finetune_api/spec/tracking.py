"""Defines spec.tracking: where a run is recorded besides Prometheus."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune_api import scalars as s
from finetune_api.base import Model
from finetune_api.spec.inputs import SecretRef

_NAME = r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$"


class MlflowSpec(Model):
    """Configures an MLflow server, on which a job is one run, whatever the number of attempts."""

    uri: Annotated[str, Field(pattern=s.HTTP_URL_PATTERN, max_length=1024)] = Field(
        description="URL of the tracking server, http:// or https://. It must not contain credentials."
    )
    experiment: Annotated[str, Field(pattern=rf"{_NAME}|^$", max_length=256)] = Field(
        default="", description="Name of the experiment, created if needed. Empty means finetune-operator."
    )
    registered_model: Annotated[str, Field(pattern=rf"{_NAME}|^$", max_length=256)] = Field(
        default="",
        description="Name in the model registry under which the result becomes a new version. Empty means that it "
        "isn't registered.",
    )
    credentials_ref: SecretRef | None = Field(
        default=None,
        description="Secret with MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, and "
        "with MLFLOW_TRACKING_URI, the server that gets them. Without that key, the administrator must list the server "
        "(the chart's tenants.trackers).",
    )


class WandbSpec(Model):
    """Configures Weights & Biases."""

    project: Annotated[str, Field(pattern=_NAME, max_length=128)] = Field(description="Name of the project.")
    entity: Annotated[str, Field(pattern=rf"{_NAME}|^$", max_length=128)] = Field(
        default="", description="User or team. Empty means the default of the API key."
    )
    mode: Literal["online", "offline"] = Field(
        default="online",
        description="online sends the run to the server; offline writes its files to finetune/wandb in the output, for "
        "`wandb sync`.",
    )
    credentials_ref: SecretRef | None = Field(
        default=None, description="Secret with WANDB_API_KEY and, for a server of your own, WANDB_BASE_URL."
    )


class TrackingSpec(Model):
    """Specifies where a run is recorded besides Prometheus.

    A tracker can't stop, slow down or fail training.
    """

    mlflow: MlflowSpec | None = Field(default=None, description="Record the run on an MLflow server.")
    tensorboard: bool = Field(
        default=False,
        description="Write TensorBoard's event file to finetune/tensorboard in the output, with every checkpoint and "
        "at the end.",
    )
    wandb: WandbSpec | None = Field(default=None, description="Record the run with Weights & Biases.")
