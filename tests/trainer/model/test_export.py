"""A result loads unchanged, without a network, and gives the losses that were reported for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune_api.messages import events
from finetune_trainer.data.chat_rendering import Renderer
from finetune_trainer.model.loading import LoadedModel
from finetune_trainer.model.result import export
from finetune_trainer.reporting import model_card
from testkit.rows import pairs
from trainer.support.rank_runs import FinishedRun, finish_all, prepare

# These answers share only the end of the turn with the training rows: their loss falls while that
# is trained, and then rises because training lowers the probability of all their other tokens.
_HELD_OUT = [{**row, "completion": " " + "<>{}#$%&" * (1 + index % 3)} for index, row in enumerate(pairs(9, 1))]
_STEPS = 30

# A new Python without access to a hub runs this. It loads bases and results, and prints the mean
# losses of the held-out rows.
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
    for ids, loss_mask in rows:
        logits = model.eval()(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for at in range(1, len(ids)):
            if loss_mask[at]:
                total, count = total - float(logits[at - 1, ids[at]]), count + 1
    return total / count
print(json.dumps([loss(*case) for case in json.load(open(sys.argv[1]))]))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> dict[str, FinishedRun]:
    """Training soon harms the held-out rows, so that the best weights aren't the last ones."""
    root = tmp_path_factory.mktemp("export")
    harmful = {"max_steps": _STEPS, "learning_rate": 0.03, "eval_every_steps": 1}
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
def loaded_losses(runs: dict[str, FinishedRun], tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Returns the loss of the loaded result by job: a LoRA adapter and a full model."""
    from finetune_trainer.data.reading import rows

    home, cases = tmp_path_factory.mktemp("home"), []
    for run, base in ((runs["lora"], str(runs["lora"].paths.model)), (runs["full"], "")):
        renderer = Renderer.load(run.paths.model, 96)
        examples = [renderer.render(row) for row in rows.read(run.paths.data("test")).rows]
        tokens = [[list(e.ids), list(e.loss_mask)] for e in examples]  # type: ignore[union-attr]
        cases.append([base, str(run.paths.export), tokens])
    (home / "cases.json").write_text(json.dumps(cases))
    out = subprocess.run(
        [sys.executable, "-c", _LOAD, str(home / "cases.json")],
        env={"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HOME": str(home), "http_proxy": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert out.returncode == 0, out.stderr
    return dict(zip(("lora", "full"), json.loads(out.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("job", ["lora", "full"])
def test_the_result_loads_air_gapped_and_gives_the_reported_loss(
    job: str, runs: dict[str, FinishedRun], loaded_losses: dict[str, float]
) -> None:
    """Bug 26: an adapter that only fits the base as training had changed it."""
    assert loaded_losses[job] == pytest.approx(max(runs[job].evals("test").items())[1], abs=2e-5)


def test_the_best_weights_are_written_not_the_last(runs: dict[str, FinishedRun]) -> None:
    evals = runs["lora"].evals("validation")
    best = min(evals, key=lambda step: (evals[step], step))
    assert best < _STEPS
    assert runs["lora"].events(events.SavedEvent)[0].step == best
    assert runs["lora"].evals("test")[best] == pytest.approx(evals[best], abs=1e-6)  # the same rows


def test_without_keep_best_the_last_weights_are_written(runs: dict[str, FinishedRun]) -> None:
    assert runs["last"].events(events.SavedEvent)[0].step == _STEPS
    assert runs["last"].evals("test")[_STEPS] == pytest.approx(runs["last"].evals("validation")[_STEPS], abs=1e-6)


def test_early_stopping_ends_after_its_patience_with_a_reason(runs: dict[str, FinishedRun]) -> None:
    steps = runs["early"].events(events.StepEvent)
    evals = runs["early"].evals("validation")
    best = min(evals, key=lambda step: (evals[step], step))
    assert len(steps) == best + 2 < _STEPS
    assert "2 evaluations brought no loss below" in runs["early"].decision("earlyStopping").reason
    assert runs["early"].losses == runs["lora"].losses[: len(steps)]


def test_the_adapter_names_the_base_as_the_user_did(runs: dict[str, FinishedRun]) -> None:
    config = json.loads((runs["lora"].paths.export / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny/model"
    assert config["inference_mode"] is True
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (4, 8, ["q_proj", "v_proj"])
    tensors = load_file(runs["lora"].paths.export / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 2  # layers, modules, A and B
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


def test_adapters_of_a_bfloat16_base_are_float32(runs: dict[str, FinishedRun]) -> None:
    tensors = load_file(runs["bf16"].paths.export / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert runs["bf16"].losses[:3] == pytest.approx(runs["lora"].losses[:3], rel=2e-2)


def test_a_full_model_is_written_in_the_bases_format_with_tied_weights(runs: dict[str, FinishedRun]) -> None:
    """Bug 19: tied weights are written twice, or lost."""
    written = load_file(runs["full"].paths.export / "model.safetensors")
    base = load_file(runs["full"].paths.model / "model.safetensors")
    assert written.keys() == base.keys()
    assert {name: (t.shape, t.dtype) for name, t in written.items()} == {n: (t.shape, t.dtype) for n, t in base.items()}
    config = json.loads((runs["full"].paths.export / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "finetune_documents" not in json.dumps(config)


@pytest.mark.parametrize("job", ["lora", "full"])
def test_the_tokenizer_is_written_unchanged(job: str, runs: dict[str, FinishedRun]) -> None:
    """Bug 20: the adapter is stored without the tokenizer that it was trained with."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (runs[job].paths.export / name).read_bytes() == (runs[job].paths.model / name).read_bytes()


def test_the_card_lists_base_data_recipe_and_losses(runs: dict[str, FinishedRun]) -> None:
    card = (runs["lora"].paths.export / "README.md").read_text()
    assert card.startswith(
        '---\nbase_model: "tiny/model"\nbase_model_relation: adapter\nlicense: "unknown"\nlibrary_name: peft\n'
    )
    for part in (
        "train.jsonl",
        "rank 4, alpha 8",
        f"{_STEPS} optimizer steps",
        "| test, base model |",
        "| validation |",
    ):
        assert part in card


def test_the_card_lists_every_source_of_rows(runs: dict[str, FinishedRun]) -> None:
    from finetune_api.messages.run import DataSource, Location, parse

    run = parse(runs["lora"].paths.run_config.read_bytes())
    uris = ("hf://org/set/a.jsonl", "s3://data/b|c/", "hf://org/set/d.csv")
    sources = tuple(
        DataSource(location=Location(uri=uri, display=uri), weight=weight)
        for uri, weight in zip(uris, (2, 0.25, 1), strict=True)
    )
    data = run.data.model_copy(update={"sources": sources, "validation": None, "validation_fraction": 0.05})
    text = model_card.card(run.model_copy(update={"data": data}), "base", model_card.Figures(3, 70, None, None, None))
    assert 'datasets: ["org/set"]' in text
    for line in (
        "| train | `hf://org/set/a.jsonl` | 2 |",
        "| train | `s3://data/b%7Cc/` | 0.25 |",
        "| train | `hf://org/set/d.csv` | 1 |",
        "| validation | 0.05 of the train rows, chosen by content | |",
    ):
        assert line in text.splitlines()


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        pytest.param({}, ("- AdamW, learning rate", "Mean loss per supervised token."), id="the defaults"),
        pytest.param({"optimizer": "adamw_8bit"}, ("- AdamW with 8-bit moments (adamw_8bit)",), id="8-bit moments"),
        pytest.param(
            {"optimizer": "paged_adamw_8bit"}, ("- AdamW with 8-bit moments (paged_adamw_8bit)",), id="paged moments"
        ),
        pytest.param({"optimizer": "adafactor"}, ("- Adafactor, learning rate",), id="Adafactor"),
        pytest.param(
            {"optimizer": "muon", "objective": "dpo", "dpo": {"beta": 0.3}},
            ("- Muon (AdamW for embeddings", "8 preference pairs", "Mean DPO loss per preference pair (beta 0.3)."),
            id="Muon and DPO",
        ),
    ],
)
def test_the_card_names_the_optimizer_and_the_loss_of_the_objective(
    training: dict[str, Any], expected: tuple[str, ...], tmp_path: Path
) -> None:
    run = prepare(tmp_path / "scratch", tmp_path, pairs(1), training=training).run
    text = model_card.card(run, "base", model_card.Figures(3, 70, 1.5, None, None))
    for part in expected:
        assert part in text
    if training:
        assert "- AdamW, " not in text
    if training.get("objective") == "dpo":
        assert "supervised" not in text


def test_empty_tensors_are_never_written(tmp_path: Path, runs: dict[str, FinishedRun]) -> None:
    from finetune_api.messages.run import parse

    run = parse(runs["lora"].paths.run_config.read_bytes())
    model = torch.nn.Module()
    model.lora_A = torch.nn.Parameter(torch.zeros(2, 4))
    with pytest.raises(RuntimeError, match=r"refusing to write empty weights \(lora_A\)"):
        export.write(
            tmp_path / "export",
            LoadedModel(model, model, False, ""),
            lambda *_: torch.zeros(0, 4),
            run=run,
            model=runs["lora"].paths.model,
            card="",
        )
    assert not (tmp_path / "export").exists()
