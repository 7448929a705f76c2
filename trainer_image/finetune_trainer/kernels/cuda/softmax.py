"""Computes the softmax of the output head and its gradient in place, in one kernel that reads the
logits twice and writes them once.

PyTorch's own operations need seven passes over them, most of them in float32.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

_LOG = logging.getLogger(__name__)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@torch.library.custom_op("finetune::softmax_gradient_", mutates_args={"logits"})
def softmax_gradient_(logits: Tensor, counts: Tensor, write: bool) -> Tensor:
    """Returns the logarithm of the sum of exponentials of each row of `logits`, (rows, vocabulary),
    in float32.

    With `write`, each row becomes its softmax times its entry of `counts` (rows), and zeros if that
    is 0. This version is the reference; on CUDA, a Triton kernel computes the same.
    """
    log_sums = torch.logsumexp(logits.float(), -1)
    if write:
        p = torch.exp(logits.float() - log_sums[:, None]).mul_(counts[:, None])
        logits.copy_(p.masked_fill_(counts[:, None] == 0, 0.0))
    return log_sums


@softmax_gradient_.register_fake
def _(logits: Tensor, counts: Tensor, write: bool) -> Tensor:
    return logits.new_empty(len(logits), dtype=torch.float32)


@softmax_gradient_.register_kernel("cuda")
def launch(logits: Tensor, counts: Tensor, write: bool) -> Tensor:
    """Calls the Triton kernel. With TRITON_INTERPRET=1, it runs on the CPU."""
    from finetune_trainer.kernels.cuda import softmax_kernel as kernels

    log_sums = logits.new_empty(len(logits), dtype=torch.float32)
    if len(logits):
        kernels.softmax_gradient[(len(logits),)](
            logits, counts, log_sums, logits.shape[1], WRITE=write, B=kernels.BLOCK, num_warps=kernels.WARPS
        )
    return log_sums


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns whether `softmax_gradient_` computes logits of this format in one kernel."""
    return device.type == "cuda" and dtype in _DTYPES and _works(dtype)


@cache
def _works(dtype: torch.dtype) -> bool:
    """Returns whether Triton compiles the kernel on this machine and it computes what it should."""
    wave = torch.linspace(-4, 4, 2 * 5000, device="cuda").sin().mul(9).view(2, 5000).to(dtype)
    counts = torch.tensor([1.0, 2.0], device="cuda")
    try:
        computed = wave.clone()
        log_sums = softmax_gradient_(computed, counts, True)
    except Exception as error:  # whatever stops the compiler, PyTorch's own operations remain
        _LOG.warning("the softmax of the output head isn't fused reason=%r", error)
        return False
    exact = torch.softmax(wave.float(), -1) * counts[:, None]
    equal = torch.allclose(log_sums, torch.logsumexp(wave.float(), -1), rtol=1e-5)
    return bool(equal and torch.allclose(computed.float(), exact, rtol=1e-2, atol=1e-6))


@cache
def accumulates_products(device_type: str, dtype: torch.dtype) -> bool:
    """Returns whether a product of 16-bit matrices can be added to a float32 matrix by the product
    itself, which needs a kernel of PyTorch's that not every version and device has."""
    if device_type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    factors = torch.ones(2, 16, 16, device="cuda", dtype=dtype)
    total = torch.full((16, 16), 2.0, device="cuda")
    try:
        torch.addmm(total, factors[0], factors[1], out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        _LOG.warning("gradients of the output layer aren't accumulated by its products reason=%r", error)
        return False
    return bool((total == 18.0).all())
