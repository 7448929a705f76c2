"""What a run needs of the host's memory besides its shards while it loads the model and while it
writes the result.

Anonymous memory is counted, in real ranks, with a model whose weights are large in comparison with
everything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from testkit.rows import pairs
from testkit.tiny_models import tokenizer
from trainer.support.memory_by_phase import MemoryByPhase
from trainer.support.rank_runs import finish_all, prepare

_RANKS = 2
_SIZES = {"hidden_size": 512, "intermediate_size": 8192, "num_hidden_layers": 4, "num_attention_heads": 8}
_SLACK = 80 * 2**20
"""For the libraries that are imported meanwhile, one layer, and memory that the C library
retains."""


@dataclass(frozen=True)
class Measured:
    """Holds a rank's anonymous bytes by phase, and the bytes of all weights in float32."""

    phases: dict[str, dict[str, int]]
    weights: int

    def growth(self, phase: str) -> int:
        """Returns by how much the peak of a phase exceeds its beginning."""
        return self.phases[phase]["peak"] - self.phases[phase]["first"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "model"
    torch.manual_seed(0)
    names = tokenizer()
    config = LlamaConfig(**_SIZES, vocab_size=len(names), tie_word_embeddings=False)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    names.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["fsdp", "zero3", "zero2"])
def measured(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Measured]:
    """Returns what each rank measured in a step of full training."""
    folder = tmp_path_factory.mktemp(request.param)
    job = prepare(
        folder / "run",
        model,
        pairs(4),
        full=True,
        world=_RANKS,
        strategy=request.param,
        shards="always",
        training={"max_steps": 1, "global_batch_size": 2, "activation_checkpointing": "always"},
    )
    memory = MemoryByPhase(folder)
    finish_all([job], faults=dict.fromkeys(range(_RANKS), memory))
    weights = 4 * sum(parameter.numel() for parameter in LlamaForCausalLM.from_pretrained(model).parameters())
    assert weights > 200 * 2**20
    return [Measured(memory.read(rank), weights) for rank in range(_RANKS)]


def test_the_result_is_written_without_a_copy_of_all_weights(measured: list[Measured]) -> None:
    """Only one tensor at a time is gathered."""
    for rank in measured:
        assert rank.growth("saving") < _SLACK


def test_no_rank_holds_the_whole_model_while_it_is_loaded(
    measured: list[Measured], request: pytest.FixtureRequest
) -> None:
    """A rank's share is added by loading. With zero2, every rank trains all weights."""
    if "zero2" in request.node.name:
        return
    for rank in measured:
        assert rank.growth("loading") < rank.weights / _RANKS + _SLACK
