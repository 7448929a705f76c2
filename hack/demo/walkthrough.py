"""The demo's steps on a cluster, from creating it to the tuned model's answers.

The output is for people. Every figure in it is read from where a user would read it (object
storage, status, Prometheus).
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import obstore
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from demo import clusters, install, screen, watch
from demo.clusters import ROOT, ClusterAccess
from demo.keep import Record
from demo_assets import dataset, model
from finetune_api.names import MANIFEST_PATH, SAMPLES_PATH
from finetune_api.yaml import load_all
from finetune_cli.screen import sparkline

NAMESPACE = "ml-team"
LIMIT_SECONDS = 3600.0

console = Console(highlight=False, record=True)


def make_cluster(name: str, file: str) -> None:
    """Starts the cluster with the servers that the job in `file` needs."""
    clusters.up(name, mlflow=_uses_mlflow(_document(file)))


def load_images(name: str) -> None:
    """Loads both images onto the cluster's node, built if their content changed."""
    clusters.load(name, *clusters.build_images())


def install_contents(name: str) -> None:
    """Uploads model and data to S3, installs the operator, and creates the job's namespace."""
    cluster = clusters.access(name)
    put_assets(cluster)
    install.operator(cluster, *clusters.build_images())
    install.namespace(cluster, NAMESPACE)


def run_job(name: str, file: str, picture: str = "", keep: str = "") -> int:
    """Applies the job and follows it to its end. Returns 0 if it succeeded.

    `picture` is an SVG file for the output, `keep` a folder for everything visible of the job.
    """
    begin = time.monotonic()
    cluster, document = clusters.access(name), _document(file)
    job_name, output = document["metadata"]["name"], document["spec"]["output"]["uri"]
    console.print(f"[bold]kubectl apply -n {NAMESPACE} -f {file}[/bold]")
    cluster.kubectl_run("-n", NAMESPACE, "delete", "ftj", job_name, "--ignore-not-found", "--wait")
    clear_output(cluster, output)
    cluster.kubectl_run("-n", NAMESPACE, "apply", "-f", "-", stdin=(ROOT / file).read_text())
    applied = time.time()
    record = Record(cluster, NAMESPACE, job_name, Path(keep)) if keep else None
    last = follow(cluster, job_name, record)
    console.print()
    console.print(cluster.kubectl_run("-n", NAMESPACE, "get", "ftj", job_name))
    if last.phase != "Succeeded":
        console.print(f"[red]{last.phase}[/red]: {last.message}")
        console.print_json(json.dumps(last.status.get("failure") or {}))
        return 1
    show(cluster, job_name, output, applied)
    if record:
        console.print("\n".join(record.save(output)))
    if picture:
        draw(Path(picture), f"kubectl apply -f {file}")
    show_next_steps(cluster, job_name, output, time.monotonic() - begin)
    return 0


def _document(file: str) -> dict[str, Any]:
    (document,) = load_all((ROOT / file).read_text())
    return document


def _uses_mlflow(document: dict[str, Any]) -> bool:
    return bool(document["spec"].get("tracking", {}).get("mlflow"))


def save_finished(name: str, file: str, folder: str) -> int:
    """Saves everything visible of a finished job, on a cluster that is up."""
    document = _document(file)
    record = Record(clusters.access(name), NAMESPACE, document["metadata"]["name"], Path(folder))
    console.print("\n".join(record.save(document["spec"]["output"]["uri"])))
    return 0


def draw(picture: Path, title: str) -> None:
    """Writes the output so far as an SVG file that loads no web fonts."""
    screen.save(console, picture, title)


def put_assets(cluster: ClusterAccess) -> None:
    """Uploads the base model and the data sets, which are cached outside the checkout."""
    install.put_folder(install.s3_store(cluster, "models"), model.folder(), "smollm2-135m-instruct")
    for name in dataset.SELECTIONS:
        install.put_folder(install.s3_store(cluster, "data"), dataset.folder(name), name)


def clear_output(cluster: ClusterAccess, uri: str) -> None:
    """Deletes an earlier demo's result, which the operator would refuse to overwrite."""
    bucket, prefix = uri.removeprefix("s3://").split("/", 1)
    store = install.s3_store(cluster, bucket)
    paths = [meta["path"] for batch in obstore.list(store, prefix=prefix) for meta in batch]
    if paths:
        obstore.delete(store, paths)


