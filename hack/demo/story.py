"""The demo from an empty machine to a tuned model's answers, read top to bottom.

Called by demo.__main__. Prints for people; every figure that it shows is read back from where a user would read it
(object storage, status, Prometheus).
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import obstore
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from demo import clusters, install, watch
from demo.clusters import ROOT, Place
from demo.keep import Record
from demo_assets import dataset, model
from finetune_api.names import MANIFEST_PATH, SAMPLES_PATH
from finetune_api.yaml import load_all

NAMESPACE = "ml-team"
LIMIT_SECONDS = 3600.0

console = Console(highlight=False, record=True)


@contextmanager
def step(title: str) -> Iterator[None]:
    """Says what is being done, and how long it took."""
    console.print(f"[bold]▸ {title}[/bold]")
    begin = time.monotonic()
    yield
    console.print(f"  [green]done[/green] in {time.monotonic() - begin:.1f} s")


def tell(name: str, file: str, picture: str = "", keep: str = "") -> int:
    """Returns the exit code: 0 when the job succeeded. `picture` is where what was said goes as SVG, `keep` a folder
    for all that there is to see of the job."""
    begin = time.monotonic()
    manifest = (ROOT / file).read_text()
    (document,) = load_all(manifest)
    job_name = document["metadata"]["name"]
    with step("images (first time: some minutes)"):
        operator_image, trainer_image = clusters.build_images()
    mlflow = bool(document["spec"].get("tracking", {}).get("mlflow"))
    servers = "S3, Prometheus and MLflow" if mlflow else "S3 and Prometheus"
    with step(f"a cluster with {servers} (first time: builds Kubernetes)"):
        place = clusters.up(name, mlflow=mlflow)
    with step("images into the cluster"):
        clusters.load(name, operator_image, trainer_image)
    with step("SmolLM2-135M-Instruct and the data sets into S3"):
        put_assets(place)
    with step("the operator, by Helm"):
        install.operator(place, operator_image, trainer_image)
        install.namespace(place, NAMESPACE)
    console.print(f"[bold]▸ kubectl apply -n {NAMESPACE} -f {file}[/bold]")
    place.kubectl_run("-n", NAMESPACE, "delete", "ftj", job_name, "--ignore-not-found", "--wait")
    clear_output(place, document["spec"]["output"]["uri"])
    place.kubectl_run("-n", NAMESPACE, "apply", "-f", "-", stdin=manifest)
    applied = time.time()
    record = Record(place, NAMESPACE, job_name, Path(keep)) if keep else None
    last = follow(place, job_name, record)
    console.print()
    console.print(place.kubectl_run("-n", NAMESPACE, "get", "ftj", job_name))
    if last.phase != "Succeeded":
        console.print(f"[red]{last.phase}[/red]: {last.message}")
        console.print_json(json.dumps(last.status.get("failure") or {}))
        return 1
    show(place, job_name, document["spec"]["output"]["uri"], applied)
    if record:
        with step("what there is to see of it"):
            console.print("\n".join(record.settle(document["spec"]["output"]["uri"])))
    if picture:
        draw(Path(picture), f"kubectl apply -f {file}")
    go_on(place, job_name, document["spec"]["output"]["uri"], time.monotonic() - begin)
    return 0


def keep_finished(name: str, file: str, folder: str) -> int:
    """What there is to see of a job that is over, on a cluster that is up."""
    (document,) = load_all((ROOT / file).read_text())
    record = Record(clusters.place(name), NAMESPACE, document["metadata"]["name"], Path(folder))
    console.print("\n".join(record.settle(document["spec"]["output"]["uri"])))
    return 0


def draw(picture: Path, title: str) -> None:
    """What was said, as an SVG that fetches no font from anywhere."""
    svg = console.export_svg(title=title)
    picture.write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL))


def put_assets(place: Place) -> None:
    """The base model and the data sets, made once and cached outside the checkout."""
    install.put_folder(install.s3_store(place, "models"), model.folder(), "smollm2-135m-instruct")
    for name in dataset.SELECTIONS:
        install.put_folder(install.s3_store(place, "data"), dataset.folder(name), name)


def clear_output(place: Place, uri: str) -> None:
    """An earlier demo's result: the operator would refuse to write over it, and says so."""
    bucket, prefix = uri.removeprefix("s3://").split("/", 1)
    store = install.s3_store(place, bucket)
    old = [meta["path"] for batch in obstore.list(store, prefix=prefix) for meta in batch]
    if old:
        obstore.delete(store, old)


