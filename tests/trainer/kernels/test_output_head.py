"""The output head as on a GPU: its fused softmax, by Triton's interpreter and compiler and by its
reference, and what the host knows without asking the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from finetune_trainer.data.batching import packed_layout
from finetune_trainer.data.batching.collator import Collator
from finetune_trainer.kernels import chunked_cross_entropy
from finetune_trainer.kernels.cuda import softmax
from trainer.support.printed_figures import printed_figures

_WIDTH, _VOCABULARY, _POSITIONS = 16, 301, 70


def test_the_interpreted_kernel_is_as_exact_as_its_number_formats() -> None:
    errors = printed_figures("interpreted_softmax", TRITON_INTERPRET="1")
    assert len(errors) == 26
    assert {name: error for name, error in errors.items() if not error <= 4.0} == {}


def test_the_kernel_compiles_for_every_architecture() -> None:
    sizes = printed_figures("compiled_softmax")
    assert len(sizes) == 12
    assert all(sizes.values())


@pytest.fixture
def fused() -> Iterator[None]:
    """Takes the branch of a GPU, with the reference of the kernel, in several chunks."""
    with (
        mock.patch.object(softmax, "supports", return_value=True),
        mock.patch.dict(chunked_cross_entropy.CHUNK_BYTES, cpu=32 * _VOCABULARY * 4),
    ):
        yield


@dataclass(frozen=True)
class Head:
    """A loss and its gradients. Position 3 has one target three times and another one once."""

    losses: Tensor
    by_hidden: Tensor
    by_weight: Tensor

    @classmethod
    def of(cls, scale: float = 1.0, *, chunked: bool = True) -> Head:
        torch.manual_seed(0)
        layer = torch.nn.Linear(_WIDTH, _VOCABULARY, bias=False)
        hidden = (scale * torch.randn(1, _POSITIONS, _WIDTH)).requires_grad_()
        chosen = torch.cat([torch.arange(_POSITIONS).flip(0), torch.tensor([3, 3, 3])])
        labels = torch.randint(_VOCABULARY, (len(chosen),))
        labels[-2:] = labels[_POSITIONS - 1 - 3]
        losses = torch.zeros(len(chosen))
        if chunked:
            head = chunked_cross_entropy.ChunkedHead(layer)
            sorted_chosen = np.sort(chosen.numpy())
            targets = chunked_cross_entropy.Targets(
                labels, chosen, None, None, losses, sorted_chosen=sorted_chosen
            )  # fmt: skip
            with head.computing(targets):
                loss = layer(hidden).sum()
        else:
            logits = layer(hidden)[0]
            losses = functional.cross_entropy(logits[chosen], labels, reduction="none")
            loss = losses.sum()
        (0.25 * loss).backward()
        assert hidden.grad is not None
        assert layer.weight.grad is not None
        return cls(losses.detach(), hidden.grad, layer.weight.grad)


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["uncertain", "certain"])
def test_the_fused_head_is_cross_entropy(scale: float) -> None:
    ours, exact = Head.of(scale), Head.of(scale, chunked=False)
    torch.testing.assert_close(ours.losses, exact.losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.by_hidden, exact.by_hidden, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.by_weight, exact.by_weight, rtol=1e-4, atol=2e-6 * scale)


@pytest.mark.usefixtures("fused")
def test_the_gradient_of_a_token_that_is_nearly_certain_is_exact_in_bfloat16() -> None:
    """1 - p = 0.0009 would be lost if p were rounded to bfloat16 first."""
    layer = torch.nn.Linear(2, 2, bias=False).bfloat16()
    layer.weight.requires_grad_(False).copy_(torch.eye(2))
    hidden = torch.tensor([[[7.0, 0.0]]], dtype=torch.bfloat16, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.int64)
    targets = chunked_cross_entropy.Targets(zero, zero.clone(), None, torch.bfloat16, sorted_chosen=zero.numpy())
    with chunked_cross_entropy.ChunkedHead(layer).computing(targets):
        layer(hidden).sum().backward()
    missing = torch.softmax(torch.tensor([7.0, 0.0]), 0)[1]
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad.float().flatten(), torch.stack([-missing, missing]), rtol=1e-2, atol=0)


def test_the_gradients_are_scaled_in_place_so_a_second_backward_pass_is_an_error() -> None:
    layer = torch.nn.Linear(_WIDTH, _VOCABULARY)
    zero = torch.zeros(1, dtype=torch.int64)
    with chunked_cross_entropy.ChunkedHead(layer).computing(chunked_cross_entropy.Targets(zero, zero, None, None)):
        loss = layer(torch.randn(1, 1, _WIDTH)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@dataclass(frozen=True)
class Rows:
    """Stands for a split: examples with prompts of different lengths."""

    pairs: bool = False

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray, int]:
        length = 5 + 3 * index
        return np.arange(length), np.arange(length) >= index + 1, index + 2


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("encoder_decoder", [True, False], ids=["encoder-decoder", "decoder"])
def test_the_host_has_the_positions_of_the_targets(packed: bool, encoder_decoder: bool) -> None:
    collator = Collator(packed, False, encoder_decoder, 0, 0, torch.device("cpu"))
    batch = collator(Rows(), (0, 1, 2))  # type: ignore[arg-type]
    assert batch.sorted_chosen is not None
    assert batch.sorted_chosen.tolist() == sorted(batch.chosen.tolist())


def test_rows_have_few_sizes_on_a_gpu() -> None:
    sizes = {packed_layout.pack([length], [0], packed_layout.grain("cuda")).layout.size for length in range(1, 513)}
    assert sizes == {128, 256, 384, 512}
    assert packed_layout.pack([33], [0], packed_layout.grain("cpu")).layout.size == 64
