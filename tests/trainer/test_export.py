"""What is written loads as it is, without a network, and gives the losses that were reported for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune_api import events
from finetune_trainer import card, export
from finetune_trainer.model import Loaded
from finetune_trainer.render import Renderer
from trainer.ranks import Ended, finish_all, pairs, prepare

_HELD_OUT = pairs(9, 1)
_STEPS = 30

# Run by a fresh Python that can't reach a hub: loads bases and results, prints the mean losses of the held-out rows.
_LOAD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
def loss(base, result, rows):
    if base:
        from peft import PeftModel
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), result)
    else:
        model = AutoModelForCausalLM.from_pretrained(result, dtype=torch.float32)
    AutoTokenizer.from_pretrained(result).apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    total, count = 0.0, 0
    for ids, learnt in rows:
        logits = model.eval()(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for at in range(1, len(ids)):
            if learnt[at]:
                total, count = total - float(logits[at - 1, ids[at]]), count + 1
    return total / count
print(json.dumps([loss(*asked) for asked in json.load(open(sys.argv[1]))]))
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> dict[str, Ended]:
    """A learning rate that soon does harm, so that the best weights aren't the last ones."""
    root = tmp_path_factory.mktemp("export")
    harmful = {"max_steps": _STEPS, "learning_rate": 0.3, "eval_every_steps": 1, "max_grad_norm": 0.0}
    common: dict[str, Any] = {"validation": _HELD_OUT, "test": _HELD_OUT}
    jobs = {
        "lora": prepare(root / "lora", models["llama"], pairs(6), training=harmful, **common),
        "full": prepare(
            root / "full", models["llama"], pairs(20), full=True, training={"learning_rate": 1e-3}, **common
        ),
        "last": prepare(root / "last", models["llama"], pairs(6), training={**harmful, "keep_best": False}, **common),
        "early": prepare(
            root / "early", models["llama"], pairs(6), training={**harmful, "early_stopping": {"patience": 2}}, **common
        ),
        "bf16": prepare(root / "bf16", models["llama"], pairs(6), dtype="bfloat16", training=harmful, **common),
    }
    return dict(zip(jobs, finish_all(list(jobs.values())), strict=True))


