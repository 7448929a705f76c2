"""On how many GPUs `strategy: auto` trains a model, and how, by the trainer's own estimate. Pure.

Each answer is that of `finetune plan` for a job with these settings, if its pods have all the
memory that they need.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from finetune_api.messages.run import RunConfig
from finetune_api.resource import parse
from finetune_api.spec.hardware import StrategyOption
from finetune_operator.core.plan import plan
from finetune_operator.settings import Settings
from finetune_trainer.parallel import model_size, strategy_choice
from finetune_trainer.parallel.free_memory import FreeMemory, TooLittleMemory
from finetune_trainer.parallel.memory_estimate import ParallelConfig, TrainingSetup
from finetune_trainer.parallel.model_size import ModelSize
from sizing import pods
from sizing.models import PublishedModel, tensor_shapes

ROW_TOKENS = 2048
"""dataset.maxSequenceLength, and the length of the longest row."""

GPU_COUNTS = (1, 2, 4, 8)
_ALL_MEMORY = 1 << 60


@dataclass(frozen=True)
class Gpu:
    """Describes a class of GPUs: its name, the bytes that are free once a process has started, and
    examples."""

    name: str
    free: int
    examples: str

    @property
    def usable(self) -> int:
        """The bytes that an estimate may add up to."""
        return FreeMemory("cuda", self.free, 0).usable


@dataclass(frozen=True)
class Method:
    """Describes a method by the parts of a job's spec that select it."""

    name: str
    model: tuple[tuple[str, str], ...] = ()
    adapters: bool = True

    def spec(self) -> dict[str, Any]:
        """Returns the parts `model` and `method` of a job's spec."""
        lora = {"type": "lora", "lora": {"rank": 16, "targetModules": ["all-linear"]}}
        return {
            "model": {"uri": "hf://organization/model", **dict(self.model)},
            "method": lora if self.adapters else {"type": "full"},
        }


GPUS = (
    Gpu("24 GB", 21 << 30, "an L4 or A10G"),
    Gpu("48 GB", 43 << 30, "an L40S"),
    Gpu("80 GB", 78 << 30, "an A100 or H100"),
)
METHODS = (Method("LoRA"), Method("QLoRA", (("quantization", "nf4"),)), Method("Full", adapters=False))


@dataclass(frozen=True)
class Fit:
    """Describes how a model is trained on a number of GPUs in one pod.

    `gpu_bytes` is the estimate per GPU for one row at a time, `tokens` is how many tokens auto
    computes at a time, and `memory_bytes` and `scratch_bytes` are what the pod needs at least.
    """

    gpus: int
    parallel: ParallelConfig
    tokens: int
    gpu_bytes: int
    memory_bytes: int
    scratch_bytes: int


@dataclass(frozen=True)
class Answer:
    """Holds the fits of a model with the fewest GPUs.

    `on_gpus` is the one in which nothing is offloaded; None if there is none. `offloaded` is one
    with even fewer GPUs; None if offloading allows no fewer.
    """

    on_gpus: Fit | None
    offloaded: Fit | None

    @property
    def fits(self) -> tuple[Fit, ...]:
        """The fits that exist."""
        return tuple(fit for fit in (self.on_gpus, self.offloaded) if fit is not None)


@cache
def run_config(method: Method, gpus: int, strategy: StrategyOption = "auto") -> RunConfig:
    """Returns the configuration of a run with one pod that has these GPUs."""
    spec = {
        **method.spec(),
        "dataset": {"uri": "s3://data/rows.jsonl", "maxSequenceLength": ROW_TOKENS},
        "distribution": {"processesPerNode": gpus, "strategy": strategy},
        "resources": {"gpu": {}},
        "output": {"uri": "s3://models/output"},
    }
    job = {"apiVersion": "finetune-operator.io/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "job"}}
    return plan(parse({**job, "spec": spec}), Settings())


@cache
def size_of(model: PublishedModel, method: Method) -> ModelSize:
    """Returns the model's size, with adapters if the method trains them."""
    run = run_config(method, 1)
    lora = run.lora if run.method == "lora" else None
    return model_size.size_of(model.config, tensor_shapes(model), lora, run.full)


def answer(model: PublishedModel, method: Method, gpu: Gpu) -> Answer:
    """Returns how auto trains the model on GPUs of this class."""
    fits = [fit for count in GPU_COUNTS if (fit := fit_on(model, method, gpu, count)) is not None]
    on_gpus = _fewest(fit for fit in fits if fit.parallel.offload == "none")
    smallest = _fewest(fits)
    return Answer(on_gpus, None if smallest == on_gpus else smallest)


def fit_on(
    model: PublishedModel,
    method: Method,
    gpu: Gpu,
    count: int,
    *,
    strategy: StrategyOption = "auto",
    host: int = _ALL_MEMORY,
) -> Fit | None:
    """Returns how the model is trained on `count` GPUs; None if it doesn't fit.

    `host` is the free memory of the host in bytes, for each process.
    """
    run, size, setup = run_config(method, count, strategy), size_of(model, method), _setup(method, count)
    user_choice = strategy_choice.user_choice(run, ROW_TOKENS)
    try:
        choice = strategy_choice.choose(user_choice, size, setup, FreeMemory("cuda", gpu.free, host))
    except TooLittleMemory:
        return None
    return Fit(
        gpus=count,
        parallel=choice.parallel,
        tokens=choice.tokens,
        gpu_bytes=choice.estimate.total(ROW_TOKENS),
        memory_bytes=pods.memory_bytes(setup, choice.estimate),
        scratch_bytes=pods.scratch_bytes(size, setup),
    )


def _setup(method: Method, count: int) -> TrainingSetup:
    return strategy_choice.training_setup(run_config(method, count), half=True)


def _fewest(fits: Iterable[Fit]) -> Fit | None:
    return min(fits, key=lambda fit: fit.gpus, default=None)
