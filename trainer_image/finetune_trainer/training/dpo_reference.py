"""The reference model's log-probabilities of each preference pair, which DPO compares with.

The reference is the model before its first step. All ranks compute it together, once, and store
the numbers on the node's disk, so that no second model is held in memory.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from finetune_api.messages.data_report import SplitName
from finetune_api.messages.run import RunConfig
from finetune_api.resource import DpoSpec
from finetune_trainer.data.dataset import Data
from finetune_trainer.data.splits import Split
from finetune_trainer.evaluation.evaluator import Evaluator
from finetune_trainer.model.dpo import PreferenceSum, log_probabilities
from finetune_trainer.model.loss import LossSum
from finetune_trainer.parallel.strategy import ParallelStrategy
from finetune_trainer.training.context import RankContext
from finetune_trainer.training.packing_setup import MicroBatches

_HEAD_BYTES = 2**20  # of each weight file that go into the cache's key


@dataclass(frozen=True)
class Reference:
    """Computes log-probabilities of both answers of each pair; the same on every rank.

    With `without_adapters` the model's adapters are switched off, which leaves the base model.
    """

    evaluator: Evaluator
    without_adapters: bool

    def attach(self, data: Data, cache: Path, key: str) -> Data:
        """Attach reference log-probabilities to every split.

        `key` identifies what they depend on besides the rows (weights, precision, quantization).
        It becomes part of the names of the files in the folder `cache`.
        """
        splits: dict[SplitName, Split] = {
            name: replace(split, reference=self._cached(split, cache, f"{key} {data.key} {name}"))
            for name, split in data.splits().items()
        }
        return data.with_splits(splits)

    def _cached(self, split: Split, cache: Path, key: str) -> NDArray[np.float64]:
        """(examples, 2), read from this node's cache if every node has it."""
        path = cache / f"reference-{_digest(key, split)}.npy"
        if all(self.evaluator.world.all_gather(path.is_file(), bool)):
            stored: NDArray[np.float64] = np.load(path, mmap_mode="r")
            return stored
        log_p = self._compute(split)
        if self.evaluator.world.is_first_of_node:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}.tmp.npy")
            np.save(partial, log_p)
            os.replace(partial, path)
        return log_p

    def _compute(self, split: Split) -> NDArray[np.float64]:
        """(examples, 2). Each rank computes its share, and a sum over ranks joins the shares."""
        strategy, loss_sum, world = self.evaluator.strategy, self.evaluator.loss_sum, self.evaluator.world
        log_p = torch.zeros(len(split), 2, dtype=torch.float64, device=world.device)
        strategy.model.eval()
        without = strategy.unwrapped.disable_adapter() if self.without_adapters else nullcontext()
        with torch.no_grad(), without:
            for micro_batch, batch in self.evaluator.for_each_micro_batch(split):
                with loss_sum.packed_context(batch):
                    answers = log_probabilities(loss_sum, strategy.model, batch)
                if micro_batch and world.sequence.rank == 0:
                    log_p[list(micro_batch)] = answers.double()
        strategy.model.train()
        if world.size > 1:
            torch.distributed.all_reduce(log_p)
        return log_p.cpu().numpy()


def prepare(
    context: RankContext, strategy: ParallelStrategy, batches: MicroBatches, loss_sum: LossSum, data: Data
) -> tuple[Data, PreferenceSum]:
    """Preference pairs with their reference log-probabilities, and the loss that compares with
    them."""
    run, reporter = context.run, context.reporter
    beta = run.training.dpo.beta if run.training.dpo else DpoSpec().beta
    without_adapters = _is_base_without_adapters(run)
    reference_model = "the base without adapters" if without_adapters else "the model before its first step"
    reporter.decision("objective", "dpo", f"beta {beta:g}; {reference_model} is the reference")
    reporter.phase("evaluating")
    key = f"{model_digest(context.paths.model)} {loss_sum.autocast} {run.model.quantization} {run.added_tokens}"
    if run.method == "lora" and not without_adapters:
        key += f" {run.lora} {run.training.seed}"
    # Without its adapters the model uses its own output layer again, not the trained copy that the
    # chunked head was made from.
    own_output_layer = without_adapters and run.lora is not None and bool(run.lora.modules_to_save)
    evaluator = Evaluator(
        strategy,
        batches.unhalved.shape,
        batches.collate,
        loss_sum.unchunked if own_output_layer else loss_sum,
        context.world,
        reporter.heartbeat,
    )
    reference = Reference(evaluator, without_adapters)
    data = reference.attach(data, context.paths.token_cache, key)
    reporter.phase("loading")
    return data, PreferenceSum.over(loss_sum, beta)


def _is_base_without_adapters(run: RunConfig) -> bool:
    """Whether switching the adapters off gives the model as it was before the first step."""
    return run.method == "lora" and run.lora is not None and run.lora.init == "default" and run.lora.bias == "none"


def model_digest(folder: Path) -> str:
    """Identifies a model's files well enough for a cache: by their sizes and first bytes."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + file.read(_HEAD_BYTES))
    return digest.hexdigest()


def _digest(key: str, split: Split) -> str:
    return hashlib.sha256(f"{key} ".encode() + split.index.tobytes()).hexdigest()[:32]
