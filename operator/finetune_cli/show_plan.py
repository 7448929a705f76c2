"""`finetune plan FILE`: shows what would be computed and created, without a cluster."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from finetune_api.amounts import amounts
from finetune_api.messages.run import RunConfig
from finetune_api.resource import FineTuneJob
from finetune_api.scalars import quantity_value
from finetune_api.status import Restarts
from finetune_cli import files, show_memory
from finetune_operator.core.plan import PlanError, gpu_count, needs_preflight, plan
from finetune_operator.core.pods import manifests
from finetune_operator.settings import Settings
from finetune_trainer.errors import RunError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `finetune plan`."""
    parser.add_argument("file", metavar="FILE", help="YAML file with one FineTuneJob; - is standard input")
    parser.add_argument(
        "-o", "--output", choices=("text", "yaml"), default="text", help="a summary as text, or the objects as YAML"
    )
    parser.add_argument("--model", metavar="DIR", help="local folder of the model; shows the memory that it needs")
    parser.add_argument("--gpu-memory", metavar="SIZE", help="memory of one GPU, such as 80Gi; only with --model")
    parser.add_argument("--image", metavar="IMAGE", help="trainer image; default that of the operator")


def run(options: argparse.Namespace) -> int:
    """Prints the plan. Returns 0, or 1 if the file, the model or an option is invalid."""
    settings = Settings(trainer_image=options.image) if options.image else Settings()
    try:
        job = files.one_job(options.file)
        config = plan(job, settings)
    except (files.InvalidFile, PlanError) as error:
        print(f"finetune plan: {error}", file=sys.stderr)
        return 1
    objects = planned_objects(job, config, settings)
    if options.output == "yaml":
        print(yaml.safe_dump_all(objects, sort_keys=False), end="")
        return 0
    for name, value in facts(job, config):
        print(f"{name:<18} {value}")
    if options.model:
        try:
            gpu_memory = int(quantity_value(options.gpu_memory)) if options.gpu_memory else None
            free_memory = show_memory.available_memory(config, gpu_memory)
            print("\n".join(show_memory.lines(config, Path(options.model), free_memory)))
        except (RunError, ValueError) as error:
            print(f"finetune plan: {error}", file=sys.stderr)
            return 1
    print("objects")
    for item in objects:
        print(f"  {item['kind']} {item['metadata']['name']}")
    return 0


def planned_objects(job: FineTuneJob, config: RunConfig, settings: Settings) -> list[dict[str, Any]]:
    """Returns the Kubernetes objects of the first attempt, in the order of their creation."""
    preflight = [manifests.preflight_job(job, config, settings)] if needs_preflight(job.spec) else []
    service = [manifests.service(job)] if config.world.nodes > 1 else []
    return [*preflight, *service, manifests.attempt_job(job, config, settings, Restarts())]


def facts(job: FineTuneJob, config: RunConfig) -> list[tuple[str, str]]:
    """Returns (name, value) of each line to show. It is pure."""
    world, training = config.world, config.training
    gpus, pod = gpu_count(job.spec), amounts(job.spec)
    length = f"{training.max_steps} steps" if training.max_steps else f"{training.epochs or 3:g} epochs"
    return [
        ("job", f"{config.job.namespace}/{config.job.name}"),
        ("model", f"{config.model.location.display} ({config.method})"),
        ("data", config.data.train.display),
        ("output", config.output.display),
        ("world", f"{world.size} processes: {world.nodes} pods x {world.processes_per_node}"),
        ("hardware", f"{gpus} x {job.spec.resources.gpu.name}" if job.spec.resources.gpu else "CPU only"),
        ("pod requests", f"cpu {pod.cpu}, memory {pod.memory}, scratch {pod.scratch}"),
        *([("network", f"{job.spec.pod.network}, a profile of the chart, which isn't known here")]
          if job.spec.pod.network else []),
        ("strategy", world.strategy),
        *([("rows", f"each is shared by {world.sequence_parallel_size} processes")]
          if world.sequence_parallel_size > 1 else []),
        ("global batch", _batch(config)),
        ("length", length),
        ("checkpoints", f"every {config.checkpoint.every} steps, {config.checkpoint.keep} kept"
         if config.checkpoint.every != "auto" else f"after every tenth of the run, {config.checkpoint.keep} kept"),
    ]  # fmt: skip


def _batch(config: RunConfig) -> str:
    batch, micro_batch, world = config.training.global_batch_size, config.training.micro_batch_size, config.world
    if not isinstance(micro_batch, int):
        return f"{batch} examples per step; micro-batch size and accumulation depend on memory"
    accumulation = -(-batch // (micro_batch * world.data_size))
    unit = "groups of processes" if world.sequence_parallel_size > 1 else "processes"
    return (
        f"{batch} examples per step: micro-batches of at most {micro_batch} x {world.data_size} {unit} x "
        f"{accumulation} accumulated"
    )
