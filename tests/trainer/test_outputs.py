"""The merged model is what PEFT merges, in the base's files' form; and what is written is loaded before it counts."""

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

from finetune_api import events
from finetune_api.run import parse
from finetune_trainer import merge, reload
from finetune_trainer.failure import Failed
from finetune_trainer.reporter import Reporter
from trainer.forked import ended_in_a_fork
from trainer.ranks import Ended, Job, Ranks, finish_all, pairs, prepare

_CPU = torch.device("cpu")
_LINEAR = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> dict[str, Ended]:
    """Adapters that training has moved far, merged too, in one process; and by split weights in two."""
    root = tmp_path_factory.mktemp("outputs")
    far = {"max_steps": 4, "learning_rate": 0.05}

    def job(name: str, model: str, targets: list[str], **how: Any) -> Job:
        return prepare(
            root / name,
            models[model],
            pairs(12),
            training=far,
            merge=True,
            lora={"target_modules": tuple(targets)},
            **how,
        )

    alone = {
        "llama": job("llama", "llama", _LINEAR),
        "gpt2": job("gpt2", "gpt2", ["c_attn"]),
        "t5": job("t5", "t5", ["q", "v"]),
        "bf16": job("bf16", "qwen2", _LINEAR, dtype="bfloat16"),
        "full": prepare(root / "full", models["llama"], pairs(12), full=True, training={"max_steps": 2}),
    }
    split = {
        "zero3": job("zero3", "llama", _LINEAR, world=2, strategy="zero3"),
        "fsdp": job("fsdp", "llama", _LINEAR, world=2, strategy="fsdp"),
    }
    ended = dict(zip(alone, finish_all(list(alone.values())), strict=True))
    return {**ended, **dict(zip(split, finish_all(list(split.values())), strict=True))}


def _logits(model: Any, seq2seq: bool = False) -> torch.Tensor:
    ids = torch.arange(10, 42).view(1, -1)
    with torch.no_grad():
        out = model.eval()(input_ids=ids, **({"decoder_input_ids": ids[:, :8]} if seq2seq else {}))
    return out.logits.float()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "zero3", "fsdp"])
def test_the_merged_model_is_the_adapter_on_its_base(name: str, done: dict[str, Ended]) -> None:
    paths, auto = done[name].paths, reload._model
    seen = reload.Probe({}, torch.zeros(1), torch.float32, None, name == "t5")
    adapted = PeftModel.from_pretrained(auto(paths.model, torch.float32, seen), str(paths.export))
    merged = auto(paths.export / "merged", torch.float32, seen)
    base = _logits(auto(paths.model, torch.float32, seen), name == "t5")
    wanted = _logits(adapted, name == "t5")
    torch.testing.assert_close(_logits(merged, name == "t5"), wanted, atol=1e-4, rtol=1e-4)
    assert (wanted - base).abs().max() > 0.01  # what was learnt isn't lost in the tolerance
    state = adapted.merge_and_unload().state_dict()
    for key, tensor in load_file(paths.export / "merged" / "model.safetensors").items():
        torch.testing.assert_close(tensor, state[key], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["llama", "bf16"])
def test_names_formats_and_ties_of_the_base_stay(name: str, done: dict[str, Ended]) -> None:
    """Bug 19 again: a tied head written beside its embedding goes its own way when somebody trains on."""
    paths = done[name].paths
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
def test_what_was_written_is_loaded_and_compared_before_it_counts(name: str, done: dict[str, Ended]) -> None:
    told = done[name].decision("reload")
    assert told.choice == "equal", told.reason
    if name != "full":
        assert done[name].decision("reloadMerged").choice == "equal"
    kinds = [type(event) for event in done[name].events(events.DecisionEvent | events.SavedEvent)]  # type: ignore[arg-type]
    assert kinds[-1] is events.SavedEvent


