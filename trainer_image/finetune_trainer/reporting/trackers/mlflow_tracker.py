"""Implements Tracker for MLflow: all attempts of a job continue one run, tagged with its UID."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

from finetune_api.messages.run import MlflowConfig, RunConfig
from finetune_trainer.reporting.trackers.scalars import Point
from finetune_trainer.reporting.trackers.worker import Ending, Subject, described

_UID = "finetune.job_uid"
_PARAMETERS = "finetune.parameters"
_KIND = "mlflow.experimentKind"
_MAX_METRICS = 1000  # per request, a limit of the REST API
_MAX_PARAMETERS = 100
_MAX_VALUE_LENGTH = 500
_ARTIFACT_SCHEMES = ("mlflow-artifacts", "http", "https")
_HIDDEN = re.compile(r"credentials|\.display$")


class Mlflow:
    """Records one job in an experiment and, if configured, registers its result as a version."""

    name = "mlflow"
    ends_when: Literal["trained", "published"] = "published"

    def __init__(self, config: MlflowConfig, subject: Subject) -> None:
        # The client reads these at its first request. The worker does the waiting and retrying.
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "10"
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        # The server mayn't lead this pod to another one.
        os.environ["MLFLOW_ALLOW_HTTP_REDIRECTS"] = "false"
        os.environ["MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD"] = "false"
        from mlflow import MlflowClient

        self._config = config
        self._subject = subject
        self._client: Any = MlflowClient(tracking_uri=config.uri, registry_uri=config.uri)
        self._run = ""

    def open(self) -> tuple[str, int]:
        """Creates or resumes the run.

        Returns its URL and the last step that it already contains.
        """
        job, last_step = self._subject.run.job, -1
        experiment = self._experiment()
        runs = self._client.search_runs([experiment], f"tags.`{_UID}` = '{job.uid}'", max_results=1)
        if runs:
            self._run = runs[0].info.run_id
            losses = self._client.get_metric_history(self._run, "train/loss")
            last_step = max((metric.step for metric in losses), default=-1)
            self._client.update_run(self._run, status="RUNNING")
        else:
            tags = {_UID: job.uid, "finetune.job": f"{job.namespace}/{job.name}"}
            tags |= {"mlflow.source.type": "JOB", "mlflow.source.name": f"FineTuneJob {job.namespace}/{job.name}"}
            self._run = self._client.create_run(experiment, run_name=job.name, tags=tags).info.run_id
        if not runs or _PARAMETERS not in runs[0].data.tags:
            self._log_parameters()
        return f"{self._config.uri.rstrip('/')}/#/experiments/{experiment}/runs/{self._run}", last_step

    def send(self, points: Sequence[Point]) -> None:
        """Logs points as metrics, in batches."""
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, int(point.time * 1000), point.step)
            for point in points
            for name, value in point.values.items()
        ]
        for begin in range(0, len(metrics), _MAX_METRICS):
            self._client.log_batch(self._run, metrics=metrics[begin : begin + _MAX_METRICS])

    def close(self, ending: Ending) -> str:
        """Ends the run, unless the job continues, and records the result if there is one."""
        if ending.how == "preempted":
            return "the next attempt continues this run"
        status = "FAILED" if ending.how == "failed" else "FINISHED"
        if ending.message:
            self._client.set_tag(self._run, "finetune.message", ending.message[:_MAX_VALUE_LENGTH])
        messages = []
        if ending.artifact is not None:
            note = _note(self._subject.run, ending)
            # MLflow shows this tag as the description of the run.
            self._client.set_tag(self._run, "mlflow.note.content", note)
            self._client.set_tag(self._run, "finetune.output", ending.artifact.uri)
            self._client.set_tag(self._run, "finetune.manifest_digest", ending.artifact.manifest_digest)
            messages += self._log_files(ending)
            messages += self._register(ending.artifact.uri, ending.artifact.manifest_digest, note)
        self._client.set_terminated(self._run, status=status)
        return "; ".join(messages) or status

    def _experiment(self) -> str:
        experiment = self._client.get_experiment_by_name(self._config.experiment)
        if experiment is not None:
            return str(experiment.experiment_id)
        return str(self._client.create_experiment(self._config.experiment, tags={_KIND: "custom_model_development"}))

    def _log_parameters(self) -> None:
        from mlflow.entities import Param

        config = self._subject.run.model_dump(
            mode="json",
            by_alias=True,
            exclude_none=True,
            include={"model", "data", "method", "lora", "training", "world"},
        )
        flat = {key: str(value)[:_MAX_VALUE_LENGTH] for key, value in _flat(config).items() if not _HIDDEN.search(key)}
        parameters = [Param(key, value) for key, value in flat.items() if value != ""]
        for begin in range(0, len(parameters), _MAX_PARAMETERS):
            self._client.log_batch(self._run, params=parameters[begin : begin + _MAX_PARAMETERS])
        self._client.set_tag(self._run, _PARAMETERS, "recorded")

    def _log_files(self, ending: Ending) -> list[str]:
        """Logs the small files of the result.

        A server that doesn't serve artifacts refuses them. That is no error: the result is complete
        in the job's output anyway.
        """
        artifacts = str(self._client.get_run(self._run).info.artifact_uri)
        if not takes_files(artifacts, self._config.uri):
            return [
                "files aren't logged, as the server doesn't take them itself (its artifacts are at "
                f"{_origin(artifacts)})"
            ]
        try:
            for file in ending.files:
                self._client.log_artifact(self._run, file, artifact_path="finetune")
        except Exception as error:
            if _is_transient(error):
                raise
            return [f"the server refused the files ({described(error)})"]
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
            created = self._client.create_model_version(
                name, uri, run_id=self._run, tags={"finetune.manifest_digest": digest}, description=note
            )
        except MlflowException as error:
            if _is_transient(error):
                raise
            return [f"the registry refused {uri} as {name} ({described(error)})"]
        return [f"version {created.version} of {name}"]


def takes_files(artifact_uri: str, server: str) -> bool:
    """Whether files of a run go to its tracking server.

    For another scheme, the client would write them itself, even into this pod, and another host
    could be any that this pod can reach.
    """
    parts = urlsplit(artifact_uri)
    if parts.scheme == "mlflow-artifacts" and not parts.netloc:
        return True
    tracker = urlsplit(server)
    is_protected = parts.scheme == "https" or tracker.scheme == "http"  # the keys of a Secret go there
    return parts.scheme in _ARTIFACT_SCHEMES and is_protected and parts.netloc.lower() == tracker.netloc.lower()


def _origin(uri: str) -> str:
    """Returns scheme and host, without keys."""
    parts = urlsplit(uri)
    return f"{parts.scheme[:20]}:" + (f"//{parts.netloc.rpartition('@')[2][:100]}" if parts.netloc else "")


def _note(run: RunConfig, ending: Ending) -> str:
    """Returns Markdown that names model, data and result, with a table of the scores."""
    uri = ending.artifact.uri if ending.artifact else ""
    text = f"`{run.model.location.display}` tuned on `{run.data.train.display}`; the result is in `{uri}`."
    names = [name.removesuffix("Tuned") for name in ending.metrics if name.endswith("Tuned")]
    figures = [(name, ending.metrics[f"{name}Base"], ending.metrics[f"{name}Tuned"]) for name in names]
    rows = [f"| {name} | {base:.4g} | {tuned:.4g} |" for name, base, tuned in figures]
    return "\n".join([text, "", "| test rows | base | tuned |", "|---|---|---|", *rows]) if rows else text


def _is_transient(error: Exception) -> bool:
    """Whether a retry may succeed: there was no response, or the server itself failed."""
    code = getattr(error, "error_code", "INTERNAL_ERROR")
    return code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "BAD_GATEWAY")


def _flat(value: Any, at: str = "") -> dict[str, Any]:
    """Flattens nested mappings to dotted keys; lists become comma-separated text."""
    if not isinstance(value, dict):
        return {at: value if not isinstance(value, list) else ",".join(map(str, value))}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{at}.{key}" if at else key).items()}
