"""Writes the model card: a README.md with base model, data, recipe, losses and usage.

The module is pure. The supervisor, which knows the digests of everything that was downloaded,
appends `origin` before the upload.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from finetune_api.messages.run import DataConfig, RunConfig
from finetune_api.resource import DpoSpec, LoraSpec, TrainingSpec

_OPTIMIZERS = {
    "adamw": "AdamW",
    "adamw_8bit": "AdamW with 8-bit moments (adamw_8bit)",
    "paged_adamw_8bit": "AdamW with 8-bit moments (paged_adamw_8bit)",
    "adafactor": "Adafactor",
    "muon": "Muon (AdamW for embeddings, the output layer and vectors)",
}


@dataclass(frozen=True)
class Figures:
    """Holds what was measured.

    The losses are means per supervised token, or per preference pair for objective dpo.
    """

    steps: int
    rows: int
    eval_loss: float | None
    test_before: float | None
    test_after: float | None


def card(run: RunConfig, base: str, figures: Figures, *, license: str = "", merged: bool = False) -> str:
    """Returns Markdown with the front matter that hubs read.

    `merged` selects the card of the full model into which the adapter was merged.
    """
    lora = run.method == "lora" and not merged
    kind = "A LoRA adapter for" if lora else "A fine-tuned version of"
    parts = [
        "\n".join(_front_matter(run, base, lora=lora, license=license)),
        f"# {run.job.name}",
        f"{kind} `{base}`, made by the FineTuneJob `{run.job.namespace}/{run.job.name}`.",
        f"License of the base model: {license or 'unknown'}. It applies to this model, too.",
        "## Data",
        f"{figures.rows} rows per epoch. Their licenses were not checked; they may apply to this model, too.",
        "\n".join(["| rows | source | weight |", "| --- | --- | --- |", *_sources(run.data)]),
        "## Recipe",
        "\n".join(_recipe(run, figures, merged=merged)),
    ]
    if losses := _losses(figures):
        table = "\n".join(["| rows | loss |", "| --- | --- |", *losses])
        parts += ["## Loss", _loss_definition(run.training), table]
    usage = f"```python\n{_usage(lora=lora)}\n```"
    parts += ["## Use", usage, "`finetune/manifest.json` lists the digest of every file and the origin of the model."]
    return "\n\n".join(parts) + "\n"


def origin(model: Mapping[str, str | None], data: Mapping[str, str], image: str, files: Mapping[str, str]) -> str:
    """Returns a Markdown section with the digests of the base model, the data and the files.

    `model` has uri, revision and digest; `data` maps splits, and `files` maps file names, to their
    sha256 digests.
    """
    rows = [
        f"| base model {model['uri']} | {model['revision'] or ''} {model['digest'] or ''} |",
        *(f"| {split} rows | {digest} |" for split, digest in data.items()),
        *([f"| image | {image} |"] if image else []),
        *(f"| {name} | sha256:{digest} |" for name, digest in files.items()),
    ]
    return "\n".join(["", "## Origin", "", "| content | digest |", "| --- | --- |", *rows]) + "\n"


def _front_matter(run: RunConfig, base: str, *, lora: bool, license: str) -> list[str]:
    lines = ["---"]
    if run.model.location.uri.startswith("hf://"):
        lines += [f"base_model: {json.dumps(base)}", f"base_model_relation: {'adapter' if lora else 'finetune'}"]
    if datasets := _datasets(run.data):
        lines += [f"datasets: {json.dumps(datasets)}"]
    if license:
        lines += [f"license: {json.dumps(license)}"]
    return [*lines, f"library_name: {'peft' if lora else 'transformers'}", "tags: [finetune-operator]", "---"]


def _recipe(run: RunConfig, figures: Figures, *, merged: bool) -> list[str]:
    t = run.training
    length = f"{t.max_steps} steps" if t.max_steps is not None else f"{t.epochs or 3:g} epochs"
    unit = "preference pairs" if t.objective == "dpo" else "examples"
    return [
        f"- method: {run.method}" + (", merged into the base" if merged else "") + _adapter(run.lora),
        f"- {figures.steps} optimizer steps ({length} requested) of {t.global_batch_size} {unit}",
        f"- {_OPTIMIZERS[t.optimizer]}, learning rate {t.learning_rate:g} ({t.scheduler}, warm-up "
        f"{t.warmup_ratio:g}), weight decay {t.weight_decay:g}, gradient norm at most {t.max_grad_norm:g}, seed "
        f"{t.seed}",
    ]


def _losses(figures: Figures) -> list[str]:
    losses = (
        ("validation", figures.eval_loss),
        ("test, base model", figures.test_before),
        ("test, this result", figures.test_after),
    )
    return [f"| {name} | {loss:.4f} |" for name, loss in losses if loss is not None]


def _loss_definition(training: TrainingSpec) -> str:
    if training.objective == "dpo":
        return f"Mean DPO loss per preference pair (beta {(training.dpo or DpoSpec()).beta:g})."
    return "Mean loss per supervised token."


def _usage(*, lora: bool) -> str:
    if lora:
        return (
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("<base>"), "<this folder>")'
        )
    return (
        'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("<this folder>")'
    )


def _sources(data: DataConfig) -> list[str]:
    """Returns a table row for each source of rows, and for each split cut from the train rows."""
    listed = [
        f"| {split} | `{source.location.display.replace('|', '%7C')}` | {weight} |"
        for split in ("train", "validation", "test")
        for source in data.sources_of(split)
        for weight in (f"{source.weight:g}" if split == "train" else "",)
    ]
    held_out: tuple[tuple[str, float | None], ...] = (
        ("validation", data.validation_fraction),
        ("test", data.test_fraction),
    )
    return listed + [
        f"| {name} | {fraction:.3g} of the train rows, chosen by content | |" for name, fraction in held_out if fraction
    ]


def _datasets(data: DataConfig) -> list[str]:
    """Returns the data sets of the Hugging Face Hub as owner/name."""
    uris = [source.location.uri for split in ("train", "validation", "test") for source in data.sources_of(split)]
    return list(dict.fromkeys("/".join(uri[5:].split("/")[:2]) for uri in uris if uri.startswith("hf://")))


def _adapter(lora: LoraSpec | None) -> str:
    if lora is None:
        return ""
    return f", rank {lora.rank}, alpha {lora.alpha}, dropout {lora.dropout:g}, on {', '.join(lora.target_modules)}"
