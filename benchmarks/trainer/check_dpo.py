"""Our DPO beside TRL's on the same batch: the loss, the figures that TRL logs, and the gradient of every weight that
learns; with adapters and with the whole model, whose reference is a copy at TRL and numbers at ours. `make check-dpo`.

TRL runs in its own environment (`peers`). What learns is drawn, not fresh: fresh, every loss is log 2.
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

from finetune_api.events import Rewards
from finetune_api.resource import LoraSpec
from finetune_trainer import adapters, freezing, model, preference, split, tokens
from finetune_trainer.batch import Collator
from finetune_trainer.learner import trained
from finetune_trainer.loss import LossSum
from finetune_trainer.preference import PreferenceSum
from finetune_trainer.render import Renderer
from testkit import tiny_models

_BETA = 0.3
_WORDS = "define the noun wander tower light ship fox quick lazy dog again aim move about".split()  # noqa: SIM905
_HERE = Path(__file__).resolve().parent
_THEIRS = {"logps_chosen": "logps/chosen", "logps_rejected": "logps/rejected"}


def main() -> int:
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
            # Two of the pairs begin alike.
            "chosen": " the quick" * (at % 4 == 3)
            + "".join(f" {_WORDS[(5 * at + k) % 15]}" for k in range(2 + at % 4)),
            "rejected": " the quick" * (at % 4 == 3)
            + "".join(f" {_WORDS[(3 * at + 2 * k + 1) % 15]}" for k in range(1 + at % 5)),
        }
        for at in range(8)
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = model.load(base, dtype=torch.float32, longest=64)
    if method == "lora":
        loaded = adapters.adapt(loaded, LoraSpec(rank=4, alpha=8, dropout=0.0), 1)
    else:
        loaded = freezing.unfreeze(loaded)
    told = _reference(loaded, base, root)
    torch.manual_seed(0)
    for parameter in trained(loaded.model).values():
        moved = torch.randn(parameter.shape)
        parameter.data = moved * 0.5 if method == "lora" else parameter.data + moved * 0.05
    loaded.model.save_pretrained(str(root / "tuned"))
    loss, rewards, count = _ours(loaded, base, root, told)
    slopes = {name: p.grad for name, p in trained(loaded.model).items()}
    request = {"model": str(base), "tuned": str(root / "tuned"), "method": method, "rows": rows, "beta": _BETA}
    (root / "request.json").write_text(json.dumps(request))
    command = [str(peers.python("trl")), str(_HERE / "run_trl_dpo.py"), "request.json", "answer.json"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-3000:])
        return 1
    return _compare(loss, rewards, count, slopes, root)


def _batch(base: Path, root: Path) -> tuple[Any, Any]:
    """All pairs in one packed row."""
    renderer = Renderer.load(base, 64)
    made = tokens.build(
        root / "tokens", "k", root / "rows.jsonl", "rows", format="auto", on_invalid="fail", renderer=renderer
    )
    pairs = replace(split.whole(made), pairs=True)
    collate = Collator(True, True, False, 0, 0, torch.device("cpu"))
    return pairs, collate(pairs, tuple(pairs.prefixes.sorted(range(len(pairs)))))


def _reference(loaded: model.Loaded, base: Path, root: Path) -> Any:
    """What the model says as it begins."""
    _, batch = _batch(base, root)
    loss_sum = LossSum.of(loaded.base, None, "cpu")
    loaded.model.eval()
    with torch.no_grad(), loss_sum.room(batch):
        return preference.log_probabilities(loss_sum, loaded.model, batch).double()


def _ours(loaded: model.Loaded, base: Path, root: Path, told: Any) -> tuple[float, Rewards, int]:
    """The mean over pairs; their gradients are left in the model."""
    pairs, batch = _batch(base, root)
    dpo = PreferenceSum.over(LossSum.of(loaded.base, None, "cpu"), _BETA)
    tally = dpo.tally()
    with dpo.room(batch):
        loss = dpo(loaded.model, replace(batch, reference=told), tally=tally) / len(pairs)
        loss.backward()
    rewards = preference.rewards(tally.tolist(), len(pairs))
    assert rewards is not None
    return float(loss.detach()), rewards, int(batch.targets.numel())


def _compare(loss: float, rewards: Rewards, count: int, slopes: dict[str, Any], root: Path) -> int:
    from safetensors.torch import load_file

    told, theirs = json.loads((root / "answer.json").read_text()), load_file(root / "answer.safetensors")
    print(f"  loss: ours {loss:.7f}, TRL {told['loss']:.7f} (tokens of answers: ours {count}, TRL {told['tokens']})")
    same = slopes.keys() == theirs.keys() and count == told["tokens"] and abs(loss - told["loss"]) < 1e-5
    for name, ours in rewards.model_dump().items():
        called = _THEIRS.get(name, f"rewards/{name}")
        print(f"  {called}: ours {ours:.6f}, TRL {told['figures'][called]:.6f}")
        same &= abs(ours - told["figures"][called]) < 1e-4 * max(1.0, abs(ours))
    far = max(float((slopes[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs)
    print(f"  gradients of {len(theirs)} weights: at most {far:.1e} of their length apart")
    same &= far < 1e-4
    print("  equal" if same else "  DIFFERENT")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
