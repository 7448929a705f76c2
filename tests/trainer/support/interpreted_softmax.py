"""Runs the Triton kernel of the output head's softmax in Triton's interpreter, and prints how far
it is from float64, as JSON.

It needs TRITON_INTERPRET=1. Errors are in units of the last place: of the logarithms of sums in
float32, and of the gradients in the format of the logits, which the interpreter truncates.
"""

from __future__ import annotations

import json

import torch

from finetune_trainer.kernels.cuda import softmax, softmax_kernel

_SIZES = (1, 17, softmax_kernel.BLOCK, 2 * softmax_kernel.BLOCK + 3)
_COUNTS = (1.0, 0.0, 3.0, 1.0)


def main() -> None:
    torch.manual_seed(0)
    counts = torch.tensor(_COUNTS)
    errors = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for size in _SIZES:
            for spread in (1.0, 100.0):
                logits = (torch.randn(len(counts), size) * spread).to(dtype)
                errors[f"{str(dtype)[6:]} {size} x {spread:g}"] = _error(logits, counts)
    poisoned = torch.randn(len(counts), 50)
    poisoned[1] = float("inf")  # its count is 0
    errors["infinity without a target"] = _error(poisoned, counts, rows=[0, 2, 3])
    poisoned[1] = float("nan")
    errors["NaN without a target"] = _error(poisoned, counts, rows=[0, 2, 3])
    print(json.dumps(errors))


def _error(logits: torch.Tensor, counts: torch.Tensor, rows: list[int] | None = None) -> float:
    exact_sums = torch.logsumexp(logits.double(), -1)
    exact = torch.softmax(logits.double(), -1) * counts[:, None]
    computed, untouched = logits.clone(), logits.clone()
    log_sums = softmax.launch(computed, counts, True)
    rows = rows or list(range(len(counts)))
    if not torch.equal(softmax.launch(untouched, counts, False)[rows], log_sums[rows]):
        return float("inf")
    if not torch.equal(untouched[rows], logits[rows]) or computed[1].any():
        return float("inf")
    # The exponent's own rounding is multiplied by its size.
    size = exact_sums[rows].abs().clamp_min(1.0)
    sums = (log_sums[rows].double() - exact_sums[rows]).abs() / size / torch.finfo(torch.float32).eps
    scale = exact[rows].clamp_min(1e-6) * size[:, None].clamp_min(logits.abs().max().double() * 0.1)
    unit = scale * torch.finfo(logits.dtype).eps
    return float(max(sums.max(), ((computed[rows].double() - exact[rows]).abs() / unit).max()))


if __name__ == "__main__":
    main()
