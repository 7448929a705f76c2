"""Imports what a rank imports, at its start or later, for the server of `forked_ranks`. It creates
no tensor and no thread."""

from __future__ import annotations

import gc
from importlib import import_module

from finetune_trainer import libraries

libraries.without_trackers()

from transformers.conversion_mapping import get_checkpoint_conversion_mapping  # noqa: E402

_MODULES = (
    "trainer.support.forked_ranks",
    "trainer.support.run_sequence",
    "finetune_trainer.rank",
    "finetune_trainer.training.job",
    "finetune_trainer.parallel.deepspeed",
    "accelerate",
    "peft.utils.transformers_weight_conversion",
    "torch.distributed.algorithms.ddp_comm_hooks",
    "torch.distributed.fsdp",
    "transformers.models.auto.modeling_auto",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.t5.modeling_t5",
    "deepspeed",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # compiles a function, so all of inductor comes with it
)

for module in _MODULES:
    import_module(module)
import_module("deepspeed.ops").__compatible_ops__  # noqa: B018  queries the compiler for its features
get_checkpoint_conversion_mapping("llama")  # a thousand regular expressions
gc.collect()
gc.freeze()  # these objects stay shared with the forks, and their garbage collections skip them
