"""The merged model is the one that PEFT merges, in the format of the base's files, and a result is
loaded and compared before the run succeeds."""

from __future__ import annotations

import json
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from finetune_api.messages import events
from finetune_api.messages.run import parse
from finetune_trainer.errors import RunError
from finetune_trainer.model.result import adapter_merge, export_check
from finetune_trainer.reporting.event_writer import EventWriter
from testkit import tiny_families
from testkit.rows import pairs
from trainer.support.forked_ranks import exit_code_in_a_fork
from trainer.support.rank_runs import FinishedRun, Job, RunningRanks, finish_all, prepare

_CPU = torch.device("cpu")
_LINEAR = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> dict[str, FinishedRun]:
    """Returns runs whose adapters training has changed a lot, merged too: in one process, and with
    sharded weights in two."""
    root = tmp_path_factory.mktemp("outputs")
    training = {"max_steps": 4, "learning_rate": 0.05}

    def job(name: str, model: str, targets: list[str], **options: Any) -> Job:
        return prepare(
            root / name,
            models[model],
            pairs(12),
            training=training,
            merge=True,
            lora={"target_modules": tuple(targets)},
            **options,
        )

    with_images = tiny_families.tiny_gemma3_multimodal(root / "with-images")

    def of_images(name: str, init: str) -> Job:
        lora = {"target_modules": ("all-linear",), "init": init}
        return prepare(root / name, with_images, pairs(12), training=training, merge=True, lora=lora)

    single = {
        "llama": job("llama", "llama", _LINEAR),
        "gpt2": job("gpt2", "gpt2", ["c_attn"]),
        "t5": job("t5", "t5", ["q", "v"]),
        "bf16": job("bf16", "qwen2", _LINEAR, dtype="bfloat16"),
        "images, PiSSA": of_images("images-pissa", "pissa"),
        "images, OLoRA": of_images("images-olora", "olora"),
        "full": prepare(root / "full", models["llama"], pairs(12), full=True, training={"max_steps": 2}),
    }
    sharded = {
        "zero3": job("zero3", "llama", _LINEAR, world=2, strategy="zero3"),
        "fsdp": job("fsdp", "llama", _LINEAR, world=2, strategy="fsdp"),
    }
    finished = dict(zip(single, finish_all(list(single.values())), strict=True))
    return {**finished, **dict(zip(sharded, finish_all(list(sharded.values())), strict=True))}


def _logits(model: Any, seq2seq: bool = False) -> torch.Tensor:
    ids = torch.arange(10, 42).view(1, -1)
    with torch.no_grad():
        out = model.eval()(input_ids=ids, **({"decoder_input_ids": ids[:, :8]} if seq2seq else {}))
    return out.logits.float()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "zero3", "fsdp", "images, PiSSA", "images, OLoRA"])
def test_the_merged_model_is_the_adapter_on_its_base(name: str, runs: dict[str, FinishedRun]) -> None:
    paths, load = runs[name].paths, export_check._model
    probe = export_check.Probe({}, torch.zeros(1), torch.float32, None, name == "t5")
    adapted = PeftModel.from_pretrained(load(paths.model, torch.float32, probe), str(paths.export))
    merged = load(paths.export / "merged", torch.float32, probe)
    base = _logits(load(paths.model, torch.float32, probe), name == "t5")
    expected = _logits(adapted, name == "t5")
    torch.testing.assert_close(_logits(merged, name == "t5"), expected, atol=1e-4, rtol=1e-4)
    assert (expected - base).abs().max() > 0.01  # the tolerance is far below the adapter's effect
    state = adapted.merge_and_unload().state_dict()
    files = load_file(paths.export / "merged" / "model.safetensors")
    for key, tensor in (merged.state_dict() if "images" in name else files).items():  # older names in the files
        torch.testing.assert_close(tensor, state[key], atol=1e-6, rtol=1e-6)
    assert files.keys() == load_file(paths.model / "model.safetensors").keys()