@pytest.mark.parametrize("harm", ["adapter", "merged", "full"])
def test_a_result_that_isnt_the_trained_one_is_no_success(harm: str, done: dict[str, Ended], tmp_path: Path) -> None:
    paths = done["full" if harm == "full" else "llama"].paths
    run = parse(paths.run_config.read_bytes())
    export = tmp_path / "export"
    _copy(paths.export, export)
    seen = reload.Probe({"input_ids": torch.arange(10, 42).view(1, -1)}, torch.zeros(1), torch.float32, None, False)
    trained = (
        reload._model(export, torch.float32, seen)
        if harm == "full"
        else reload._adapted(run, paths.model, export, torch.float32, seen)
    )
    seen = replace(seen, logits=reload._logits(trained, seen, _CPU))
    reporter = Reporter(tmp_path / "events" / "rank-0.jsonl", 0)
    reporter.phase("saving")
    reload.check(export, run, paths.model, seen, reporter, _CPU)
    file = {"adapter": "adapter_model.safetensors", "merged": "merged/model.safetensors", "full": "model.safetensors"}
    tensors = load_file(export / file[harm])
    name = max(key for key in tensors if "down_proj" in key and "lora_A" not in key)
    save_file({**tensors, name: tensors[name] * 0.9}, export / file[harm], metadata={"format": "pt"})
    with pytest.raises(Failed, match="loaded again, differs from the trained one") as error:
        reload.check(export, run, paths.model, seen, reporter, _CPU)
    assert error.value.reason == "ResultMismatch"


def test_where_a_second_copy_has_no_room_it_isnt_loaded_and_that_is_told() -> None:
    assert reload.where(10, host=0, gpu=13)[0] == "gpu"
    assert reload.where(10, host=13, gpu=12)[0] == "cpu"
    place, reason = reload.where(10**10, host=12 * 10**9, gpu=0)
    assert place == "nowhere"
    assert "a second copy needs 13.0 GB and 12.0 are free" in reason


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
    merge.check(base, [name for name, p in adapted.named_parameters() if p.requires_grad])
    merge.write(merged, base, adapter, lambda: None, shard_bytes=20_000)
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


def test_added_tokens_make_the_merged_model_grow(models: dict[str, Path], tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(models["llama"])
    base.resize_token_embeddings(310)
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    with torch.no_grad():
        adapted.get_input_embeddings().weight.add_(0.5)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merge.write(tmp_path / "merged", models["llama"], tmp_path / "adapter", lambda: None)
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == len(merged.get_input_embeddings().weight) == 310
    torch.testing.assert_close(merged.get_input_embeddings().weight, adapted.get_input_embeddings().weight)


def test_what_cant_be_merged_is_told_before_training(models: dict[str, Path], tmp_path: Path) -> None:
    job = prepare(
        tmp_path / "tied", models["llama"], pairs(8), merge=True, lora={"target_modules": ("lm_head", "q_proj")}
    )
    ended = Ranks(job).wait()
    assert ended.failure.reason == "InvalidConfig"
    assert (
        "output.merge: the base's files have no tensor of its own for lm_head.weight (it is tied"
        in ended.failure.message
    )
    assert not ended.events(events.StepEvent)


def test_a_quantised_base_is_no_place_to_merge_into(tmp_path: Path) -> None:
    save_file({"model.q_proj.weight": torch.zeros(4, 4, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(
        Failed, match=r"model\.q_proj\.weight is stored as I8, and an adapter can only be merged into F64"
    ):
        merge.check(tmp_path, ["base_model.model.model.q_proj.lora_A.default.weight"])
    with pytest.raises(Failed, match="nothing is known of the adapter's tensor prompt_embeddings"):
        merge._changes({"prompt_embeddings": torch.zeros(1)}, {}, merge.stored(tmp_path))


def _grow(folder: str) -> None:
    root, before = Path(folder), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    merge.write(root / "merged", root / "base", root / "adapter", lambda: None)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    raise SystemExit(0 if grown < 128 * 1024 else f"{grown} KiB more")


def test_merging_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    """A base of 256 MiB with tensors of 4 MiB."""
    (tmp_path / "base").mkdir()
    (tmp_path / "adapter").mkdir()
    names = [f"model.layers.{n}.q_proj.weight" for n in range(64)]
    save_file({name: torch.zeros(1024, 1024) for name in names}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    parts = {f"base_model.model.{name.removesuffix('.weight')}": 0 for name in names[::2]}
    lora = {
        f"{at}.lora_{p}.weight": torch.ones(*shape) for at in parts for p, shape in (("A", (2, 1024)), ("B", (1024, 2)))
    }
    save_file(lora, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"lora_alpha": 4}')
    assert ended_in_a_fork(_grow, str(tmp_path)) == 0
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert [float(merged[name].mean()) for name in names[:2]] == [4.0, 0.0]


def _copy(source: Path, target: Path) -> None:
    import shutil

    shutil.copytree(source, target)
