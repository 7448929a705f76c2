"""Compiled layers train as uncompiled ones do, and a resumed run ends with the same bytes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from finetune_api.messages import events
from finetune_trainer.data.batching import packed_layout
from finetune_trainer.kernels import attention_cpu, attention_cuda, packed_attention, packed_row
from finetune_trainer.kernels.cuda import modules, toolchain
from finetune_trainer.model import activation_checkpointing, compilation, loading
from finetune_trainer.model.loading import LoadedModel
from finetune_trainer.parallel.estimate.recomputation import EVERYTHING, NOTHING, SELECTIVE, Recomputation
from testkit.rows import pairs
from trainer.support.rank_runs import Job, finish_all, prepare

_CONDITIONS = compilation.Conditions(device="cpu", half=True, strategy="ddp", recompute=False, packed=True)
_GPU = {"device": "cuda"}
# A row of four examples, one of which begins as another one does, and so on.
_LAYOUTS = (
    ([40, 30], [0, 0]), ([33, 21, 50], [0, 0, 0]), ([64], [0]), ([10, 20, 30, 40], [0, 5, 5, 5]), ([90, 6], [0, 3]),
    ([31, 33, 30], [0, 0, 0]), ([77, 5, 9], [0, 0, 0]), ([8] * 12, [0] * 12), ([60, 60], [0, 50]), ([17, 80], [0, 0]),
    ([100], [0]), ([50, 49], [0, 0]),
)  # fmt: skip


@pytest.mark.parametrize(
    ("option", "changes", "before", "choice", "reason"),
    [
        ("auto", {"half": False}, None, False, "no gain was measured"),
        ("auto", {**_GPU, "half": False}, None, False, "no gain was measured"),
        ("always", {"half": False}, None, True, "set by training.compile"),
        ("never", {}, True, False, "set by training.compile"),
        ("auto", {}, True, True, "the checkpoint was computed this way"),
        ("always", {}, False, False, "the checkpoint was computed this way"),
        ("always", {"strategy": "fsdp"}, None, False, "sharded over the ranks are compiled on GPUs only"),
        ("always", {"strategy": "zero2"}, None, False, "DeepSpeed runs (zero2)"),
        ("always", {**_GPU, "strategy": "zero3"}, None, False, "DeepSpeed runs (zero3)"),
        ("always", {"shared": True}, None, False, "exchange parts of rows with other processes"),
        ("auto", {**_GPU, "shared": True}, None, False, "exchange parts of rows with other processes"),
        ("always", {"recompute": True}, None, False, "recomputed are compiled on GPUs only"),
        ("always", {"packed": False}, None, False, "without padding"),
        ("always", {**_GPU, "packed": False}, None, False, "without padding"),
        ("always", {**_GPU, "strategy": "fsdp", "recompute": True}, None, True, "set by training.compile"),
        ("auto", _GPU, False, False, "the checkpoint was computed this way"),
    ],
)
def test_compilation_is_decided_before_the_first_step(
    option: str, changes: dict[str, object], before: bool | None, choice: bool, reason: str
) -> None:
    """A GPU's own conditions need a compiler and Python.h, which this machine has."""
    assert toolchain.missing() == ""
    conditions = compilation.Conditions(**{**_CONDITIONS.__dict__, **changes})
    decision = compilation.choice(option, conditions, before)  # type: ignore[arg-type]
    assert decision is not None
    assert (decision[0], reason in decision[1]) == (choice, True), decision


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_only_a_long_run_in_bfloat16_depends_on_its_duration(device: str) -> None:
    conditions = compilation.Conditions(**{**_CONDITIONS.__dict__, "device": device})
    assert compilation.choice("auto", conditions, None) is None


@pytest.mark.parametrize(
    ("seconds", "device", "pays", "reason"),
    [
        (3600, "cpu", True, "training takes about 3600 s, compiling 15 s to save about 288 s"),
        (300, "cpu", False, "training takes about 300 s, compiling 15 s to save about 24 s"),
        (3600, "cuda", True, "training takes about 3600 s, compiling 90 s to save about 288 s"),
        (3000, "cuda", False, "training takes about 3000 s, compiling 90 s to save about 240 s"),
    ],
)
def test_a_run_that_gains_from_compilation_must_be_long_enough(
    seconds: float, device: str, pays: bool, reason: str
) -> None:
    assert compilation.pays(seconds, device) == (pays, reason)


def test_a_gpus_speed_is_assumed_and_a_cpus_is_measured() -> None:
    """8B, LoRA, 100 million tokens: about six hours at half of the assumed speed."""
    assert compilation.assumed_gflops("cpu") == 0
    seconds = compilation.training_seconds(1e8, 8 * 10**9, lora=True, gflops=compilation.assumed_gflops("cuda"))
    assert seconds == pytest.approx(21333, rel=1e-3)


