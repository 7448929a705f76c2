"""Transformers' own Trainer on several processes, as an oracle for the error in its T5 loss. It
runs in forks."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Row = Mapping[str, Sequence[int]]


def gradient(model: Path, rows: Sequence[Row], folder: Path, *, ranks: int, accumulation: int) -> dict[str, Tensor]:
    """Returns the gradient of the one step that all rows make, before its optimizer: the mean over
    the ranks, as DDP computes it."""
    from trainer.support import forked_ranks

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(parents=True)
    micro_batch_size = len(rows) // (ranks * accumulation)
    arguments = [
        (str(model), rows, str(folder), rank, ranks, port, accumulation, micro_batch_size) for rank in range(ranks)
    ]
    assert forked_ranks.exit_codes_in_forks(_train, arguments) == [0] * ranks
    return load_file(folder / "gradient.safetensors")


def _train(
    model: str,
    rows: Sequence[Row],
    folder: str,
    rank: int,
    ranks: int,
    port: int,
    accumulation: int,
    micro_batch_size: int,
) -> None:
    if ranks > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
    from transformers import AutoModelForSeq2SeqLM, Trainer, TrainerCallback, TrainingArguments

    network = AutoModelForSeq2SeqLM.from_pretrained(model)
    gradients: dict[str, Tensor] = {}

    class RecordGradients(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            gradients.update({name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None})

    Trainer(
        model=network,
        args=TrainingArguments(
            output_dir=folder, max_steps=1,
            per_device_train_batch_size=micro_batch_size, gradient_accumulation_steps=accumulation, max_grad_norm=0.0,
            use_cpu=True, report_to="none", save_strategy="no", remove_unused_columns=False, disable_tqdm=True,
            ddp_find_unused_parameters=False,
        ),
        train_dataset=list(rows),
        data_collator=_collate,
        callbacks=[RecordGradients()],
    ).train()  # fmt: skip
    if ranks > 1:
        assert torch.distributed.get_world_size() == ranks
    if rank == 0:
        save_file({name: tensor.contiguous() for name, tensor in gradients.items()}, f"{folder}/gradient.safetensors")


def _collate(rows: list[Row]) -> dict[str, Tensor]:
    def padded(key: str, value: int) -> Tensor:
        longest = max(len(row[key]) for row in rows)
        return torch.tensor([[*row[key], *[value] * (longest - len(row[key]))] for row in rows])

    return {key: padded(key, -100 if key == "labels" else 0) for key in rows[0]}
