"""Runs the Triton kernels in Triton's interpreter, and prints how far they are from float64 as
JSON.

Each error is the largest one of a tensor, in units of the last place (of the number format, at the
size of the value or of the row's largest gradient). It needs TRITON_INTERPRET=1.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from finetune_trainer.kernels.cuda import launch, reference

_SIZES = ((1, 1), (5, 7), (17, 96), (2, 4096))
_MAGNITUDES = (1.0, 1e-4, 3e4)
_EPSILON = 1e-6


def main() -> None:
    torch.manual_seed(0)
    errors: dict[str, float] = {}
    for dtype in (torch.bfloat16, torch.float32):
        for size in _SIZES:
            for magnitude in _MAGNITUDES:
                name = f"{str(dtype)[6:]} {size} x {magnitude:g}"
                errors |= {f"{name} {key}": value for key, value in _errors(size, magnitude, dtype).items()}
        errors |= {f"{str(dtype)[6:]} {key}": value for key, value in _poisoned(dtype).items()}
    print(json.dumps(errors))


def _errors(size: tuple[int, int], magnitude: float, dtype: torch.dtype) -> dict[str, float]:
    hidden, delta, slope, beyond, gate, up = (torch.randn(size).to(dtype) for _ in range(6))
    hidden, delta, gate = hidden * magnitude, delta * magnitude, gate * min(magnitude, 30.0)
    weight = torch.randn(size[1]).to(dtype)
    errors: dict[str, float] = {}
    for shifted in (False, True):
        for add in (None, delta):
            total, out, inverse = launch.rms_norm(hidden, add, weight, _EPSILON, shifted)
            base = hidden if add is None else total
            exact = reference.rms_norm(base.double(), None, weight.double(), _EPSILON, shifted)
            name = f"norm{' of a sum' if add is not None else ''}{' shifted' if shifted else ''}"
            errors[name] = _ulps(out, exact[1])
            if add is not None:
                errors["sum"] = _ulps(total, hidden.double() + delta.double())
            more = None if add is None else beyond
            arguments = [slope, more, base, weight]
            by_hidden, by_weight = launch.rms_norm_backward(*arguments, inverse, shifted, True)
            wide = [None if tensor is None else tensor.double() for tensor in arguments]
            exact_gradients = reference.rms_norm_backward(*wide, exact[2], shifted, True)
            terms = slope.double() * (weight.double() + shifted) * exact[2][:, None]
            errors[f"{name} by input"] = _ulps(by_hidden, exact_gradients[0], terms)
            errors[f"{name} by weight"] = _ulps(by_weight, exact_gradients[1], exact_gradients[1])
            frozen = launch.rms_norm_backward(*arguments, inverse, shifted, False)[0]
            errors[f"{name}, frozen"] = 0.0 if torch.equal(frozen, by_hidden) else float("inf")
    for gelu in (False, True):
        name = "geglu" if gelu else "swiglu"
        exact_product = reference.gated(gate.double(), up.double(), gelu)
        errors[name] = _ulps(launch.gated(gate, up, gelu), exact_product, gate.double() * up.double())
        exact_pair = reference.gated_backward(slope.double(), gate.double(), up.double(), gelu)
        for part, ours, exact_part in zip("gu", launch.gated_backward(slope, gate, up, gelu), exact_pair, strict=True):
            errors[f"{name} by {part}"] = _ulps(ours, exact_part, slope.double() * (1 + gate.double().abs()))
    if size[1] % 2 == 0:
        errors |= _rotary_errors(size, magnitude, dtype)
    return errors


def _rotary_errors(size: tuple[int, int], magnitude: float, dtype: torch.dtype) -> dict[str, float]:
    length, width = size
    errors = {}
    for batches in (1, 2):
        heads = (torch.randn(2, length, 3, width) * magnitude).to(dtype).transpose(1, 2)
        cos, sin = (torch.randn(batches, length, width).to(dtype) for _ in range(2))
        for backward in (False, True):
            ours = launch.rotary(heads, cos, sin, backward)
            exact = reference.rotary(heads.double(), cos.double(), sin.double(), backward)
            errors[f"rotary, {batches} tables{', backward' if backward else ''}"] = _ulps(ours, exact, exact)
            assert ours.transpose(1, 2).is_contiguous()
    return errors


def _poisoned(dtype: torch.dtype) -> dict[str, float]:
    """What a row of infinities and NaN changes in the others: nothing."""
    clean = [torch.randn(9, 24).to(dtype) for _ in range(3)]
    bad = [tensor.clone() for tensor in clean]
    for tensor in bad[:2]:
        tensor[4, ::2], tensor[4, 1::2] = float("inf"), float("nan")
    clean[2][4] = bad[2][4] = 0  # padding has no gradient
    weight = torch.randn(24).to(dtype)
    other_rows = [row for row in range(9) if row != 4]
    different = 0
    for (hidden, delta, slope), (bad_hidden, bad_delta, _) in ((clean, bad),):
        for add, bad_add in ((None, None), (delta, bad_delta)):
            results = []
            for x, d in ((hidden, add), (bad_hidden, bad_add)):
                total, out, inverse = launch.rms_norm(x, d, weight, _EPSILON, False)
                base = x if d is None else total
                results.append((out, *launch.rms_norm_backward(slope, None, base, weight, inverse, False, True)))
            different += not torch.equal(results[0][2], results[1][2])
            different += sum(
                not torch.equal(a[other_rows], b[other_rows]) for a, b in zip(*results, strict=True) if a.dim() == 2
            )
        for gelu in (False, True):
            pairs = [
                (launch.gated(x, d, gelu), *launch.gated_backward(slope, x, d, gelu))
                for x, d in ((hidden, delta), (bad_hidden, bad_delta))
            ]
            different += sum(not torch.equal(a[other_rows], b[other_rows]) for a, b in zip(*pairs, strict=True))
    return {"rows beside inf and NaN": float("inf") if different else 0.0}


def _ulps(computed: Tensor, exact: Tensor, terms: Tensor | None = None) -> float:
    """Returns the largest error in units of the last place of each value, or of the row's largest
    of the `terms` that it is made of, which may cancel."""
    size = exact.abs()
    if terms is not None:
        size = torch.maximum(size, terms.abs()).amax(-1, keepdim=True)
    unit = size.clamp_min(1e-30) * torch.finfo(computed.dtype).eps
    return float(((computed.double() - exact).abs() / unit).max())


if __name__ == "__main__":
    main()