@pytest.mark.parametrize("fused", [False, True], ids=["own modules", "fused"])
@pytest.mark.parametrize("recompute", [NOTHING, SELECTIVE, EVERYTHING], ids=["stored", "selective", "recomputed"])
def test_on_gpus_all_layouts_share_a_program(tmp_path: Path, fused: bool, recompute: Recomputation) -> None:
    """Twelve layouts, some with shared prefixes, on the branches of a GPU. The kernel of attention,
    which needs one, is replaced by a fake that returns tensors of its shapes."""
    packed_attention.register()
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, attn_implementation=packed_attention.NAME,
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).train()
    rotary = mock.patch.object(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)
    with fake_flash_attention(), rotary:
        if fused:
            assert modules.replace_modules(model, torch.device("cpu")).sums == 2
        if recompute:
            loaded = LoadedModel(model, model, False, "")
            activation_checkpointing.enable(loaded, recompute.share, keeps_attention=recompute.keeps_attention)
        compilation.compile_layers(loading.layers(model), tmp_path, backend="aot_eager")
        for lengths, shared in _LAYOUTS:
            row = packed_layout.pack(lengths, shared).layout
            ids = torch.zeros((1, row.size), dtype=torch.int64)
            with packed_row.computing(row), torch.autocast("cpu", torch.bfloat16):
                model(input_ids=ids, position_ids=ids, use_cache=False).logits.float().sum().backward()
    programs = compilation.Programs.of_this_process()
    assert programs.uncompiled == 0
    assert 1 <= programs.compiled <= 2
    assert programs.decision()[0] == f"{programs.compiled} programs"


@contextmanager
def fake_flash_attention() -> Iterator[None]:
    """Makes attention take the branches of a GPU on the CPU."""

    def attend(query: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        by_token = query.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        return by_token, torch.zeros(query.shape[1], query.shape[2])

    def attend_backward(
        gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any
    ) -> tuple[torch.Tensor, ...]:
        by_token = (torch.zeros_like(tensor.transpose(1, 2)).transpose(1, 2) for tensor in (query, key, value))
        return (*by_token, query.new_empty(0))

    def no(*_: Any) -> bool:  # a mock can't be traced
        return False

    def yes(*_: Any) -> bool:
        return True

    with mock.patch.object(attention_cpu, "supports", no), mock.patch.object(attention_cuda, "supports", yes):
        attention_cuda.attend.register_kernel("cpu")(attend)
        attention_cuda.attend_backward.register_kernel("cpu")(attend_backward)
        yield


def test_too_many_programs_are_reported(tmp_path: Path) -> None:
    layer = torch.nn.Linear(4, 4)
    layer.forward = lambda values, kind: values * len(kind)  # type: ignore[method-assign]
    compilation.compile_layers([layer], tmp_path, backend="eager")
    for number in range(12):
        layer(torch.ones(2, 4), "x" * number)
    choice, reason = compilation.Programs.of_this_process().decision()
    assert choice == "8 programs, and some layers run uncompiled"
    assert "attempts to compile one failed" in reason
    compilation.stop_compiling([layer])
    assert layer(torch.ones(2, 4), "xx").sum() == 16


@dataclass(frozen=True)
class BrokenCompiler:
    """Makes the rank's C++ compiler fail."""

    def install(self) -> None:
        torch._inductor.config.cpp.cxx = ("/bin/false",)


def test_layers_that_cant_be_compiled_run_uncompiled_and_the_decision_says_so(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    def job(name: str, option: str) -> Job:
        return prepare(tmp_path / name, models["llama"], pairs(12), training={"compile": option, "max_steps": 3})

    (plain,) = finish_all([job("plain", "never")])
    (broken,) = finish_all([job("broken", "always")], faults={0: BrokenCompiler()})
    decision = broken.decision("compile")
    assert decision.choice == "off"
    assert "the first micro-batch can't be compiled" in decision.reason
    assert broken.losses == pytest.approx(plain.losses, abs=1e-5)


def test_losses_are_the_same_and_a_resumed_run_ends_with_the_same_bytes(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    """The resumed run is a separate process, which traces everything again. It finds the programs
    of the first run on its disk, as in a pod that was restarted, and needs no others."""

    def job(name: str, option: str, resume: Path | None = None) -> Job:
        return prepare(
            tmp_path / name, models["llama"], pairs(30), lora={"dropout": 0.1}, every=3, training={"compile": option},
            resume=resume, **({} if resume else {"test": pairs(2, 1), "samples": 1}),
        )  # fmt: skip

    plain, compiled = finish_all([job("plain", "never"), job("compiled", "always")])
    job_again = job("resumed", "always", compiled.paths.checkpoints / "step-3")
    shutil.copytree(compiled.paths.compiled, job_again.paths.compiled)
    resumed = job_again.finish().check()
    assert compiled.decision("compile").choice == "on"
    # The first layer has one of its own, since the embeddings are frozen and need no gradient.
    assert compiled.decision("compiledPrograms").choice == "2 programs"
    programs, later = ({path.name for path in run.paths.compiled.rglob("*.cpp")} for run in (compiled, resumed))
    assert programs
    assert later == programs
    assert plain.decision("compile").choice == "off"
    assert plain.decision("fused").choice == "on"
    assert all(event.topic != "fused" for event in compiled.events(events.DecisionEvent))
    assert compiled.losses == pytest.approx(plain.losses, abs=1e-5)
    assert resumed.losses == compiled.losses[3:]
    name = "adapter_model.safetensors"
    assert (resumed.paths.export / name).read_bytes() == (compiled.paths.export / name).read_bytes()
