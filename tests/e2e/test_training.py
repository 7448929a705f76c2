"""Every strategy on real pods, and what it writes to object storage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from demo import watch
from e2e.support.jobs import NAMESPACE, World, fine_tune_job
from finetune_api.messages.data_report import DataReport

LORA = {"type": "lora", "lora": {"rank": 4, "alpha": 8, "dropout": 0}}
RECIPE = {"maxSteps": 12, "globalBatchSize": 8, "learningRate": 1e-3}


def _trained(world: World, name: str, **spec: object) -> dict[str, torch.Tensor]:
    world.apply(fine_tune_job(name, **spec))
    status = world.until_phase(name, "Succeeded", seconds=300)
    assert status["progress"]["step"] == status["progress"]["totalSteps"]
    weights = "model.safetensors" if spec.get("method") == {"type": "full"} else "adapter_model.safetensors"
    return load(world.download(name, weights))


def _largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[key].float() - other[key].float()).abs().max()) for key in one)


@pytest.fixture(scope="module")
def lora_ddp(world: World) -> dict[str, torch.Tensor]:
    """The result of LoRA with ddp on 2 pods × 2 ranks, with scores, with curves in files, and with
    an MLflow server that is down."""
    return _trained(
        world, "lora-ddp", method=LORA, training=RECIPE,
        evaluation={"metrics": ["rouge"], "rows": 8, "maxNewTokens": 8},
        tracking={"tensorboard": True, "mlflow": {"uri": "http://127.0.0.1:9", "experiment": "e2e"}},
        distribution={"nodes": 2, "processesPerNode": 2, "strategy": "ddp"},
        resources={"cpu": "600m", "memory": "3Gi", "scratch": "2Gi", "sharedMemory": "128Mi"},
    )  # fmt: skip


def test_lora_on_two_pods_of_two_ranks_writes_an_adapter_that_peft_loads(
    world: World, lora_ddp: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from testkit.tiny_models import tiny_llama

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for path in world.files("lora-ddp"):
        if "/" not in path:
            (tmp_path / path).write_bytes(world.download("lora-ddp", path))
    base = tiny_llama(tmp_path / "base", seed=1)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base or tmp_path / "base"), str(tmp_path))
    assert sum(p.numel() for n, p in model.named_parameters() if "lora_" in n) == sum(
        t.numel() for t in lora_ddp.values()
    )


def test_the_manifest_lists_every_file_and_its_origin(world: World, lora_ddp: dict[str, torch.Tensor]) -> None:
    manifest = world.artifact("lora-ddp")
    listed = {entry["path"] for entry in manifest["files"]}
    assert listed == world.files("lora-ddp") - {"finetune/manifest.json"}
    assert {"adapter_model.safetensors", "adapter_config.json", "finetune/history.jsonl"} <= listed
    assert not any(path.startswith("checkpoints/") for path in world.files("lora-ddp"))
    status = world.status("lora-ddp")
    assert status["artifact"]["uri"] == "s3://outputs/lora-ddp"
    assert status["artifact"]["manifestDigest"].startswith("sha256:")
    assert status["evaluation"]["testLossAfter"] < status["evaluation"]["testLossBefore"]


def test_the_data_report_is_stored_next_to_the_result_and_few_examples_are_an_event(
    world: World, lora_ddp: dict[str, torch.Tensor]
) -> None:
    summary = world.status("lora-ddp")["data"]
    report = DataReport.model_validate_json(world.download("lora-ddp", "finetune/data-report.json"))
    rows = {split.split: split.rows for split in report.splits}
    assert (summary["rows"], summary["validationRows"], summary["testRows"]) == (rows["train"], rows["validation"], 20)
    assert rows["train"] + rows["validation"] == 200
    assert (summary["dropped"], summary["duplicates"], summary["leaks"]) == (0, 0, 0)
    chosen = "involvedObject.name=lora-ddp,reason=DataWarning"
    (event,) = json.loads(world.kubectl("get", "events", "--field-selector", chosen, "-o", "json"))["items"]
    assert event["message"].startswith(f"FewExamples: {rows['train']} training rows")


def test_scores_are_in_status_and_in_what_kubectl_shows(world: World, lora_ddp: dict[str, torch.Tensor]) -> None:
    status = world.status("lora-ddp")
    scores = {score["name"]: score for score in status["evaluation"]["scores"]}
    assert {"rouge1", "rouge2", "rougeL", "perplexity"} == set(scores)
    assert scores["perplexity"]["high"] < 0  # the result's is lower for any sample of the rows
    head, row = world.kubectl("get", "ftj", "lora-ddp", "-o", "wide").splitlines()
    shown = row[head.index("MESSAGE") :]
    assert shown.startswith(f"the result is in s3://outputs/lora-ddp; rougeL {scores['rougeL']['base']:g} before, ")
    assert status["message"].startswith(shown[:60])
    assert float(row[head.index("LOSS") :].split()[0]) == pytest.approx(status["evaluation"]["trainLoss"], abs=1e-3)


def test_curves_are_stored_next_to_the_result_although_mlflow_is_down(
    world: World, lora_ddp: dict[str, torch.Tensor]
) -> None:
    (file,) = (path for path in world.files("lora-ddp") if path.startswith("finetune/tensorboard/events.out.tfevents."))
    curves = world.download("lora-ddp", file)
    assert all(name in curves for name in (b"train/loss", b"validation/loss", b"test/loss", b"test/rougeL"))
    (first,) = (pod["metadata"]["name"] for pod in world.pods("lora-ddp") if "-1-0-" in pod["metadata"]["name"])
    log = world.kubectl("logs", first)
    assert log.count("mlflow can't record; training continues") == 1
    assert log.count("mlflow didn't receive everything") == 1


def test_the_final_loss_is_in_prometheus_after_the_pods_are_gone(
    world: World, lora_ddp: dict[str, torch.Tensor]
) -> None:
    labels = f'namespace="{NAMESPACE}",job="lora-ddp"'
    series = watch.prometheus(world.cluster, "query", query=f"last_over_time(finetune_train_loss{{{labels}}}[10m])")
    assert series, "no loss series"
    steps = watch.newest(world.cluster, f"max(last_over_time(finetune_train_steps_total{{{labels}}}[10m]))")
    assert steps == 12


def test_a_gpu_series_is_absent_without_a_gpu(world: World, lora_ddp: dict[str, torch.Tensor]) -> None:
    assert watch.prometheus(world.cluster, "query", query="last_over_time(finetune_gpu_utilization_ratio[1h])") == []


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_lora_under_zero_equals_ddp(world: World, lora_ddp: dict[str, torch.Tensor], strategy: str) -> None:
    adapter = _trained(
        world, f"lora-{strategy}", method=LORA, training=RECIPE,
        distribution={"nodes": 2, "processesPerNode": 1, "strategy": strategy},
        resources={"cpu": "600m", "memory": "3Gi", "scratch": "2Gi", "sharedMemory": "128Mi"},
    )  # fmt: skip
    assert _largest_difference(adapter, lora_ddp) < 1e-5


def test_full_training_under_zero3_writes_a_model_that_loads(world: World, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    weights = _trained(
        world, "full-zero3", method={"type": "full"}, training={**RECIPE, "learningRate": 1e-4},
        distribution={"nodes": 2, "processesPerNode": 1, "strategy": "zero3"},
        resources={"cpu": "600m", "memory": "3Gi", "scratch": "2Gi", "sharedMemory": "128Mi"},
    )  # fmt: skip
    assert all(tensor.numel() for tensor in weights.values())
    for path in world.files("full-zero3"):
        if "/" not in path:
            (tmp_path / path).write_bytes(world.download("full-zero3", path))
    AutoModelForCausalLM.from_pretrained(tmp_path)
