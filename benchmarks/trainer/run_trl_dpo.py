"""TRL's DPO loss, figures and gradients of one batch of pairs. Run by `check_dpo` in TRL's own environment."""

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
    asked = json.loads(request.read_text())
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(asked, folder)
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        slopes = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
        logged = next(values for values in trainer._metrics.values() if values)  # of the mode that it was in
        figures = {name: values[-1] for name, values in logged.items()}
    save_file(slopes, answer.with_suffix(".safetensors"))
    told = {"loss": float(loss.detach()), "tokens": int(batch["completion_mask"].sum()), "figures": figures}
    answer.write_text(json.dumps(told))


def _trainer(asked: dict[str, Any], folder: str) -> DPOTrainer:
    """With its reference made from the base, and the tuned weights put in after that."""
    lora = asked["method"] == "lora"
    config = None
    if lora:
        config = LoraConfig.from_pretrained(asked["tuned"])
        config.inference_mode = False
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.float32),
        args=DPOConfig(
            output_dir=folder, per_device_train_batch_size=len(asked["rows"]), beta=asked["beta"], use_cpu=True,
            max_length=None, gradient_checkpointing=False, bf16=False, report_to="none",
        ),
        train_dataset=Dataset.from_list(asked["rows"]),
        processing_class=AutoTokenizer.from_pretrained(asked["model"]),
        peft_config=config,
    )  # fmt: skip
    if lora:
        set_peft_model_state_dict(trainer.model, load_file(Path(asked["tuned"]) / "adapter_model.safetensors"))
    else:
        tuned = AutoModelForCausalLM.from_pretrained(asked["tuned"], dtype=torch.float32)
        trainer.model.load_state_dict(tuned.state_dict())
    return trainer


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
