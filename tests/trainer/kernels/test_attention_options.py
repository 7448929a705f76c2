"""Attention with windows, soft-capped scores, sinks, shared beginnings and any head size equals one
masked attention in float64, with the flash kernel's calls as on CUDA and with chunks of scores."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from finetune_trainer.data.batching import packed_layout
from finetune_trainer.kernels import attention_cuda, attention_reference, packed_row, sizes
from finetune_trainer.kernels.attention import chunked, flash_calls
from trainer.support import fake_flash
from trainer.support.masked_attention import SCALE, Problem, expected, problems

_NAMES = ("out", "query", "key", "value", "sinks")
_Attend = Callable[[Problem, Tensor, Tensor, Tensor, Tensor | None], Tensor]


def _by_flash(problem: Problem, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
    return attention_cuda.attend(query, key, value, sinks, SCALE, problem.window)[0]


def _by_chunks(problem: Problem, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
    return chunked.attend(query, key, value, sinks, SCALE, problem.window, problem.softcap)[0]


def _by_reference(problem: Problem, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
    return attention_reference.attend(
        problem.row, query, key, value, SCALE, sinks=sinks, window=problem.window, softcap=problem.softcap
    )


def _computed(attend: _Attend, problem: Problem, inputs: list[Tensor], weight: Tensor) -> list[Tensor]:
    """Returns the output and the gradients of query, key, value and, if there are any, sinks."""
    leaves = [tensor.clone().requires_grad_() for tensor in (inputs if problem.has_sinks else inputs[:3])]
    with packed_row.computing(problem.row):
        out = attend(problem, *leaves[:3], leaves[3] if problem.has_sinks else None)
        return [out.detach(), *torch.autograd.grad(out, leaves, weight)]


def _errors(attend: _Attend, problem: Problem, dtype: torch.dtype) -> dict[str, float]:
    """Returns the distances from float64, relative to the norm if it is more than 1: a token that
    attends only to itself has gradients of zero."""
    inputs, weight = problem.inputs(dtype), problem.weight(dtype)
    computed = _computed(attend, problem, inputs, weight)
    exact = expected(problem, inputs, weight)
    return {
        name: float((tensor.double() - other).norm() / max(1.0, float(other.norm())))
        for name, tensor, other in zip(_NAMES, computed, exact, strict=False)
    }


@given(problems())
@settings(max_examples=40, deadline=None)
def test_the_flash_kernels_calls_add_nothing_but_rounding(problem: Problem) -> None:
    with fake_flash.installed(exact=True):
        errors = _errors(_by_flash, problem, torch.float64)
    assert max(errors.values()) < 1e-12, errors


@given(problems())
@settings(max_examples=20, deadline=None)
def test_attention_on_cuda_is_as_exact_as_bfloat16(problem: Problem) -> None:
    """The fake kernel refuses whatever the real one does."""
    with fake_flash.installed():
        errors = _errors(_by_flash, problem, torch.bfloat16)
    assert max(errors.values()) < 2e-2, errors


@pytest.mark.parametrize("attend", [_by_chunks, _by_reference])
@given(problem=problems(multiple=5, softcaps=True), scores=st.sampled_from([64, 2**24]))
@settings(max_examples=40, deadline=None)
def test_chunks_of_scores_equal_one_masked_attention(attend: _Attend, problem: Problem, scores: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "ATTENTION_SCORES", scores)
        errors = _errors(attend, problem, torch.float64)
    assert max(errors.values()) < 1e-12, errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_chunks_of_scores_compute_scores_in_float32_even_inside_autocast(dtype: torch.dtype) -> None:
    problem = Problem((90, 95, 60, 130), (0, 70, 0, 50), 6, 2, 20, window=33, softcap=0.7, has_sinks=True)
    plain = _computed(_by_chunks, problem, problem.inputs(dtype), problem.weight(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        inside = _computed(_by_chunks, problem, problem.inputs(dtype), problem.weight(dtype))
    assert all(torch.equal(one, other) for one, other in zip(plain, inside, strict=True))
    errors = _errors(_by_chunks, problem, dtype)
    assert max(errors.values()) < (1e-6 if dtype == torch.float32 else 1e-2), errors


@pytest.mark.parametrize("readers", [34, 300])
def test_the_gradient_of_a_beginning_that_many_examples_share_is_summed_in_float32(readers: int) -> None:
    """One addition after another in bfloat16 would be off by 2% with 300 readers."""
    problem = Problem((307,) * readers, (0, *(287,) * (readers - 1)), 2, 1, 8)
    inputs, weight = problem.inputs(torch.bfloat16), problem.weight(torch.bfloat16)
    weight = weight.abs()  # values whose sum grows with the number of readers
    with fake_flash.installed() as fake:
        once, again = (_computed(_by_flash, problem, inputs, weight) for _ in range(2))
    leaves = [tensor.double().requires_grad_() for tensor in inputs[:3]]
    out = attention_reference.attend(problem.row, *leaves, SCALE)
    exact = [out, *torch.autograd.grad(out, leaves, weight.double())]
    shared = slice(0, 287)
    for index in (2, 3):
        error = (once[index][:, :, shared].double() - exact[index][:, :, shared]).norm()
        assert float(error / exact[index][:, :, shared].norm()) < 4e-3, _NAMES[index]
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))
    assert max(fake.gathered_keys) <= sizes.GATHERED_KEYS * problem.row.size
    assert fake.forward_calls == 2 * len(flash_calls.flash_calls(problem.row, torch.device("cpu")))


def test_only_what_the_layer_computed_is_stored_for_the_backward_pass() -> None:
    """Gathered keys would be as large as those of all examples without sharing."""
    problem = Problem((307,) * 30, (0, *(287,) * 29), 2, 1, 8)
    leaves = [tensor.requires_grad_() for tensor in problem.inputs(torch.bfloat16)[:3]]
    stored: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        stored[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with fake_flash.installed(), packed_row.computing(problem.row):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = _by_flash(problem, *leaves, None)
        out.sum().backward()
    tokens, q, k = problem.row.size, 2 * 8, 8
    assert sum(stored.values()) == tokens * (2 * (2 * q + 2 * k) + 4 * 2)


def test_a_row_of_single_tokens_is_its_values() -> None:
    problem = Problem((1,) * 32, (0,) * 32, 4, 2, 8)
    inputs = problem.inputs(torch.bfloat16)
    with fake_flash.installed(), packed_row.computing(problem.row):
        out = _by_flash(problem, *inputs[:3], None)
    assert torch.equal(out, inputs[2].repeat_interleave(2, dim=1).transpose(1, 2))


def test_tensors_whose_last_dimension_isnt_contiguous_are_copied() -> None:
    problem = Problem((40, 30), (0, 20), 4, 2, 8)
    inputs = problem.inputs(torch.bfloat16)
    strided = [tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in inputs[:3]]
    weight = problem.weight(torch.bfloat16)
    with fake_flash.installed():
        usual = _computed(_by_flash, problem, inputs, weight)
        copied = _computed(_by_flash, problem, [*strided, inputs[3]], weight)
    assert all(torch.equal(one, other) for one, other in zip(usual, copied, strict=True))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "dtype", "supported"),
    [
        (8, 2, 64, torch.bfloat16, True),
        (8, 2, 80, torch.float16, True),
        (8, 8, 256, torch.bfloat16, True),
        (4, 4, 36, torch.bfloat16, False),
        (4, 4, 100, torch.bfloat16, False),
        (4, 4, 264, torch.bfloat16, False),
        (6, 4, 64, torch.bfloat16, False),
        (8, 2, 64, torch.float32, False),
        (8, 2, 64, torch.float64, False),
    ],
)
def test_the_flash_kernel_is_used_for_exactly_what_it_accepts(
    heads: int, kv_heads: int, size: int, dtype: torch.dtype, supported: bool
) -> None:
    shapes = [(1, count, 32, size) for count in (heads, kv_heads, kv_heads)]
    with FakeTensorMode():
        tensors = [torch.empty(shape, dtype=dtype, device="cuda") for shape in shapes]
        assert attention_cuda.supports(*tensors) == supported
        other = tensors[2].to(torch.float32)
        assert not attention_cuda.supports(tensors[0], tensors[1], other)
    borders = torch.tensor([0, 32], dtype=torch.int32)
    q, k, v = (torch.zeros(32, shape[1], size, dtype=dtype) for shape in shapes)
    with fake_flash.installed():
        try:
            torch.ops.aten._flash_attention_forward(q, k, v, borders, borders, 32, 32, 0.0, True, False)
        except RuntimeError:
            assert not supported
        else:
            assert supported


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"borders": torch.tensor([0, 32])}, "must have dtype int32"),
        ({"borders": torch.tensor([0, 99, 32], dtype=torch.int32)[::2]}, "must be contiguous"),
        ({"borders": torch.tensor([0, 31], dtype=torch.int32)}, "borders must cover the tensor"),
        ({"longest": 31}, "longer than the stated maximum"),
    ],
)
def test_the_fake_kernel_is_strict(change: dict[str, object], message: str) -> None:
    options = {"borders": torch.tensor([0, 32], dtype=torch.int32), "longest": 32, **change}
    q = torch.zeros(32, 2, 8, dtype=torch.bfloat16)
    borders, longest = options["borders"], options["longest"]
    with fake_flash.installed(), pytest.raises(RuntimeError, match=message):
        torch.ops.aten._flash_attention_forward(q, q, q, borders, borders, longest, longest, 0.0, True, False)


def test_attention_outside_of_a_row_is_an_error() -> None:
    query = torch.zeros(1, 1, 8, 8)
    for attend in (_by_flash, _by_chunks):
        with pytest.raises(RuntimeError, match="outside of packed_row"):
            attend(Problem((8,), (0,), 1, 1, 8), query, query, query, None)


def test_a_window_leaves_out_the_keys_before_it() -> None:
    """So a long row needs the memory and the time of its window, not of its length."""
    row = packed_layout.pack([5000], [0]).layout
    pieces = list(chunked._pieces(row, 1, 100))
    assert max(sum(end - begin for begin, end in piece.spans) for piece in pieces) == 1024 + 99
