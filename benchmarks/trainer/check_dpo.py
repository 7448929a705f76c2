"""Compares our DPO with TRL's on the same batch (`make check-dpo`).

It compares the loss, the figures that TRL logs, and the gradient of every trained weight, with
adapters and with full training. In full training TRL's reference is a copy of the model, and ours
are its precomputed log-probabilities. TRL runs in its own environment (`peers`). The trained
weights are random, since freshly initialized ones give a loss of log 2 for every pair.
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

from finetune_api.messages.events import Rewards
from finetune_api.resource import LoraSpec
from finetune_trainer.data import splits, token_cache
from finetune_trainer.data.batching.collator import Collator
from finetune_trainer.data.chat_rendering import Renderer
from finetune_trainer.data.preparation import ReadOptions
from finetune_trainer.model import dpo as preference
from finetune_trainer.model import freezing, loading, lora
from finetune_trainer.model.dpo import PreferenceSum
from finetune_trainer.model.loss import LossSum
from finetune_trainer.parallel.strategy import trained
from testkit import tiny_models

_BETA = 0.3
_WORDS = "define the noun wander tower light ship fox quick lazy dog again aim move about".split()  # noqa: SIM905
_HERE = Path(__file__).resolve().parent
_THEIRS = {"logps_chosen": "logps/chosen", "logps_rejected": "logps/rejected"}


def main() -> int:
    """Returns 0 if both methods agree with TRL, else 1."""
    codes = []
    for method in ("lora", "full"):
        with tempfile.TemporaryDirectory() as folder:
            print(f"{method}:")
            codes.append(_check(Path(folder), method))
    return max(codes)


def _check(root: Path, method: str) -> int:
    base = tiny_models.tiny_llama(root / "base", chat=False)
    rows = [
        {
            "prompt": " ".join(_WORDS[(7 * at + k) % 15] for k in range(3 + at)) + ":",
            # The answers of two pairs have a common prefix.
            "chosen": " the quick" * (at % 4 == 3)
            + "".join(f" {_WORDS[(5 * at + k) % 15]}" for k in range(2 + at % 4)),
            "rejected": " the quick" * (at % 4 == 3)
            + "".join(f" {_WORDS[(3 * at + 2 * k + 1) % 15]}" for k in range(1 + at % 5)),
        }
        for at in range(8)
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = loading.load(base, dtype=torch.float32, longest=64)
    if method == "lora":
        loaded = lora.adapt(loaded, LoraSpec(rank=4, alpha=8, dropout=0.0), 1)
    else:
        loaded = freezing.unfreeze(loaded)
    reference = _reference(loaded, base, root)
    torch.manual_seed(0)
    for parameter in trained(loaded.model).values():
        noise = torch.randn(parameter.shape)
        parameter.data = noise * 0.5 if method == "lora" else parameter.data + noise * 0.05
    loaded.model.save_pretrained(str(root / "tuned"))
    loss, rewards, count = _ours(loaded, base, root, reference)
    gradients = {name: p.grad for name, p in trained(loaded.model).items()}
    request = {"model": str(base), "tuned": str(root / "tuned"), "method": method, "rows": rows, "beta": _BETA}
    (root / "request.json").write_text(json.dumps(request))
    command = [str(peers.python("trl")), str(_HERE / "run_trl_dpo.py"), "request.json", "answer.json"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-3000:])
        return 1
    return _compare(loss, rewards, count, gradients, root)


def _batch(base: Path, root: Path) -> tuple[Any, Any]:
    """Returns all pairs, and their batch of one packed row."""
    renderer = Renderer.load(base, 64)
    cache = token_cache.build(root / "tokens", "k", root / "rows.jsonl", ReadOptions("rows", renderer, "fail"))
    pairs = replace(splits.all_rows(cache), pairs=True)
    collate = Collator(True, True, False, 0, 0, torch.device("cpu"))
    return pairs, collate(pairs, tuple(pairs.prefixes.sorted(range(len(pairs)))))


def _reference(loaded: loading.LoadedModel, base: Path, root: Path) -> Any:
    """Returns the model's log-probabilities of all answers before training."""
    _, batch = _batch(base, root)
    loss_sum = LossSum.of(loaded.base, None, "cpu")
    loaded.model.eval()
    with torch.no_grad(), loss_sum.packed_context(batch):
        return preference.log_probabilities(loss_sum, loaded.model, batch).double()


def _ours(loaded: loading.LoadedModel, base: Path, root: Path, reference: Any) -> tuple[float, Rewards, int]:
    """Returns the mean loss over pairs, rewards, and target tokens; gradients stay in the model."""
    pairs, batch = _batch(base, root)
    dpo = PreferenceSum.over(LossSum.of(loaded.base, None, "cpu"), _BETA)
    metric_sums = dpo.metric_sums()
    with dpo.packed_context(batch):
        loss = dpo(loaded.model, replace(batch, reference=reference), metric_sums=metric_sums) / len(pairs)
        loss.backward()
    rewards = preference.rewards(metric_sums.tolist(), len(pairs))
    assert rewards is not None
    return float(loss.detach()), rewards, int(batch.targets.numel())


def _compare(loss: float, rewards: Rewards, count: int, gradients: dict[str, Any], root: Path) -> int:
    from safetensors.torch import load_file

    reference, theirs = json.loads((root / "answer.json").read_text()), load_file(root / "answer.safetensors")
    print(
        f"  loss: ours {loss:.7f}, TRL {reference['loss']:.7f} "
        f"(tokens of answers: ours {count}, TRL {reference['tokens']})"
    )
    same = gradients.keys() == theirs.keys() and count == reference["tokens"] and abs(loss - reference["loss"]) < 1e-5
    for name, ours in rewards.model_dump().items():
        metric = _THEIRS.get(name, f"rewards/{name}")
        print(f"  {metric}: ours {ours:.6f}, TRL {reference['figures'][metric]:.6f}")
        same &= abs(ours - reference["figures"][metric]) < 1e-4 * max(1.0, abs(ours))
    difference = max(float((gradients[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs)
    print(f"  gradients of {len(theirs)} weights differ by at most {difference:.1e} of their norm")
    same &= difference < 1e-4
    print("  equal" if same else "  DIFFERENT")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
