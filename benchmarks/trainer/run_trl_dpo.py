"""Writes TRL's DPO loss, figures and gradients for one batch of pairs, in TRL's environment."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer


def main(request: Path, answer: Path) -> None:
    """Reads `request` (JSON); writes `answer` (JSON), and gradients next to it as .safetensors."""
    task = json.loads(request.read_text())
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(task, folder)
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
        logged = next(values for values in trainer._metrics.values() if values)  # of its current mode
        figures = {name: values[-1] for name, values in logged.items()}
    save_file(gradients, answer.with_suffix(".safetensors"))
    result = {"loss": float(loss.detach()), "tokens": int(batch["completion_mask"].sum()), "figures": figures}
    answer.write_text(json.dumps(result))


def _trainer(task: dict[str, Any], folder: str) -> DPOTrainer:
    """Returns a trainer whose reference is the base model, with the tuned weights loaded later."""
    lora = task["method"] == "lora"
    config = None
    if lora:
        config = LoraConfig.from_pretrained(task["tuned"])
        config.inference_mode = False
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32),
        args=DPOConfig(
            output_dir=folder, per_device_train_batch_size=len(task["rows"]), beta=task["beta"], use_cpu=True,
            max_length=None, gradient_checkpointing=False, bf16=False, report_to="none",
        ),
        train_dataset=Dataset.from_list(task["rows"]),
        processing_class=AutoTokenizer.from_pretrained(task["model"]),
        peft_config=config,
    )  # fmt: skip
    if lora:
        set_peft_model_state_dict(trainer.model, load_file(Path(task["tuned"]) / "adapter_model.safetensors"))
    else:
        tuned = AutoModelForCausalLM.from_pretrained(task["tuned"], dtype=torch.float32)
        trainer.model.load_state_dict(tuned.state_dict())
    return trainer


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
