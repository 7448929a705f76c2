"""Compiles the Triton kernel of the output head's softmax for GPUs on a machine without one, and
prints the bytes of each program, as JSON. ptxas comes with Triton."""

from __future__ import annotations

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from finetune_trainer.kernels.cuda import softmax_kernel as kernels

ARCHITECTURES = (80, 86, 89, 90, 100, 120)


def main() -> None:
    sizes = {}
    for write in (True, False):
        types = {"logits": "*bf16", "counts": "*fp32", "log_sums": "*fp32", "columns": "i32"}
        signature = types | {"WRITE": "constexpr", "B": "constexpr"}
        constants = {"WRITE": write, "B": kernels.BLOCK}
        source = ASTSource(fn=kernels.softmax_gradient, signature=signature, constexprs=constants)
        for architecture in ARCHITECTURES:
            target = GPUTarget("cuda", architecture, 32)
            kernel = triton.compile(source, target=target, options={"num_warps": kernels.WARPS})
            sizes[f"sm_{architecture}{', writes' if write else ''}"] = len(kernel.asm["cubin"])
    print(json.dumps(sizes))


if __name__ == "__main__":
    main()