def follow(cluster: ClusterAccess, job_name: str, record: Record | None = None) -> watch.JobView:
    """Shows a live progress line until the job is over; returns the last view of it.

    `record` saves the job's row meanwhile.
    """
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
    )
    last_line = ""
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("Pending", total=1, loss="")
        for view in watch.follow(cluster, NAMESPACE, job_name, LIMIT_SECONDS):
            loss = f"loss {view.train_loss:.3f}" if view.train_loss is not None else ""
            if record:
                record.glance()
            bar.update(task, description=view.phase, completed=view.step, total=max(view.total_steps, 1), loss=loss)
            line = f"{view.phase}: {view.message}" if view.message else view.phase
            if line != last_line:
                bar.console.print(f"  {line}")
                last_line = line
            last = view
    return last


def show(cluster: ClusterAccess, job_name: str, uri: str, applied: float) -> None:
    """Shows the result as object storage and Prometheus have it."""
    bucket, prefix = uri.removeprefix("s3://").split("/", 1)
    store = install.s3_store(cluster, bucket)
    files = Table("file", "bytes", title=f"written to {uri}")
    for batch in obstore.list(store, prefix=prefix):
        for meta in batch:
            files.add_row(meta["path"].removeprefix(prefix + "/"), f"{meta['size']:,}")
    console.print(files)

    result = json.loads(bytes(obstore.get(store, f"{prefix}/{MANIFEST_PATH}").bytes()))
    metrics = result["metrics"]
    before, after = metrics["testLossBefore"], metrics["testLossAfter"]
    console.print(
        f"held-out loss per token: [bold]{before:.4f}[/bold] before, [bold]{after:.4f}[/bold] after "
        f"({(after - before) / before:+.1%})"
    )
    series = watch.prometheus(
        cluster,
        "query_range",
        query=f'max(finetune_train_loss{{namespace="{NAMESPACE}",job="{job_name}"}})',
        start=f"{applied:.0f}",
        end=f"{time.time():.0f}",
        step="5",
    )
    values = [float(value) for _, value in series[0]["values"]] if series else []
    console.print(f"training loss in Prometheus ({len(values)} points, every 5 s): {sparkline(values)}")
    console.print("  " + " ".join(f"{value:.2f}" for value in values[:: max(1, len(values) // 16)]))

    lines = bytes(obstore.get(store, f"{prefix}/{SAMPLES_PATH}").bytes()).decode().splitlines()
    for sample in map(json.loads, lines):
        console.print(f"\n[bold]prompt[/bold]    {sample['prompt']}", markup=True)
        console.print(f"[dim]reference[/dim] {sample['reference'].strip()}")
        console.print(f"[dim]before[/dim]    {sample['before'].strip()}")
        console.print(f"[green]after[/green]     {sample['after'].strip()}")


def show_next_steps(cluster: ClusterAccess, job_name: str, uri: str, seconds: float) -> None:
    """Shows commands to try next."""
    kubeconfig = (
        os.path.relpath(cluster.kubeconfig, Path.cwd())
        if cluster.kubeconfig.startswith(str(ROOT))
        else cluster.kubeconfig
    )
    console.print(f"\n[bold]The job took {seconds:.0f} s.[/bold] Try next:")
    for what, command in (
        ("List the objects", f"export KUBECONFIG={kubeconfig}; {cluster.kubectl} -n {NAMESPACE} get ftj,jobs,pods"),
        ("Describe the job", f"{cluster.kubectl} -n {NAMESPACE} describe ftj {job_name}"),
        ("Prometheus", cluster.prometheus_url),
        ("S3", f"{cluster.s3_endpoint} ({uri})"),
        (
            "Change examples/quickstart.yaml (a new name and output) and run",
            f"{cluster.kubectl} -n {NAMESPACE} apply -f -",
        ),
        ("Clean up", "make demo-down"),
    ):
        console.print(f"  {what}: [cyan]{command}[/cyan]", soft_wrap=True)
