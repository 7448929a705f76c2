"""A result as anybody would load it: Transformers and PEFT alone, on the base as it was. Used to compare losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from finetune_api.run import parse
from finetune_trainer import tokens
from finetune_trainer.render import Renderer
from trainer.ranks import Ended


def result(ended: Ended, **how: Any) -> Any:
    """The model that was written. `how` goes to the loading of the base."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    export = ended.paths.export
    adapter = (export / "adapter_config.json").is_file()
    base = str(ended.paths.model.resolve()) if adapter else str(export)
    kind = AutoModelForSeq2SeqLM if AutoConfig.from_pretrained(base).is_encoder_decoder else AutoModelForCausalLM
    added = parse(ended.paths.run_config.read_bytes()).added_tokens
    model = kind.from_pretrained(base, **{"dtype": torch.float32, **how})
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # a bitsandbytes' layout for weights of 64 columns and more
    if added:  # as for any tokenizer that has grown: the tokenizer comes with the adapter
        rows = max(len(AutoTokenizer.from_pretrained(str(export))), model.get_input_embeddings().num_embeddings)
        model.resize_token_embeddings(rows)
    if not adapter:
        return model.eval()
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(export)).eval()


def quantized(kind: str) -> dict[str, Any]:
    """How a base is loaded that an adapter was trained beside."""
    from transformers import BitsAndBytesConfig

    if kind == "none":
        return {}
    few = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    double = {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32} if kind == "nf4" else {}
    return {"quantization_config": BitsAndBytesConfig(**few, **double), "device_map": {"": "cpu"}}


def loss(model: Any, ended: Ended, cache: Path, *, length: int = 96) -> float:
    """Mean over the learnt tokens of the test rows, one row at a time, by the model's own logits."""
    renderer = Renderer.load(ended.paths.model, length, added=parse(ended.paths.run_config.read_bytes()).added_tokens)
    rows = tokens.build(
        cache, "reload", ended.paths.data("test"), "dataset.test", format="auto", on_invalid="fail", renderer=renderer
    )
    total, count = 0.0, 0
    for index in range(len(rows.lengths)):
        ids, learnt = rows.example(index)
        whole, source = torch.tensor(ids.astype("int64")), int(rows.sources[index])
        with torch.no_grad():
            if source:
                labels = whole[source:]
                logits = model(input_ids=whole[None, :source], labels=labels[None], use_cache=False).logits[0]
                sum_ = functional.cross_entropy(logits.float(), labels, reduction="sum")
                count += len(labels)
            else:
                at = torch.tensor(learnt.nonzero()[0])
                logits = model(input_ids=whole[None], attention_mask=torch.ones_like(whole[None])).logits[0]
                sum_ = functional.cross_entropy(logits[at - 1].float(), whole[at], reduction="sum")
                count += len(at)
        total += float(sum_)
    return total / count
