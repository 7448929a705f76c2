"""The README.md beside the weights: what it is, what it was made of, how to load it. Pure.

`card` is called by `story` once; the supervisor, which knows what was fetched, adds `origin` before the upload.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from finetune_api.resource import LoraSpec
from finetune_api.run import DataConfig, RunConfig


@dataclass(frozen=True)
class Figures:
    """What was measured, mean loss per learnt token."""

    steps: int
    rows: int
    eval_loss: float | None
    test_before: float | None
    test_after: float | None


def card(run: RunConfig, base: str, figures: Figures, *, license: str = "", merged: bool = False) -> str:
    """Markdown with the front matter that hubs read. `merged`: of the model in which base and adapter are one."""
    lora = run.method == "lora" and not merged
    front = ["---"]
    if run.model.location.uri.startswith("hf://"):
        front += [f"base_model: {json.dumps(base)}", f"base_model_relation: {'adapter' if lora else 'finetune'}"]
    if sets := _datasets(run.data):
        front += [f"datasets: {json.dumps(sets)}"]
    if license:
        front += [f"license: {json.dumps(license)}"]
    front += [f"library_name: {'peft' if lora else 'transformers'}", "tags: [finetune-operator]", "---"]
    kind = "A LoRA adapter for" if lora else "A fine-tuned version of"
    t = run.training
    length = f"{t.max_steps} steps" if t.max_steps is not None else f"{t.epochs or 3:g} epochs"
    recipe = [
        f"- method: {run.method}" + (", merged into the base" if merged else "") + _adapter(run.lora),
        f"- {figures.steps} optimizer steps ({length} asked for) of {t.global_batch_size} examples",
        f"- AdamW, learning rate {t.learning_rate:g} ({t.scheduler}, warm-up {t.warmup_ratio:g}), weight decay "
        f"{t.weight_decay:g}, gradient norm at most {t.max_grad_norm:g}, seed {t.seed}",
    ]  # fmt: skip
    losses = [
        f"| {name} | {loss:.4f} |"
        for name, loss in (
            ("validation", figures.eval_loss),
            ("test, base model", figures.test_before),
            ("test, this result", figures.test_after),
        )
        if loss is not None
    ]
    whole = 'model = AutoModelForCausalLM.from_pretrained("<this folder>")'
    load = (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("<base>"), "<this folder>")'
        if lora
        else f"from transformers import AutoModelForCausalLM\n\n{whole}"
    )
    parts = [
        "\n".join(front),
        f"# {run.job.name}",
        f"{kind} `{base}`, made by the FineTuneJob `{run.job.namespace}/{run.job.name}`.",
        f"Licence of the base model: {license or 'unknown'}. What was learnt from it is bound by it, too.",
        "## Data",
        f"{figures.rows} rows an epoch. Their licences aren't looked up; what was learnt is bound by those, too.",
        "\n".join(["| rows | from | as often |", "| --- | --- | --- |", *_places(run.data)]),
        "## Recipe",
        "\n".join(recipe),
    ]
    if losses:
        parts += ["## Loss", "Mean over supervised tokens.", "\n".join(["| rows | loss |", "| --- | --- |", *losses])]
    parts += ["## Use", f"```python\n{load}\n```", "`finetune/manifest.json` lists every file's digest and the origin."]
    return "\n\n".join(parts) + "\n"


def origin(model: Mapping[str, str | None], data: Mapping[str, str], image: str, files: Mapping[str, str]) -> str:
    """A section with digests: `data` by split and `files` by name, both to sha256 digests."""
    rows = [
        f"| base model {model['uri']} | {model['revision'] or ''} {model['digest'] or ''} |",
        *(f"| {split} rows | {digest} |" for split, digest in data.items()),
        *([f"| image | {image} |"] if image else []),
        *(f"| {name} | sha256:{digest} |" for name, digest in files.items()),
    ]
    return "\n".join(["", "## Origin", "", "| what | digest |", "| --- | --- |", *rows]) + "\n"


def _places(data: DataConfig) -> list[str]:
    """A line for each place that rows come from, and for each split."""
    found = [
        f"| {split} | `{place.location.display.replace('|', '%7C')}` | {often} |"
        for split in ("train", "validation", "test")
        for place in data.places(split)
        for often in (f"{place.weight:g}" if split == "train" else "",)
    ]
    own: tuple[tuple[str, float | None], ...] = (
        ("validation", data.validation_fraction),
        ("test", data.test_fraction),
    )
    return found + [
        f"| {name} | {fraction:.3g} of the train rows, chosen by content | |" for name, fraction in own if fraction
    ]


def _datasets(data: DataConfig) -> list[str]:
    """Of a hub: owner/name."""
    uris = [place.location.uri for split in ("train", "validation", "test") for place in data.places(split)]
    return list(dict.fromkeys("/".join(uri[5:].split("/")[:2]) for uri in uris if uri.startswith("hf://")))


def _adapter(lora: LoraSpec | None) -> str:
    if lora is None:
        return ""
    return f", rank {lora.rank}, alpha {lora.alpha}, dropout {lora.dropout:g}, on {', '.join(lora.target_modules)}"
