"""Collects what the result's manifest says about its origin, and its metrics."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from finetune_api import __version__
from finetune_api.messages.run import RunConfig
from finetune_trainer.manifest import of_file
from finetune_trainer.reporting import model_card
from finetune_trainer.reporting.run_state import RunState
from finetune_trainer.supervisor.download import DataFacts, ModelFacts

_LIBRARIES = (
    "torch", "transformers", "peft", "accelerate", "deepspeed", "safetensors", "tokenizers", "numpy",
)  # fmt: skip
_POD_SETTINGS = {
    "scratch", "progress", "metrics_port", "metrics_linger_seconds", "stall_seconds", "grace_seconds", "signers",
    "hold_seconds", "existing", "inherits", "deletion_policy", "rivals",
}  # fmt: skip


def provenance(run: RunConfig, model: ModelFacts, data: dict[str, DataFacts], state: RunState) -> dict[str, Any]:
    """Returns the base model, data, resolved configuration, image, library versions, seed,
    decisions and plan, as plain JSON."""
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
        "startedFrom": [
            event.model_dump(mode="json", by_alias=True, exclude={"type", "time"}) for event in state.origins
        ],
        "rows": {"used": plan.rows, "dropped": plan.dropped_rows} if plan else {},
        "configuration": run.model_dump(mode="json", by_alias=True, exclude_none=True, exclude=_POD_SETTINGS),
        "image": run.provenance.image,
        "operatorVersion": run.provenance.operator_version,
        "specDigest": run.provenance.spec_digest,
        "versions": _versions(),
        "seed": run.training.seed,
        "decisions": {d.topic: {"choice": d.choice, "reason": d.reason} for d in state.decisions},
        "plan": plan.model_dump(mode="json", by_alias=True, exclude={"type", "time"}) if plan else {},
    }


def add_to_cards(export: Path, origin: dict[str, Any]) -> None:
    """Appends digests to the model cards: README.md of the result, and of a merged model in it."""
    for readme in (export / "README.md", export / "merged" / "README.md"):
        if not readme.is_file():
            continue
        weights = sorted(readme.parent.glob("*.safetensors"))
        text = model_card.origin(
            origin["model"],
            {split: facts["digest"] for split, facts in origin["data"].items()},
            origin["image"],
            {path.name: of_file(path) for path in weights},
        )
        with readme.open("a") as file:
            file.write(text)


def metrics(state: RunState) -> dict[str, float]:
    """Returns the most important figures by name; those that weren't measured are omitted."""
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
    versions = {"finetune-operator": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
