"""Lists the steps that the roofline is computed for."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpu.kit import LLAMA_1B, LLAMA_8B, Shape

from finetune_api.resource import LoraSpec
from finetune_trainer.parallel.estimate.recomputation import EVERYTHING, NOTHING, SELECTIVE, Recomputation
from trainer.support.fake_step import Step

_QV = LoraSpec(rank=16, target_modules=("q_proj", "v_proj"))
_ALL = LoraSpec(rank=16, target_modules=("all-linear",))


@dataclass(frozen=True)
class Cell:
    """Describes a micro-batch of `rows` examples with `tokens` tokens together. `lora` is None for
    full training. `ranks` is the number of ranks that fsdp shards the model over."""

    name: str
    shape: Shape
    lora: LoraSpec | None
    tokens: int
    rows: int = 8
    recompute: Recomputation = NOTHING
    ranks: int | None = None
    quantized: bool = False

    @property
    def pairs(self) -> float:
        """The number of pairs of tokens that attend to each other: each to itself and to all before
        it."""
        length = self.tokens // self.rows
        return self.rows * length * (length + 1) / 2

    def step(self, layers: int) -> Step:
        """Returns the step with this number of layers instead of the model's own."""
        shape = {
            "hidden_size": self.shape.hidden,
            "intermediate_size": self.shape.intermediate,
            "num_attention_heads": self.shape.heads,
            "num_key_value_heads": self.shape.key_heads,
            "vocab_size": self.shape.vocabulary,
            "num_hidden_layers": layers,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
        }
        return Step(
            shape=tuple(shape.items()),
            lora=self.lora,
            recompute=self.recompute,
            tokens=self.tokens,
            fused=self.ranks is None,
            ranks=self.ranks,
            rows=self.rows,
            quantized=self.quantized,
        )


CELLS = (
    Cell("lora-qv", LLAMA_8B, _QV, 6208),
    Cell("lora-all-linear", LLAMA_8B, _ALL, 6208),
    Cell("lora-all-linear-recompute", LLAMA_8B, _ALL, 16384, recompute=EVERYTHING),
    Cell("lora-qv-32k", LLAMA_8B, _QV, 32768, rows=1, recompute=EVERYTHING),
    Cell("lora-qv-32k-selective", LLAMA_8B, _QV, 32768, rows=1, recompute=SELECTIVE),
    Cell("full", LLAMA_8B, None, 5104, ranks=8),
    Cell("full-1b", LLAMA_1B, None, 8192),
    Cell("lora-qv-1b", LLAMA_1B, _QV, 16384),
    Cell("qlora-qv", LLAMA_8B, _QV, 6208, quantized=True),
)
