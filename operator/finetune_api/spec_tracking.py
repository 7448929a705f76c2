"""spec.tracking: where the course of training is recorded besides Prometheus. Put together in `resource`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune_api.model import Model
from finetune_api.spec_inputs import SecretRef

_NAME = r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$"


class MlflowSpec(Model):
    """An MLflow server: one run a job, whatever the number of attempts."""

    uri: Annotated[str, Field(pattern=r"^https?://[^\s@?#]+$", max_length=1024)] = Field(
        description="URL of the tracking server, http:// or https://. Credentials don't belong into it."
    )
    experiment: Annotated[str, Field(pattern=rf"{_NAME}|^$", max_length=256)] = Field(
        default="", description="Name of the experiment, made where it doesn't exist. Empty means finetune-operator."
    )
    registered_model: Annotated[str, Field(pattern=rf"{_NAME}|^$", max_length=256)] = Field(
        default="",
        description="Name in the model registry under which the result becomes a new version. Empty means none.",
    )
    credentials_ref: SecretRef | None = Field(
        default=None,
        description="Secret with MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.",
    )


class WandbSpec(Model):
    """Weights & Biases."""

    project: Annotated[str, Field(pattern=_NAME, max_length=128)] = Field(description="Name of the project.")
    entity: Annotated[str, Field(pattern=rf"{_NAME}|^$", max_length=128)] = Field(
        default="", description="User or team. Empty means the key's default."
    )
    mode: Literal["online", "offline"] = Field(
        default="online",
        description="offline writes the run's files into finetune/wandb of the result, for `wandb sync`.",
    )
    credentials_ref: SecretRef | None = Field(
        default=None, description="Secret with WANDB_API_KEY and, for an own server, WANDB_BASE_URL."
    )


class TrackingSpec(Model):
    """Where the course of training is recorded besides Prometheus. None of it can stop, slow or fail training."""

    mlflow: MlflowSpec | None = Field(default=None, description="Record to an MLflow server.")
    tensorboard: bool = Field(
        default=False,
        description="Write TensorBoard's event file into finetune/tensorboard of the output, with every checkpoint and "
        "at the end.",
    )
    wandb: WandbSpec | None = Field(default=None, description="Record to Weights & Biases.")
