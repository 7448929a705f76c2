"""What a rank needs of the host's memory, besides its shards, to load the model and to write the
result of full training.

Anonymous memory is counted, in real ranks, with a model of 220 MB in float32 that is stored in
bfloat16.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from testkit.rows import pairs
from testkit.tiny_models import tokenizer
from trainer.support.memory_growth import MemoryGrowth
from trainer.support.rank_runs import finish_all, prepare

_RANKS = 2
_SIZES = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 13, "num_attention_heads": 8}
_WEIGHTS = 13 * (3 * 512 * 2048 + 4 * 512 * 512) * 4
_SLACK = 50 * 2**20
"""For a layer of 17 MB, modules that are imported meanwhile, and memory that the C library
retains."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "model"
    torch.manual_seed(0)
    names = tokenizer()
    config = LlamaConfig(**_SIZES, vocab_size=len(names), tie_word_embeddings=False)  # type: ignore[arg-type]
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    names.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["fsdp", "zero3"])
def growth(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, int]]:
    """Returns the growth of each rank's memory, by phase, in a run of one step."""
    folder = tmp_path_factory.mktemp(request.param)
    job = prepare(
        folder / "run",
        model,
        pairs(2),
        full=True,
        world=_RANKS,
        strategy=request.param,
        shards="always",
        training={"max_steps": 1, "global_batch_size": 2, "activation_checkpointing": "always"},
    )
    memory = MemoryGrowth(folder)
    finish_all([job], faults=dict.fromkeys(range(_RANKS), memory))
    return [memory.read(rank) for rank in range(_RANKS)]


def test_no_rank_holds_more_than_its_shard_while_the_model_is_loaded(growth: list[dict[str, int]]) -> None:
    """DeepSpeed makes every module in full before it splits it, so with zero3 a layer comes on top;
    fragments of the C library's heap once took up to two shards more."""
    for rank in growth:
        assert rank["load"] + rank.get("shard", 0) < _WEIGHTS / _RANKS + _SLACK, growth


def test_the_result_is_written_without_a_copy_of_all_weights(growth: list[dict[str, int]]) -> None:
    for rank in growth:
        assert rank["write"] < _SLACK, growth
