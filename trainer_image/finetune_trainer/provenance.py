"""What the result's manifest says about where it came from. Used by the supervisor once, at the end."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from finetune_api import __version__
from finetune_api.run import RunConfig
from finetune_trainer import card, digests
from finetune_trainer.fetch import DataFacts, ModelFacts
from finetune_trainer.state import TrainingState

_LIBRARIES = (
    "torch", "transformers", "peft", "accelerate", "deepspeed", "safetensors", "tokenizers", "numpy",
)  # fmt: skip
_OF_THE_POD = {"scratch", "progress", "metrics_port", "metrics_linger_seconds", "stall_seconds", "grace_seconds"}


def provenance(run: RunConfig, model: ModelFacts, data: dict[str, DataFacts], state: TrainingState) -> dict[str, Any]:
    """Plain JSON: base model, data, resolved configuration, image, versions, seed, decisions and plan."""
    plan = state.plan
    return {
        "model": {
            "uri": run.model.location.display,
            "revision": model.revision,
            "digest": model.digest,
            "license": model.license,
        },
        "data": {
            split: {"uri": facts.uri, "digest": facts.digest, "bytes": facts.bytes} for split, facts in data.items()
        },
        "rows": {"used": plan.rows, "dropped": plan.dropped_rows} if plan else {},
        "configuration": run.model_dump(mode="json", by_alias=True, exclude_none=True, exclude=_OF_THE_POD),
        "image": run.provenance.image,
        "operatorVersion": run.provenance.operator_version,
        "specDigest": run.provenance.spec_digest,
        "versions": _versions(),
        "seed": run.training.seed,
        "decisions": {d.topic: {"choice": d.choice, "reason": d.reason} for d in state.decisions},
        "plan": plan.model_dump(mode="json", by_alias=True, exclude={"type", "time"}) if plan else {},
    }


def add_to_cards(export: Path, origin: dict[str, Any]) -> None:
    """Digests into the README.md beside weights, of the result and of a merged model in it."""
    for readme in (export / "README.md", export / "merged" / "README.md"):
        if not readme.is_file():
            continue
        weights = sorted(readme.parent.glob("*.safetensors"))
        text = card.origin(
            origin["model"],
            {split: facts["digest"] for split, facts in origin["data"].items()},
            origin["image"],
            {path.name: digests.of_file(path) for path in weights},
        )
        with readme.open("a") as file:
            file.write(text)


def metrics(state: TrainingState) -> dict[str, float]:
    """The figures that a reader wants first."""
    evaluation = state.evaluation
    values: dict[str, float | None] = {
        "trainLoss": evaluation.train_loss if evaluation else None,
        "evalLoss": evaluation.eval_loss if evaluation else None,
        "evalRewardMargin": evaluation.eval_reward_margin if evaluation else None,
        "evalRewardAccuracy": evaluation.eval_reward_accuracy if evaluation else None,
        "testLossBefore": evaluation.test_loss_before if evaluation else None,
        "testLossAfter": evaluation.test_loss_after if evaluation else None,
        "testRewardMargin": evaluation.test_reward_margin if evaluation else None,
        "testRewardAccuracy": evaluation.test_reward_accuracy if evaluation else None,
        "steps": float(state.step),
        "tokens": float(state.tokens),
        "samples": float(state.samples),
    }
    for score in state.scored.scores if state.scored else ():
        values[f"{score.name}Base"], values[f"{score.name}Tuned"] = score.base, score.tuned
    return {name: value for name, value in values.items() if value is not None}


def _versions() -> dict[str, str]:
    found = {"finetune-operator": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
