"""Saves everything visible of a job into a folder.

That is its row over time, status, events, the result's small files, its MLflow run, and pictures
of the report and of MLflow's pages. It only reads from the cluster.
"""

from __future__ import annotations

import asyncio
import json
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import obstore

from demo import install
from demo.browser import View, browser, program
from demo.clusters import ClusterAccess
from finetune_api.names import (
    DATA_REPORT_PATH,
    EVALUATION_PATH,
    HISTORY_PATH,
    MANIFEST_PATH,
    REPORT_PATH,
    SAMPLES_PATH,
)

FILES = (REPORT_PATH, EVALUATION_PATH, DATA_REPORT_PATH, SAMPLES_PATH, HISTORY_PATH, MANIFEST_PATH, "README.md")
GLANCE_SECONDS = 20.0
VIEWS = (
    View("phone", 390, 844), View("tablet", 820, 1180), View("desktop", 1440, 900),
    View("phone-dark", 390, 844, True), View("tablet-dark", 820, 1180, True), View("desktop-dark", 1440, 900, True),
)  # fmt: skip
SCREEN = View("screen", 1440, 900)


@dataclass
class Record:
    """Writes what is visible of one job into `folder`."""

    cluster: ClusterAccess
    namespace: str
    job: str
    folder: Path
    _glanced: float = field(default=0.0)

    def glance(self) -> None:
        """Appends the job's row as kubectl shows it, at most once every GLANCE_SECONDS.

        Once, while training runs, it also saves the job's description.
        """
        if time.monotonic() - self._glanced < GLANCE_SECONDS:
            return
        self._glanced = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        shown = self._kubectl("get", "ftj", self.job, "-o", "wide").splitlines()
        file = self.folder / "watch.txt"
        with file.open("a") as lines:
            lines.write("\n".join(shown if not file.stat().st_size else shown[1:]) + "\n")
        during = self.folder / "describe-during.txt"
        if not during.exists() and " Running " in shown[-1]:
            during.write_text(self._kubectl("describe", "ftj", self.job))

    def save(self, uri: str) -> list[str]:
        """Saves everything about a finished job, whose output is at `uri`.

        Returns messages for the user, among them layout problems of the report.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, arguments in (
            ("get.txt", ("get", "ftj", self.job)),
            ("get-wide.txt", ("get", "ftj", self.job, "-o", "wide")),
            ("describe.txt", ("describe", "ftj", self.job)),
            ("status.json", ("get", "ftj", self.job, "-o", "jsonpath={.status}")),
            ("events.txt", ("get", "events", "--sort-by=.lastTimestamp")),
        ):
            text = self._kubectl(*arguments)
            if name.endswith(".json"):
                text = json.dumps(json.loads(text), indent=2) + "\n"
            (self.folder / name).write_text(text)
        self._fetch(uri)
        lines = [f"saved in {self.folder}"]
        pages = self._mlflow_pages() if self.cluster.mlflow_url else {}
        if program() is None:
            return [*lines, "no pictures, since there is no browser here (Debian: apt-get install chromium)"]
        pictures, problems = asyncio.run(_pictures((self.folder / Path(REPORT_PATH).name).resolve(), pages))
        for name, data in pictures.items():
            (self.folder / name).write_bytes(data)
        return [*lines, *problems]

    def _kubectl(self, *arguments: str) -> str:
        return self.cluster.kubectl_run("-n", self.namespace, *arguments)

    def _fetch(self, uri: str) -> None:
        """Downloads the small files of the result, under their own names."""
        bucket, prefix = uri.removeprefix("s3://").split("/", 1)
        store = install.s3_store(self.cluster, bucket)
        for path in FILES:
            try:
                data = bytes(obstore.get(store, f"{prefix}/{path}").bytes())
            except FileNotFoundError:
                continue
            (self.folder / Path(path).name).write_bytes(data)

    def _mlflow_pages(self) -> dict[str, tuple[str, str]]:
        """Saves the job's MLflow run as JSON and returns MLflow's pages about it.

        They are (address, a word that the page shows once it has loaded), by picture name; empty
        if there is no such run.
        """
        uid = self._kubectl("get", "ftj", self.job, "-o", "jsonpath={.metadata.uid}")
        url = self.cluster.mlflow_url
        experiments = _request(url, "experiments/search", {"max_results": 100})["experiments"]
        query = {
            "experiment_ids": [experiment["experiment_id"] for experiment in experiments],
            "filter": f"tags.`finetune.job_uid` = '{uid}'",
        }
        runs = _request(url, "runs/search", query).get("runs", [])
        if not runs:
            return {}
        (self.folder / "mlflow-run.json").write_text(json.dumps(runs[0], indent=2) + "\n")
        info = runs[0]["info"]
        address = f"{url}/#/experiments/{info['experiment_id']}/runs/{info['run_id']}"
        pages = {"mlflow-run": (address, "Parameters"), "mlflow-curves": (f"{address}/model-metrics", "Auto-refresh")}
        versions = _request(url, f"model-versions/search?filter={urllib.parse.quote(_of_run(info['run_id']))}")
        for version in versions.get("model_versions", []):
            name = urllib.parse.quote(version["name"])
            pages["mlflow-model"] = (f"{url}/#/models/{name}/versions/{version['version']}", "Source Run")
        return pages


def _of_run(identity: str) -> str:
    return f"run_id = '{identity}'"


def _request(url: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Calls MLflow's REST API: a POST if there is a body, else a GET."""
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(f"{url}/api/2.0/mlflow/{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        document: dict[str, Any] = json.load(response)
        return document


async def _pictures(report: Path, pages: dict[str, tuple[str, str]]) -> tuple[dict[str, bytes], list[str]]:
    """Returns pictures of the report at every size, its PDF, and pictures of MLflow's pages.

    They are by file name; the second value lists the problems as messages.
    """
    files, problems = {}, []
    async with browser() as page:
        for view in VIEWS:
            await page.show(report.as_uri(), view)
            if excess := await page.overflow():
                problems.append(f"{report.name} is {excess} px too wide at {view.width}")
            files[f"report-{view.name}.png"] = await page.picture(full_page=True)
        await page.show(report.as_uri(), SCREEN)
        files["report.pdf"] = await page.printed()
        for name, (url, word) in pages.items():
            try:
                await page.show(url, SCREEN, f"document.body.innerText.includes({json.dumps(word)})")
            except TimeoutError as error:
                problems.append(str(error))
            files[f"{name}.png"] = await page.picture()
    return files, problems
