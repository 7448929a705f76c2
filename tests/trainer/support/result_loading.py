"""Loads a result as any user would, with only Transformers and PEFT and on the original base, to
compare losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from finetune_api.messages.run import parse
from finetune_trainer.data import token_cache
from finetune_trainer.data.chat_rendering import Renderer
from finetune_trainer.data.preparation import ReadOptions
from trainer.support.rank_runs import FinishedRun


def result(run: FinishedRun, **options: Any) -> Any:
    """Returns the model that a run wrote. `options` are options for loading the base."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    export = run.paths.export
    adapter = (export / "adapter_config.json").is_file()
    base = str(run.paths.model.resolve()) if adapter else str(export)
    kind = AutoModelForSeq2SeqLM if AutoConfig.from_pretrained(base).is_encoder_decoder else AutoModelForCausalLM
    added = parse(run.paths.run_config.read_bytes()).added_tokens
    model = kind.from_pretrained(base, **{"dtype": torch.float32, **options})
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # bitsandbytes' layout for weights of 64 columns and more
    if added:  # as for any extended tokenizer; it is stored with the adapter
        rows = max(len(AutoTokenizer.from_pretrained(str(export))), model.get_input_embeddings().num_embeddings)
        model.resize_token_embeddings(rows)
    if not adapter:
        return model.eval()
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(export)).eval()


def quantized(kind: str) -> dict[str, Any]:
    """Returns the options that load a base in the quantization that an adapter was trained with."""
    from transformers import BitsAndBytesConfig

    if kind == "none":
        return {}
    bits = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    nf4 = {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32} if kind == "nf4" else {}
    return {"quantization_config": BitsAndBytesConfig(**bits, **nf4), "device_map": {"": "cpu"}}


def loss(model: Any, run: FinishedRun, cache: Path, *, length: int = 96) -> float:
    """Returns the mean loss over the label tokens of the test rows, one row at a time, by the
    model's own logits."""
    renderer = Renderer.load(run.paths.model, length, added=parse(run.paths.run_config.read_bytes()).added_tokens)
    rows = token_cache.build(cache, "reload", run.paths.data("test"), ReadOptions("dataset.test", renderer, "fail"))
    total, count = 0.0, 0
    for index in range(len(rows.lengths)):
        ids, loss_mask = rows.example(index)
        tokens, source = torch.tensor(ids.astype("int64")), int(rows.sources[index])
        with torch.no_grad():
            if source:
                labels = tokens[source:]
                logits = model(input_ids=tokens[None, :source], labels=labels[None], use_cache=False).logits[0]
                row_sum = functional.cross_entropy(logits.float(), labels, reduction="sum")
                count += len(labels)
            else:
                labeled = torch.tensor(loss_mask.nonzero()[0])
                logits = model(input_ids=tokens[None], attention_mask=torch.ones_like(tokens[None])).logits[0]
                row_sum = functional.cross_entropy(logits[labeled - 1].float(), tokens[labeled], reduction="sum")
                count += len(labeled)
        total += float(row_sum)
    return total / count