@pytest.mark.parametrize("name", ["llama", "bf16"])
def test_the_merged_model_has_the_names_formats_and_ties_of_the_base(name: str, runs: dict[str, FinishedRun]) -> None:
    """Bug 19 again: a tied head that is written in addition to its embedding diverges from it in
    further training."""
    paths = runs[name].paths
    base, merged = (load_file(folder / "model.safetensors") for folder in (paths.model, paths.export / "merged"))
    assert {k: (t.shape, t.dtype) for k, t in merged.items()} == {k: (t.shape, t.dtype) for k, t in base.items()}
    changed = {key for key in base if not torch.equal(base[key], merged[key])}
    assert changed == {k for k in base if k.endswith(".weight") and k.split(".")[-2] in _LINEAR}
    assert json.loads((paths.export / "merged" / "config.json").read_text()) == json.loads(
        (paths.model / "config.json").read_text()
    )
    AutoTokenizer.from_pretrained(paths.export / "merged").apply_chat_template([{"role": "user", "content": "hi"}])
    card = (paths.export / "merged" / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "merged into the base" in card


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bf16", "full", "zero3", "fsdp"])
def test_a_result_is_loaded_and_compared_before_it_is_reported_as_saved(
    name: str, runs: dict[str, FinishedRun]
) -> None:
    decision = runs[name].decision("reload")
    assert decision.choice == "equal", decision.reason
    if name != "full":
        assert runs[name].decision("reloadMerged").choice == "equal"
    kinds = [type(event) for event in runs[name].events(events.DecisionEvent | events.SavedEvent)]  # type: ignore[arg-type]
    assert kinds[-1] is events.SavedEvent


@pytest.mark.parametrize("harm", ["adapter", "merged", "full"])
def test_a_result_that_differs_from_the_trained_model_fails_the_run(
    harm: str, runs: dict[str, FinishedRun], tmp_path: Path
) -> None:
    paths = runs["full" if harm == "full" else "llama"].paths
    run = parse(paths.run_config.read_bytes())
    export = tmp_path / "export"
    _copy(paths.export, export)
    result = export_check.WrittenResult(export, run, paths.model)
    probe = export_check.Probe(
        {"input_ids": torch.arange(10, 42).view(1, -1)}, torch.zeros(1), torch.float32, None, False
    )
    trained = (
        export_check._model(export, torch.float32, probe)
        if harm == "full"
        else export_check._adapted(result, _CPU, torch.float32, probe)
    )
    probe = replace(probe, logits=export_check._logits(trained, probe, _CPU))
    reporter = EventWriter(tmp_path / "events" / "rank-0.jsonl", 0)
    reporter.phase("saving")
    export_check.check(result, probe, reporter, _CPU)
    file = {"adapter": "adapter_model.safetensors", "merged": "merged/model.safetensors", "full": "model.safetensors"}
    tensors = load_file(export / file[harm])
    name = max(key for key in tensors if "down_proj" in key and "lora_A" not in key)
    save_file({**tensors, name: tensors[name] * 0.9}, export / file[harm], metadata={"format": "pt"})
    with pytest.raises(RunError, match="loaded again, differs from the trained one") as error:
        export_check.check(result, probe, reporter, _CPU)
    assert error.value.reason == "ResultMismatch"


# What is free on the host and the GPU, whether the base was quantized on the GPU, the device that
# is chosen and a part of the reason. A copy needs 13 bytes, and 4 of the host on the way to the
# GPU.
_RELOADS: dict[str, tuple[int, int, bool, str, str]] = {
    "the GPU has room, and the host only for tensors in flight": (4, 13, False, "gpu", "next to the trained one"),
    "the GPU has room, and the host has none": (3, 13, False, "nowhere", "on their way to the GPU"),
    "only the host has room": (13, 12, False, "cpu", "in the host's memory"),
    "neither has room": (12, 12, False, "nowhere", "raise resources.memory"),
    "quantized on a GPU that has room": (4, 13, True, "gpu", "next to the trained one"),
    "quantized on a GPU, and only the host has room": (99, 12, True, "nowhere", "the base was quantized on a GPU"),
}


@pytest.mark.parametrize(("host", "gpu", "needs_gpu", "device", "reason"), _RELOADS.values(), ids=_RELOADS)
def test_a_result_is_loaded_where_all_of_its_way_fits_and_its_base_is_quantized_alike(
    host: int, gpu: int, needs_gpu: bool, device: str, reason: str
) -> None:
    memory = export_check.Memory(needed=10, passing=4, host=host, gpu=gpu)
    choice = export_check.reload_device(memory, needs_gpu=needs_gpu)
    assert choice[0] == device
    assert reason in choice[1]


def test_a_second_copy_that_doesnt_fit_into_memory_is_reported_with_both_sizes() -> None:
    memory = export_check.Memory(needed=10**10, passing=0, host=12 * 10**9, gpu=0)
    assert "a second copy needs 13.0 GB, and 12.0 GB are free" in export_check.reload_device(memory)[1]


_WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "own alphas": {"alpha_pattern": {"q_proj": 32}, "rank_pattern": {"v_proj": 2}},
    "a trained head": {"modules_to_save": ["lm_head"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.mark.parametrize("way", _WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_each_kind_of_adapter_merges_as_peft_does(
    way: str, dtype: torch.dtype, models: dict[str, Path], tmp_path: Path
) -> None:
    base, adapter, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    model = AutoModelForCausalLM.from_pretrained(models["qwen2"], dtype=dtype)
    model.save_pretrained(base)
    config = LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": _LINEAR, "task_type": "CAUSAL_LM", **_WAYS[way]})
    adapted = get_peft_model(model, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(adapter, save_embedding_layers=False)
    adapter_merge.check(base, [name for name, p in adapted.named_parameters() if p.requires_grad])
    adapter_merge.write(merged, base, adapter, lambda: None, shard_bytes=20_000)
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for f in merged.glob("*.safetensors") for t in load_file(f).values()
    )
    loaded = AutoModelForCausalLM.from_pretrained(merged, dtype=dtype).state_dict()
    for key, tensor in adapted.merge_and_unload().state_dict().items():
        tolerance = 1e-6 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(
            loaded[key], tensor, atol=tolerance, rtol=tolerance, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_a_merged_model_with_added_tokens_has_more_rows(models: dict[str, Path], tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(models["llama"])
    base.resize_token_embeddings(310)
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    with torch.no_grad():
        adapted.get_input_embeddings().weight.add_(0.5)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    adapter_merge.write(tmp_path / "merged", models["llama"], tmp_path / "adapter", lambda: None)
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == len(merged.get_input_embeddings().weight) == 310
    torch.testing.assert_close(merged.get_input_embeddings().weight, adapted.get_input_embeddings().weight)


def test_an_adapter_that_cant_be_merged_is_reported_before_training(models: dict[str, Path], tmp_path: Path) -> None:
    job = prepare(
        tmp_path / "tied", models["llama"], pairs(8), merge=True, lora={"target_modules": ("lm_head", "q_proj")}
    )
    run = RunningRanks(job).wait()
    assert run.failure.reason == "InvalidConfig"
    assert (
        "output.merge: the base's files have no separate tensor for lm_head.weight (it is tied" in run.failure.message
    )
    assert not run.events(events.StepEvent)


def test_an_adapter_cant_be_merged_into_a_quantized_base(tmp_path: Path) -> None:
    save_file({"model.q_proj.weight": torch.zeros(4, 4, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(
        RunError, match=r"model\.q_proj\.weight is stored as I8, and an adapter can only be merged into F64"
    ):
        adapter_merge.check(tmp_path, ["base_model.model.model.q_proj.lora_A.default.weight"])
    with pytest.raises(RunError, match="the adapter's tensor prompt_embeddings is of an unknown kind"):
        adapter_merge._changes({"prompt_embeddings": torch.zeros(1)}, {}, adapter_merge.stored_tensors(tmp_path))


def _grow(folder: str) -> None:
    root, before = Path(folder), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    adapter_merge.write(root / "merged", root / "base", root / "adapter", lambda: None)
    growth_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    raise SystemExit(0 if growth_kib < 128 * 1024 else f"{growth_kib} KiB more")


def test_merging_loads_one_tensor_at_a_time(tmp_path: Path) -> None:
    """A base of 256 MiB with tensors of 4 MiB."""
    (tmp_path / "base").mkdir()
    (tmp_path / "adapter").mkdir()
    names = [f"model.layers.{n}.q_proj.weight" for n in range(64)]
    save_file({name: torch.zeros(1024, 1024) for name in names}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    prefixes = {f"base_model.model.{name.removesuffix('.weight')}": 0 for name in names[::2]}
    lora = {
        f"{prefix}.lora_{p}.weight": torch.ones(*shape)
        for prefix in prefixes
        for p, shape in (("A", (2, 1024)), ("B", (1024, 2)))
    }
    save_file(lora, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"lora_alpha": 4}')
    assert exit_code_in_a_fork(_grow, str(tmp_path)) == 0
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert [float(merged[name].mean()) for name in names[:2]] == [4.0, 0.0]


def _copy(source: Path, target: Path) -> None:
    import shutil

    shutil.copytree(source, target)
