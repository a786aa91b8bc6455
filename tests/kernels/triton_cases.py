"""The cases of the Triton bodies of fisher, as tests; those of update are in triton_update_cases.py.

They run twice: on CPU tensors in a process of Triton's interpreter (test_triton_interpreter.py), and on a GPU
(test_gpu.py imports them). The name keeps pytest from collecting this file by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from fibecfed_kernels import FisherDiag, clipped_grad, fisher_diag, lora_fisher_diag, use_backend
from tests.kernels.oracle import assert_near, clipped_truth, fisher_inputs, fisher_truth

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def triton_body(poisoned: None) -> Iterator[None]:
    """Every op below runs its Triton body (CUDA tensors do by themselves), and what it leaves unwritten is NaN."""
    with use_backend("triton") if DEVICE == "cpu" else nullcontext():
        yield


def assert_true(found: FisherDiag, x: Tensor, grad_y: Tensor, cu_seqlens: Tensor | None = None) -> None:
    assert found.weight_grad is not None
    for actual, truth in zip(found, fisher_truth(x, grad_y, cu_seqlens), strict=True):
        assert_near(actual.cpu(), truth, "fisher on tensor cores" if x.is_cuda and x.dtype != FP32 else "fisher")


def lora_inputs(
    samples: int, tokens: int, d_in: int, ranks: tuple[int, ...], d_outs: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    x, _ = fisher_inputs(samples, tokens, d_in, 1, dtype, device=DEVICE)
    sizes = list(zip(ranks, d_outs, strict=True))
    pairs = [fisher_inputs(samples, tokens, r, d, dtype, i + 1, DEVICE) for i, (r, d) in enumerate(sizes)]
    grad_h = [fisher_inputs(samples, tokens, r, 1, dtype, i + 101, DEVICE)[0] for i, r in enumerate(ranks)]
    return x, [h for h, _ in pairs], grad_h, [grad_y for _, grad_y in pairs]


def equal(a: FisherDiag, b: FisherDiag) -> bool:
    return all(torch.equal(one, two) for one, two in zip(a, b, strict=True) if one is not None and two is not None)


@pytest.mark.parametrize(
    ("samples", "tokens", "d_in", "d_out", "dtype"),
    [
        (7, 63, 31, 384, BF16),
        (7, 1, 384, 4, FP16),
        (1, 257, 1000, 31, FP32),
        (1, 1, 1, 1, BF16),
        (2, 63, 384, 384, FP16),
        (1, 63, 4096, 4, BF16),
        (2, 3, 1, 4096, FP32),
        (0, 63, 31, 12, FP32),
        (2, 0, 31, 12, FP16),
    ],
)
def test_fisher_diag_is_the_square_of_the_gradient_of_each_sample(
    samples: int, tokens: int, d_in: int, d_out: int, dtype: torch.dtype
) -> None:
    x, grad_y = fisher_inputs(samples, tokens, d_in, d_out, dtype, device=DEVICE)
    assert_true(fisher_diag(x, grad_y, weight_grad=True), x, grad_y)


@pytest.mark.parametrize(
    ("samples", "tokens", "d_in", "d_out", "dtype"),
    [(7, 33, 31, 384, BF16), (2, 63, 384, 12, FP32), (9, 1, 1, 1, FP16), (0, 5, 31, 4, FP32)],
)
def test_clipped_gradients_are_scaled_sample_by_sample(
    samples: int, tokens: int, d_in: int, d_out: int, dtype: torch.dtype
) -> None:
    x, grad_y = fisher_inputs(samples, tokens, d_in, d_out, dtype, device=DEVICE)
    scores = fisher_diag(x, grad_y).scores
    max_norm = float(scores.sqrt().median()) if samples else 1.0
    found = clipped_grad(x, grad_y, scores, max_norm)
    assert_near(found.cpu(), clipped_truth(x, grad_y, scores, max_norm), "fisher")


@pytest.mark.parametrize(
    ("samples", "tokens", "d_in", "ranks", "d_outs", "dtype"),
    [
        (7, 63, 384, (8,), (384,), BF16),
        (9, 1, 31, (1,), (1,), FP16),
        (1, 257, 1000, (4,), (31,), FP32),
        (2, 63, 384, (12, 12, 8), (31, 384, 1), FP16),  # 32 rows
        (2, 33, 31, (16, 1), (384, 31), FP32),  # 17 rows: one more than a tile of 16
        (2, 63, 384, (64, 12), (31, 1000), BF16),  # 76 rows: two tiles of 64
        (2, 17, 31, (64,), (384,), FP32),
        (0, 63, 31, (8,), (12,), BF16),
        (2, 0, 31, (8, 4), (12, 4), FP32),
    ],
)
def test_lora_fisher_diag_is_that_of_both_matrices_of_every_module(
    samples: int, tokens: int, d_in: int, ranks: tuple[int, ...], d_outs: tuple[int, ...], dtype: torch.dtype
) -> None:
    x, h, grad_h, grad_y = lora_inputs(samples, tokens, d_in, ranks, d_outs, dtype)
    for m, found in enumerate(lora_fisher_diag(x, h, grad_h, grad_y, weight_grad=True)):
        assert_true(found.a, x, grad_h[m])
        assert_true(found.b, h[m], grad_y[m])


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_packed_samples_give_the_truth_and_the_bits_of_padded_ones(dtype: torch.dtype) -> None:
    lengths = (63, 0, 1, 32, 0)
    x, h, grad_h, grad_y = lora_inputs(5, 63, 200, (8,), (31,), dtype)
    live = torch.arange(63, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]
    padded = [t * live[..., None] for t in (x, h[0], grad_h[0], grad_y[0])]
    packed = [t[live] for t in padded]
    cu_seqlens = torch.tensor((0, *lengths), device=DEVICE).cumsum(0).int()
    strided = torch.stack([cu_seqlens, cu_seqlens + 1], 1)[:, 0]
    found = lora_fisher_diag(*packed, strided, weight_grad=True)
    assert_true(found.a, packed[0], packed[2], cu_seqlens)
    assert_true(found.b, packed[1], packed[3], cu_seqlens)
    dense = lora_fisher_diag(*padded, weight_grad=True)
    assert equal(found.a, dense.a)
    assert equal(found.b, dense.b)


def test_a_score_has_the_same_bits_alone_and_beside_any_neighbours() -> None:
    inputs = lora_inputs(19, 40, 31, (8, 4), (12, 31), BF16)  # more samples than groups
    x, *lists = inputs
    together = lora_fisher_diag(x, *lists)
    for n in (0, 8, 18):
        alone = lora_fisher_diag(x[n : n + 1], *([t[n : n + 1] for t in ts] for ts in lists))
        for whole, single in zip(together, alone, strict=True):
            assert torch.equal(whole.a.scores[n : n + 1], single.a.scores)
            assert torch.equal(whole.b.scores[n : n + 1], single.b.scores)
    x = x.clone()
    x[3] = float("nan")
    poisoned = lora_fisher_diag(x, *lists)[0].a.scores
    others = torch.arange(19, device=DEVICE) != 3
    assert torch.equal(poisoned[others], together[0].a.scores[others])
    assert poisoned[3].isnan()


def test_the_same_input_gives_the_same_bits_with_and_without_the_gradient() -> None:
    inputs = lora_inputs(9, 17, 31, (8, 4), (140, 12), FP32)
    first, again, without = (lora_fisher_diag(*inputs, weight_grad=grad) for grad in (True, True, False))
    for m in range(2):
        assert equal(first[m].a, again[m].a)
        assert equal(first[m].b, again[m].b)
        assert without[m].a.weight_grad is None
        assert equal(first[m].a, without[m].a)


def test_strided_inputs_are_read_as_they_are_meant() -> None:
    x, grad_y = fisher_inputs(2, 33, 62, 12, FP32, device=DEVICE)
    found = fisher_diag(x[..., ::2], grad_y.transpose(0, 1).contiguous().transpose(0, 1), weight_grad=True)
    assert_true(found, x[..., ::2], grad_y)
