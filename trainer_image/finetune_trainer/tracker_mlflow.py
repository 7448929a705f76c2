"""MLflow as a Tracker: one run a job, found again by the job's uid, so that attempts go on in the same run."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any, Literal

from finetune_api.run import MlflowConfig, RunConfig
from finetune_trainer.scalars import Point
from finetune_trainer.tracker import Ending, Subject

_UID = "finetune.job_uid"
_PARAMETERS = "finetune.parameters"
_KIND = "mlflow.experimentKind"
_MOST_METRICS = 1000  # of one request, says the REST API
_MOST_PARAMETERS = 100
_LONGEST_VALUE = 500
_UNTOLD = re.compile(r"credentials|\.display$")


class Mlflow:
    name = "mlflow"
    ends_when: Literal["trained", "published"] = "published"

    def __init__(self, config: MlflowConfig, subject: Subject) -> None:
        # Read by the client at its first request. We wait and try again ourselves.
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "10"
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        from mlflow import MlflowClient

        self._config = config
        self._subject = subject
        self._client: Any = MlflowClient(tracking_uri=config.uri, registry_uri=config.uri)
        self._run = ""

    def open(self) -> tuple[str, int]:
        job, held = self._subject.run.job, -1
        experiment = self._experiment()
        found = self._client.search_runs([experiment], f"tags.`{_UID}` = '{job.uid}'", max_results=1)
        if found:
            self._run = found[0].info.run_id
            losses = self._client.get_metric_history(self._run, "train/loss")
            held = max((metric.step for metric in losses), default=-1)
            self._client.update_run(self._run, status="RUNNING")
        else:
            tags = {_UID: job.uid, "finetune.job": f"{job.namespace}/{job.name}"}
            tags |= {"mlflow.source.type": "JOB", "mlflow.source.name": f"FineTuneJob {job.namespace}/{job.name}"}
            self._run = self._client.create_run(experiment, run_name=job.name, tags=tags).info.run_id
        if not found or _PARAMETERS not in found[0].data.tags:
            self._log_parameters()
        return f"{self._config.uri.rstrip('/')}/#/experiments/{experiment}/runs/{self._run}", held

    def send(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, int(at.time * 1000), at.step) for at in points for name, value in at.values.items()
        ]
        for begin in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(self._run, metrics=metrics[begin : begin + _MOST_METRICS])

    def close(self, ending: Ending) -> str:
        if ending.how == "preempted":
            return "it goes on in the same run"
        status = "FAILED" if ending.how == "failed" else "FINISHED"
        if ending.message:
            self._client.set_tag(self._run, "finetune.message", ending.message[:_LONGEST_VALUE])
        said = []
        if ending.artifact is not None:
            note = _note(self._subject.run, ending)
            self._client.set_tag(self._run, "mlflow.note.content", note)  # what the page shows as description
            self._client.set_tag(self._run, "finetune.output", ending.artifact.uri)
            self._client.set_tag(self._run, "finetune.manifest_digest", ending.artifact.manifest_digest)
            said += self._log_files(ending)
            said += self._register(ending.artifact.uri, ending.artifact.manifest_digest, note)
        self._client.set_terminated(self._run, status=status)
        return "; ".join(said) or status

    def _experiment(self) -> str:
        known = self._client.get_experiment_by_name(self._config.experiment)
        if known is not None:
            return str(known.experiment_id)
        return str(self._client.create_experiment(self._config.experiment, tags={_KIND: "custom_model_development"}))

    def _log_parameters(self) -> None:
        from mlflow.entities import Param

        plain = self._subject.run.model_dump(
            mode="json",
            by_alias=True,
            exclude_none=True,
            include={"model", "data", "method", "lora", "training", "world"},
        )
        flat = {key: str(value)[:_LONGEST_VALUE] for key, value in _flat(plain).items() if not _UNTOLD.search(key)}
        parameters = [Param(key, value) for key, value in flat.items() if value != ""]
        for begin in range(0, len(parameters), _MOST_PARAMETERS):
            self._client.log_batch(self._run, params=parameters[begin : begin + _MOST_PARAMETERS])
        self._client.set_tag(self._run, _PARAMETERS, "recorded")

    def _log_files(self, ending: Ending) -> list[str]:
        """A server without an artifact store that it speaks for takes none; the result lies in its own place anyway."""
        try:
            for file in ending.files:
                self._client.log_artifact(self._run, file, artifact_path="finetune")
        except Exception as error:
            if _is_passing(error):
                raise
            return [f"its files weren't taken ({type(error).__name__}: {str(error)[:150]})"]
        return []

    def _register(self, uri: str, digest: str, note: str) -> list[str]:
        from mlflow.exceptions import MlflowException

        name = self._config.registered_model
        if not name:
            return []
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        for version in self._client.search_model_versions(f"name = '{name}'"):
            if version.tags.get("finetune.manifest_digest") == digest:
                return [f"version {version.version} of {name}"]
        try:
            made = self._client.create_model_version(
                name, uri, run_id=self._run, tags={"finetune.manifest_digest": digest}, description=note
            )
        except MlflowException as error:
            if _is_passing(error):
                raise
            return [f"the registry refused {uri} as {name} ({str(error)[:150]})"]
        return [f"version {made.version} of {name}"]


def _note(run: RunConfig, ending: Ending) -> str:
    """Markdown: what was made of what, and how good it is."""
    where = ending.artifact.uri if ending.artifact else ""
    said = f"`{run.model.location.display}` tuned on `{run.data.train.display}`; the result is in `{where}`."
    names = [name.removesuffix("Tuned") for name in ending.metrics if name.endswith("Tuned")]
    figures = [(name, ending.metrics[f"{name}Base"], ending.metrics[f"{name}Tuned"]) for name in names]
    rows = [f"| {name} | {base:.4g} | {tuned:.4g} |" for name, base, tuned in figures]
    return "\n".join([said, "", "| test rows | base | tuned |", "|---|---|---|", *rows]) if rows else said


def _is_passing(error: Exception) -> bool:
    """Whether it may work later: nobody answered, or the server had trouble of its own."""
    code = getattr(error, "error_code", "INTERNAL_ERROR")
    return code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "BAD_GATEWAY")


def _flat(value: Any, at: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {at: value if not isinstance(value, list) else ",".join(map(str, value))}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{at}.{key}" if at else key).items()}
