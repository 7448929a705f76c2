"""Times unmodified Transformers and PEFT, with or without Liger Kernel, on rows of equal length.

`python -m benchmarks.gpu.peer MODEL --device cuda --rows 8 --tokens 776 [--liger]` trains LoRA on q
and v in bfloat16 with sdpa, and prints its figures as JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from benchmarks.gpu import timing


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.peer", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--liger", action="store_true")
    options = parser.parse_args()
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16, attn_implementation="sdpa")
    base.to(options.device)
    if options.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=base)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4, fused=True)
    ids = torch.randint(6, 250, (options.rows, options.tokens), device=options.device)

    def step() -> None:
        with torch.autocast(options.device, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    began = time.perf_counter()
    duration = timing.seconds(step, options.device, budget=4.0)
    peak = timing.peak_bytes(step, options.device)
    figures = {
        "tokens_per_second": ids.numel() / duration,
        "peak_bytes": torch.cuda.max_memory_allocated() if options.device == "cuda" else peak,
        "seconds": time.perf_counter() - began,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
