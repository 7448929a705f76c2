"""Writes folders that look like those of published models to whatever reads only their headers."""

from __future__ import annotations

import json
import math
from pathlib import Path

from sizing.models import PublishedModel, tensor_shapes

_BYTES = 2  # of a weight in bfloat16


def write(model: PublishedModel, folder: Path) -> Path:
    """Creates the folder, with a config.json and a file of weights that takes no space: all of them
    are zeros, in a hole of the file. Returns the folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **model.config}))
    header, end = {}, 0
    for name, shape in tensor_shapes(model).items():
        begin, end = end, end + math.prod(shape) * _BYTES
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (begin, end)}
    encoded = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(file.tell() + end)
    return folder
