"""Which number format a GPU computes in, by its generation, and what is said about int8."""

from __future__ import annotations

import pytest
import torch

from finetune_trainer.errors import RunError
from finetune_trainer.model import precision, quantization

# CUDA GPUs and their compute capabilities, by NVIDIA's list.
_GPUS = {
    "Tesla P100": (6, 0),
    "Tesla V100": (7, 0),
    "Tesla T4": (7, 5),
    "NVIDIA A100": (8, 0),
    "NVIDIA A10G": (8, 6),
    "NVIDIA L40S": (8, 9),
    "NVIDIA H100": (9, 0),
    "NVIDIA B200": (10, 0),
    "NVIDIA RTX PRO 6000": (12, 0),
}
_OLDER_THAN_AMPERE = {"Tesla P100", "Tesla V100", "Tesla T4"}


@pytest.mark.parametrize("gpu", _GPUS)
def test_auto_is_bfloat16_as_of_ampere(gpu: str) -> None:
    dtype, reason = precision.choose_for_gpu("auto", gpu, _GPUS[gpu])
    assert gpu in reason
    if gpu in _OLDER_THAN_AMPERE:
        assert dtype == "float32"
        for part in (
            "older than Ampere",
            "twice the memory",
            "tensor cores aren't used",
            "use a GPU of Ampere or newer",
        ):
            assert part in reason
    else:
        assert (dtype, "Ampere" in reason) == ("bfloat16", False)


@pytest.mark.parametrize("gpu", _GPUS)
def test_bfloat16_is_refused_by_a_gpu_that_would_emulate_it(gpu: str) -> None:
    if gpu not in _OLDER_THAN_AMPERE:
        assert precision.choose_for_gpu("bfloat16", gpu, _GPUS[gpu]) == ("bfloat16", "set by model.dtype")
        return
    with pytest.raises(RunError) as raised:
        precision.choose_for_gpu("bfloat16", gpu, _GPUS[gpu])
    assert raised.value.reason == "InvalidConfig"
    for part in ("model.dtype bfloat16", gpu, "use auto or float32", "Ampere or newer"):
        assert part in raised.value.message


@pytest.mark.parametrize("gpu", _GPUS)
def test_float32_is_what_it_says(gpu: str) -> None:
    assert precision.choose_for_gpu("float32", gpu, _GPUS[gpu])[0] == "float32"


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_on_a_gpu_in_bfloat16_comes_with_a_warning_and_a_remedy(
    kind: str, device: str, dtype: torch.dtype
) -> None:
    warning = quantization.warning(kind, device, dtype)
    if (kind, device, dtype) != ("int8", "cuda", torch.bfloat16):
        assert warning == ""
        return
    for part in ("float16", "may overflow", "use model.quantization nf4"):
        assert part in warning
