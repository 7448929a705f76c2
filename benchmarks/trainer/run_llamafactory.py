"""Measures LLaMA-Factory's supervised fine-tuning through its own entry point.

It runs in LLaMA-Factory's own environment and has the same interface as `run_trl.py`. The rows use
its `empty` template, so that their text is the same as in the other systems.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DISABLE_VERSION_CHECK", "1")

import contextlib

import llamafactory
import llamafactory.train.sft.workflow as workflow
import peft
import torch
import transformers
from llamafactory.train.tuner import run_exp
from recorder import Enough, Recorder, Window, answer_all


class Measured(workflow.CustomSeq2SeqTrainer):  # type: ignore[misc]
    """The original trainer, which also records its micro-batches."""

    recorder: Recorder
    last: Any = None

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        Measured.last = self

    def training_step(self, model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
        Measured.recorder.counted(inputs)
        loss = super().training_step(model, inputs, *arguments, **named)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        Measured.recorder.done()
        return loss


workflow.CustomSeq2SeqTrainer = Measured


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    versions = {m.__name__: str(m.__version__) for m in (torch, transformers, peft)}
    versions["llamafactory"] = str(getattr(llamafactory, "__version__", ""))
    answer_all(request, sys.argv[2], lambda config: _measure(request, config), versions)


def _measure(request: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    micro = config["micro_batch"]
    accumulation = max(1, request["global_batch"] // micro)
    Measured.recorder = Recorder(Window(config["warm_up"], config["seconds"], accumulation, config.get("least", 2)))
    end = transformers.AutoTokenizer.from_pretrained(request["model"]).eos_token
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [{"prompt": row["prompt"], "response": row["completion"] + end} for row in request["rows"]]
        (folder / "rows.json").write_text(json.dumps(rows))
        (folder / "dataset_info.json").write_text(
            json.dumps({"rows": {"file_name": "rows.json", "columns": {"prompt": "prompt", "response": "response"}}})
        )
        arguments = {
            "stage": "sft",
            "do_train": True,
            "model_name_or_path": request["model"],
            "finetuning_type": "lora",
            "lora_rank": 16,
            "lora_alpha": 32,
            "lora_dropout": request["dropout"],
            "lora_target": "q_proj,v_proj",
            "dataset_dir": name,
            "dataset": "rows",
            "template": "empty",
            "cutoff_len": request["longest"],
            "overwrite_cache": True,
            "output_dir": str(folder / "out"),
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": accumulation,
            "learning_rate": request["learning_rate"],
            "lr_scheduler_type": "constant",
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "max_steps": config.get("max_steps", 10_000),
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "seed": 42,
            "disable_shuffling": True,
            "use_cpu": request["device"] == "cpu",
            "bf16": config["autocast"],
            "flash_attn": "sdpa",
            "disable_gradient_checkpointing": True,
        }
        with contextlib.suppress(Enough):
            run_exp(arguments)
    trainer = Measured.last
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = {str(p.dtype).removeprefix("torch.") for p in trainer.model.parameters()}
    dtype = f"{'+'.join(sorted(weights))}{' autocast bf16' if trainer.args.bf16 else ''}"
    return {"losses": losses, "dtype": dtype, **Measured.recorder.result()}


if __name__ == "__main__":
    main()
