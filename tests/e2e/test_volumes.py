"""Model, data and result are on a persistent volume claim, without any object storage."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.support.jobs import NAMESPACE, World, fine_tune_job
from finetune_api.names import MANIFEST_PATH
from testkit.tiny_models import tiny_llama

CLAIM = "volume"


@pytest.fixture
def volume(world: World, tmp_path: Path) -> Iterator[Path]:
    """The folder behind a claim that is bound to this machine and that any user may write."""
    tmp_path.chmod(0o755)
    for parent in (tmp_path.parent, tmp_path.parent.parent):
        parent.chmod(0o755)
    folder = tmp_path / "volume"
    folder.mkdir()
    folder.chmod(0o777)
    tiny_llama(folder / "tiny", seed=1)
    rows = [json.dumps({"prompt": f"Say {i}: ", "completion": f"{i} is said"}) for i in range(40)]
    (folder / "train.jsonl").write_text("\n".join(rows))
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    size = {"storage": "1Gi"}
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": CLAIM},
        "spec": {
            "capacity": size,
            "accessModes": ["ReadWriteMany"],
            "hostPath": {"path": str(folder)},
            "storageClassName": "",
            "claimRef": {"namespace": NAMESPACE, "name": CLAIM},
        },
    }
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": CLAIM, "namespace": NAMESPACE},
        "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": size}, "storageClassName": ""},
    }
    world.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": [volume, claim]}))
    yield folder
    world.kubectl("delete", "ftj", "on-a-volume", "--ignore-not-found")
    world.kubectl("delete", "pvc", CLAIM, "--wait=false")
    world.kubectl("delete", "pv", CLAIM, "--wait=false")


def test_a_claim_can_hold_model_data_and_result(world: World, volume: Path) -> None:
    job = fine_tune_job(
        "on-a-volume",
        model={"uri": f"pvc://{CLAIM}/tiny", "dtype": "float32"},
        dataset={"uri": f"pvc://{CLAIM}/train.jsonl", "maxSequenceLength": 64},
        output={"uri": f"pvc://{CLAIM}/out"},
        training={"maxSteps": 4, "globalBatchSize": 8},
    )
    world.apply(job)
    status = world.until_phase("on-a-volume", "Succeeded", seconds=360)
    assert status["artifact"]["uri"] == f"pvc://{CLAIM}/out"
    assert (volume / "out" / "adapter_model.safetensors").stat().st_size > 0
    assert json.loads((volume / "out" / MANIFEST_PATH).read_text())["kind"] == "adapter"
