"""`finetune plan FILE`: what would be computed and created, without a cluster."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from finetune_api.resource import FineTuneJob
from finetune_api.run import RunConfig
from finetune_api.scalars import quantity_value
from finetune_api.status import Restarts
from finetune_cli import files, show_memory
from finetune_operator import manifests
from finetune_operator.plan import PlanError, gpu_count, plan, wants_preflight
from finetune_operator.settings import Settings
from finetune_trainer.failure import Failed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="YAML file with one FineTuneJob; - is standard input")
    parser.add_argument("-o", "--output", choices=("text", "yaml"), default="text", help="text, or the objects as YAML")
    parser.add_argument("--model", metavar="DIR", help="the model's folder here: shows the memory that it needs")
    parser.add_argument("--gpu-memory", metavar="SIZE", help="memory of one GPU, such as 80Gi; with --model")
    parser.add_argument("--image", metavar="IMAGE", help="trainer image; default the operator's default")


def run(options: argparse.Namespace) -> int:
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
            gpu = int(quantity_value(options.gpu_memory)) if options.gpu_memory else None
            there = show_memory.room(config, job.spec.resources, gpu)
            print("\n".join(show_memory.lines(config, Path(options.model), there)))
        except (Failed, ValueError) as error:
            print(f"finetune plan: {error}", file=sys.stderr)
            return 1
    print("objects")
    for item in objects:
        print(f"  {item['kind']} {item['metadata']['name']}")
    return 0


def planned_objects(job: FineTuneJob, config: RunConfig, settings: Settings) -> list[dict[str, Any]]:
    """Of the first attempt, in the order in which they are created."""
    preflight = [manifests.preflight_job(job, config, settings)] if wants_preflight(job.spec) else []
    service = [manifests.service(job)] if config.world.nodes > 1 else []
    return [*preflight, *service, manifests.attempt_job(job, config, settings, Restarts())]


def facts(job: FineTuneJob, config: RunConfig) -> list[tuple[str, str]]:
    """Name and value, for people. Pure."""
    world, training = config.world, config.training
    gpus = gpu_count(job.spec)
    length = f"{training.max_steps} steps" if training.max_steps else f"{training.epochs or 3:g} epochs"
    return [
        ("job", f"{config.job.namespace}/{config.job.name}"),
        ("model", f"{config.model.location.display} ({config.method})"),
        ("data", config.data.train.display),
        ("output", config.output.display),
        ("world", f"{world.size} processes: {world.nodes} pods x {world.processes_per_node}"),
        ("hardware", f"{gpus} x {job.spec.resources.gpu.name}" if job.spec.resources.gpu else "CPU only"),
        ("a pod asks for", f"cpu {job.spec.resources.cpu}, memory {job.spec.resources.memory}"),
        ("strategy", world.strategy),
        ("global batch", _batch(config)),
        ("length", length),
        ("checkpoints", f"every {config.checkpoint.every} steps, {config.checkpoint.keep} kept"
         if config.checkpoint.every != "auto" else f"every tenth of the run, {config.checkpoint.keep} kept"),
    ]  # fmt: skip


def _batch(config: RunConfig) -> str:
    whole, micro, size = config.training.global_batch_size, config.training.micro_batch_size, config.world.size
    if not isinstance(micro, int):
        return f"{whole} examples a step; micro-batch and accumulation as memory allows"
    accumulation = -(-whole // (micro * size))
    return f"{whole} examples a step: at most {micro} at once x {size} processes x {accumulation} accumulated"