@pytest.fixture(scope="module")
def loaded_losses(done: dict[str, Ended], tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """By job, of a LoRA and a whole result."""
    from finetune_trainer import rows

    home, asked = tmp_path_factory.mktemp("home"), []
    for ended, base in ((done["lora"], str(done["lora"].paths.model)), (done["full"], "")):
        renderer = Renderer.load(ended.paths.model, 96)
        examples = [renderer.render(row) for row in rows.read(ended.paths.data("test")).rows]
        listed = [[list(e.ids), list(e.learnt)] for e in examples]  # type: ignore[union-attr]
        asked.append([base, str(ended.paths.export), listed])
    (home / "asked.json").write_text(json.dumps(asked))
    out = subprocess.run(
        [sys.executable, "-c", _LOAD, str(home / "asked.json")],
        env={"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HOME": str(home), "http_proxy": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert out.returncode == 0, out.stderr
    return dict(zip(("lora", "full"), json.loads(out.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("job", ["lora", "full"])
def test_the_result_loads_air_gapped_and_gives_the_reported_loss(
    job: str, done: dict[str, Ended], loaded_losses: dict[str, float]
) -> None:
    """Bug 26: an adapter that only fits the base as training had changed it."""
    assert loaded_losses[job] == pytest.approx(max(done[job].evals("test").items())[1], abs=2e-5)


def test_the_best_weights_are_written_not_the_last(done: dict[str, Ended]) -> None:
    evals = done["lora"].evals("validation")
    best = min(evals, key=lambda step: (evals[step], step))
    assert best < _STEPS
    assert done["lora"].events(events.SavedEvent)[0].step == best
    assert done["lora"].evals("test")[best] == pytest.approx(evals[best], abs=1e-6)  # the same rows


def test_without_keep_best_the_last_weights_are_written(done: dict[str, Ended]) -> None:
    assert done["last"].events(events.SavedEvent)[0].step == _STEPS
    assert done["last"].evals("test")[_STEPS] == pytest.approx(done["last"].evals("validation")[_STEPS], abs=1e-6)


def test_early_stopping_ends_after_its_patience_and_says_so(done: dict[str, Ended]) -> None:
    steps = done["early"].events(events.StepEvent)
    evals = done["early"].evals("validation")
    best = min(evals, key=lambda step: (evals[step], step))
    assert len(steps) == best + 2 < _STEPS
    assert "2 evaluations brought no loss below" in done["early"].decision("earlyStopping").reason
    assert done["early"].losses == done["lora"].losses[: len(steps)]


def test_the_adapter_names_the_base_as_the_user_did_and_asks_no_hub(done: dict[str, Ended]) -> None:
    config = json.loads((done["lora"].paths.export / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny/model"
    assert config["inference_mode"] is True
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (4, 8, ["q_proj", "v_proj"])
    tensors = load_file(done["lora"].paths.export / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 2  # layers, modules, A and B
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


def test_adapters_are_float32_beside_a_bfloat16_base(done: dict[str, Ended]) -> None:
    tensors = load_file(done["bf16"].paths.export / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert done["bf16"].losses[:3] == pytest.approx(done["lora"].losses[:3], rel=2e-2)


def test_a_whole_model_is_written_in_the_bases_format_with_tied_weights(done: dict[str, Ended]) -> None:
    """Bug 19: tied weights are written twice, or lost."""
    written = load_file(done["full"].paths.export / "model.safetensors")
    base = load_file(done["full"].paths.model / "model.safetensors")
    assert written.keys() == base.keys()
    assert {name: (t.shape, t.dtype) for name, t in written.items()} == {n: (t.shape, t.dtype) for n, t in base.items()}
    config = json.loads((done["full"].paths.export / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "finetune_documents" not in json.dumps(config)


@pytest.mark.parametrize("job", ["lora", "full"])
def test_the_tokenizer_comes_along_unchanged(job: str, done: dict[str, Ended]) -> None:
    """Bug 20: the adapter comes without the tokenizer that it was trained with."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (done[job].paths.export / name).read_bytes() == (done[job].paths.model / name).read_bytes()


def test_the_card_tells_base_data_recipe_and_losses(done: dict[str, Ended]) -> None:
    card = (done["lora"].paths.export / "README.md").read_text()
    assert card.startswith(
        '---\nbase_model: "tiny/model"\nbase_model_relation: adapter\nlicense: "unknown"\nlibrary_name: peft\n'
    )
    for told in (
        "train.jsonl",
        "rank 4, alpha 8",
        f"{_STEPS} optimizer steps",
        "| test, base model |",
        "| validation |",
    ):
        assert told in card


def test_the_card_names_every_place_that_rows_came_from(done: dict[str, Ended]) -> None:
    from finetune_api.run import DataSource, Location, parse

    run = parse(done["lora"].paths.run_config.read_bytes())
    uris = ("hf://org/set/a.jsonl", "s3://data/b|c/", "hf://org/set/d.csv")
    sources = tuple(
        DataSource(location=Location(uri=uri, display=uri), weight=weight)
        for uri, weight in zip(uris, (2, 0.25, 1), strict=True)
    )
    data = run.data.model_copy(update={"sources": sources, "validation": None, "validation_fraction": 0.05})
    text = card.card(run.model_copy(update={"data": data}), "base", card.Figures(3, 70, None, None, None))
    assert 'datasets: ["org/set"]' in text
    for line in (
        "| train | `hf://org/set/a.jsonl` | 2 |",
        "| train | `s3://data/b%7Cc/` | 0.25 |",
        "| train | `hf://org/set/d.csv` | 1 |",
        "| validation | 0.05 of the train rows, chosen by content | |",
    ):
        assert line in text.splitlines()


def test_empty_tensors_are_never_written(tmp_path: Path, done: dict[str, Ended]) -> None:
    from finetune_api.run import parse

    run = parse(done["lora"].paths.run_config.read_bytes())
    nothing = Loaded(None, None, False, "")
    with pytest.raises(RuntimeError, match=r"refusing to write empty weights \(a\.lora_A\)"):
        export.write(
            tmp_path / "export",
            nothing,
            {"a.lora_A": torch.zeros(0, 4)},
            run=run,
            model=done["lora"].paths.model,
            card="",
        )
    assert not (tmp_path / "export").exists()