def follow(place: Place, job_name: str, record: Record | None = None) -> watch.Sight:
    """A live line until the job is over; `record` glances at it meanwhile."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
    )
    said = ""
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("Pending", total=1, loss="")
        for now in watch.follow(place, NAMESPACE, job_name, LIMIT_SECONDS):
            loss = f"loss {now.train_loss:.3f}" if now.train_loss is not None else ""
            if record:
                record.glance()
            bar.update(task, description=now.phase, completed=now.step, total=max(now.total_steps, 1), loss=loss)
            line = f"{now.phase}: {now.message}" if now.message else now.phase
            if line != said:
                bar.console.print(f"  {line}")
                said = line
            last = now
    return last


def show(place: Place, job_name: str, uri: str, applied: float) -> None:
    """The result, read back from object storage and from Prometheus."""
    bucket, prefix = uri.removeprefix("s3://").split("/", 1)
    store = install.s3_store(place, bucket)
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
        place,
        "query_range",
        query=f'max(finetune_train_loss{{namespace="{NAMESPACE}",job="{job_name}"}})',
        start=f"{applied:.0f}",
        end=f"{time.time():.0f}",
        step="5",
    )
    values = [float(value) for _, value in series[0]["values"]] if series else []
    console.print(f"training loss as Prometheus has it ({len(values)} points, every 5 s): {sparkline(values)}")
    console.print("  " + " ".join(f"{value:.2f}" for value in values[:: max(1, len(values) // 16)]))

    lines = bytes(obstore.get(store, f"{prefix}/{SAMPLES_PATH}").bytes()).decode().splitlines()
    for sample in map(json.loads, lines):
        console.print(f"\n[bold]prompt[/bold]    {sample['prompt']}", markup=True)
        console.print(f"[dim]reference[/dim] {sample['reference'].strip()}")
        console.print(f"[dim]before[/dim]    {sample['before'].strip()}")
        console.print(f"[green]after[/green]     {sample['after'].strip()}")


def sparkline(values: list[float]) -> str:
    """One character a value, the lowest ▁, the highest █."""
    if not values:
        return "(none)"
    low, high = min(values), max(values)
    return "".join("▁▂▃▄▅▆▇█"[round((value - low) / ((high - low) or 1.0) * 7)] for value in values)


def go_on(place: Place, job_name: str, uri: str, seconds: float) -> None:
    """What a person would want to try next."""
    kubeconfig = (
        os.path.relpath(place.kubeconfig, Path.cwd()) if place.kubeconfig.startswith(str(ROOT)) else place.kubeconfig
    )
    console.print(f"\n[bold]It took {seconds:.0f} s.[/bold] How to go on:")
    for what, command in (
        ("look around", f"export KUBECONFIG={kubeconfig}; {place.kubectl} -n {NAMESPACE} get ftj,jobs,pods"),
        ("the job, in words", f"{place.kubectl} -n {NAMESPACE} describe ftj {job_name}"),
        ("Prometheus", place.prometheus_url),
        ("S3", f"{place.s3_endpoint} ({uri})"),
        ("change examples/quickstart.yaml (a new name and output), and", f"{place.kubectl} -n {NAMESPACE} apply -f -"),
        ("clean up", "make demo-down"),
    ):
        console.print(f"  {what}: [cyan]{command}[/cyan]", soft_wrap=True)
