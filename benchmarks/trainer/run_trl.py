"""Measures TRL's SFTTrainer on one data set with one or more configurations, in TRL's environment.

It reads a request (JSON file: model, rows, device, configurations) and appends one JSON line per
configuration to the answer file. If a configuration fails, its line has `error`, and the next one
is measured.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import contextlib

import datasets
import peft
import torch
import transformers
import trl
from recorder import Enough, Recorder, Window, answer_all

transformers.logging.set_verbosity_error()


class Measured(trl.SFTTrainer):  # type: ignore[misc]
    """The original trainer, which also records its micro-batches."""

    recorder: Recorder

    def training_step(self, model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
        self.recorder.counted(inputs)
        loss = super().training_step(model, inputs, *arguments, **named)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.recorder.done()
        return loss


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    base: dict[str, Any] = {}
    answer_all(
        request,
        sys.argv[2],
        lambda config: _measure(request, config, base),
        {m.__name__: m.__version__ for m in (torch, transformers, trl, peft)},
    )


def _measure(request: dict[str, Any], config: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    rows = datasets.Dataset.from_list(_ordered(request["rows"], config))
    dtype = config.get("weights", "float32")
    if base.get("dtype") != dtype:  # one model per dtype, reused by configurations
        base.clear()
        gc.collect()
        base["model"] = transformers.AutoModelForCausalLM.from_pretrained(
            request["model"], dtype=getattr(torch, dtype), attn_implementation=config.get("attention", "sdpa")
        )
        base["dtype"] = dtype
    tokenizer = transformers.AutoTokenizer.from_pretrained(request["model"])
    micro = config["micro_batch"]
    accumulation = max(1, request["global_batch"] // (micro * config.get("rows_per_batch", 1)))
    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "output_dir": folder,
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": accumulation,
            "max_steps": config.get("max_steps", 10_000),
            "save_strategy": "no",
            "report_to": "none",
            "logging_steps": 1,
            "disable_tqdm": True,
            "use_cpu": request["device"] == "cpu",
            "max_length": request["longest"],
            # The same training recipe for every system.
            "learning_rate": request["learning_rate"],
            "lr_scheduler_type": "constant",
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "seed": 42,
            "train_sampling_strategy": "sequential",  # the file's order, which is random
            **config["arguments"],
        }
        known = {f.name for f in dataclasses.fields(trl.SFTConfig)}
        if unknown := set(arguments) - known:
            raise ValueError(f"this TRL has no {sorted(unknown)}")
        lora = peft.LoraConfig(
            r=16, lora_alpha=32, lora_dropout=request["dropout"], target_modules=["q_proj", "v_proj"],
            task_type="CAUSAL_LM",
        )  # fmt: skip
        torch.manual_seed(42)
        trainer = Measured(
            model=base["model"],
            args=trl.SFTConfig(**arguments),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=lora,
        )
        window = Window(config["warm_up"], config["seconds"], accumulation, config.get("least", 2))
        trainer.recorder = Recorder(window)
        with contextlib.suppress(Enough):
            trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        base["model"] = trainer.model.unload() if hasattr(trainer.model, "unload") else trainer.model
        result = {"losses": losses, "dtype": _dtypes(trainer)}
        if config.get("curve"):
            return result
        return result | trainer.recorder.result()


def _dtypes(trainer: Any) -> str:
    weights = {str(p.dtype).removeprefix("torch.") for p in trainer.model.parameters()}
    return f"{'+'.join(sorted(weights))}{' autocast bf16' if trainer.args.bf16 else ''}"


def _ordered(rows: list[dict[str, str]], config: dict[str, Any]) -> list[dict[str, str]]:
    """Returns the rows in their order or, if `grouped`, grouped by length.

    Like the length-grouped sampler, it sorts them within 50 batches. Then it shuffles complete
    micro-batches, because that sampler begins each group with its longest rows, and a window of
    half a minute would contain only those.
    """
    if not config.get("grouped"):
        return rows
    micro = config["micro_batch"]
    group = micro * 50
    batches = []
    for begin in range(0, len(rows) - group + 1, group):
        group_rows = sorted(rows[begin : begin + group], key=lambda row: -len(row["prompt"] + row["completion"]))
        batches += [group_rows[i : i + micro] for i in range(0, group, micro)]
    random.Random(0).shuffle(batches)
    return [row for batch in batches for row in batch]


if __name__ == "__main__":
    main()
