"""Our DPO beside TRL's on the same batch: the loss, and the gradient of every adapter weight. `make check-dpo`.

TRL runs in its own environment (`peers`). The adapter is drawn, not fresh: with a fresh one every loss is log 2.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.trainer import peers

from finetune_api.resource import LoraSpec
from finetune_trainer import adapters, model, preference, split, tokens
from finetune_trainer.batch import Collator
from finetune_trainer.learner import trained
from finetune_trainer.loss import LossSum
from finetune_trainer.preference import PreferenceSum
from finetune_trainer.render import Renderer
from testkit import tiny_models

_BETA = 0.3
_WORDS = "define the noun wander tower light ship fox quick lazy dog again aim move about".split()  # noqa: SIM905
_HERE = Path(__file__).resolve().parent


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        return _check(Path(folder))


def _check(root: Path) -> int:
    base = tiny_models.tiny_llama(root / "base", chat=False)
    rows = [
        {
            "prompt": " ".join(_WORDS[(7 * at + k) % 15] for k in range(3 + at)) + ":",
            "chosen": "".join(f" {_WORDS[(5 * at + k) % 15]}" for k in range(2 + at % 4)),
            "rejected": "".join(f" {_WORDS[(3 * at + 2 * k + 1) % 15]}" for k in range(1 + at % 5)),
        }
        for at in range(8)
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = adapters.adapt(
        model.load(base, dtype=torch.float32, longest=64), LoraSpec(rank=4, alpha=8, dropout=0.0), 1
    )
    torch.manual_seed(0)
    for parameter in trained(loaded.model).values():
        parameter.data = torch.randn(parameter.shape) * 0.5
    loaded.model.save_pretrained(str(root / "adapter"))
    ours, count = _ours(loaded, base, root)
    slopes = {name: p.grad for name, p in trained(loaded.model).items()}
    request = {"model": str(base), "adapter": str(root / "adapter"), "rows": rows, "beta": _BETA}
    (root / "request.json").write_text(json.dumps(request))
    command = [str(peers.python("trl")), str(_HERE / "run_trl_dpo.py"), "request.json", "answer.json"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-3000:])
        return 1
    return _compare(ours, count, slopes, root)


def _ours(loaded: model.Loaded, base: Path, root: Path) -> tuple[float, int]:
    """The mean over pairs; their gradients are left in the model."""
    renderer = Renderer.load(base, 64)
    made = tokens.build(
        root / "tokens", "k", root / "rows.jsonl", "rows", format="auto", on_invalid="fail", renderer=renderer
    )
    pairs = replace(split.whole(made), pairs=True)
    collate = Collator(True, True, False, 0, 0, torch.device("cpu"))
    loss_sum = LossSum.of(loaded.base, None, "cpu")
    loaded.model.eval()
    micro = tuple(pairs.prefixes.sorted(range(len(pairs))))
    batch = collate(pairs, micro)
    with torch.no_grad(), loaded.model.disable_adapter(), loss_sum.room(batch):
        told = preference.log_probabilities(loss_sum, loaded.model, batch)
    batch = replace(batch, reference=told.double())
    dpo = PreferenceSum.over(loss_sum, _BETA)
    with dpo.room(batch):
        loss = dpo(loaded.model, batch) / len(pairs)
        loss.backward()
    return float(loss.detach()), int(batch.targets.numel())


def _compare(ours: float, count: int, slopes: dict[str, Any], root: Path) -> int:
    from safetensors.torch import load_file

    told, theirs = json.loads((root / "answer.json").read_text()), load_file(root / "answer.safetensors")
    print(f"loss: ours {ours:.7f}, TRL {told['loss']:.7f} (tokens of answers: ours {count}, TRL {told['tokens']})")
    far = max(float((slopes[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs)
    print(f"gradients of {len(theirs)} weights: at most {far:.1e} of their length apart")
    same = slopes.keys() == theirs.keys() and abs(ours - told["loss"]) < 1e-5 and far < 1e-4
    print("equal" if same else "DIFFERENT")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
