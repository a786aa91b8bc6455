"""Sums of clipped per-sample gradients: against a float64 loop, by what they are for, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fibecfed_kernels import clipped_grad, fisher_diag, lora_fisher_diag, use_backend

from .oracle import DTYPES, assert_near, clipped_truth, fisher_inputs

pytestmark = pytest.mark.usefixtures("one_thread")
bodies = pytest.mark.parametrize("body", ["reference", "cpp"])
X, GRAD_Y, SCORES = torch.ones(3, 5, 31), torch.ones(3, 5, 4), torch.ones(3)


@bodies
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d_in", "d_out"), [(384, 8), (8, 421), (70, 200), (1, 1)])
def test_each_sample_is_scaled_to_the_norm_and_then_summed(
    body: Any, dtype: torch.dtype, d_in: int, d_out: int, poisoned: None
) -> None:
    x, grad_y = fisher_inputs(19, 33, d_in, d_out, dtype)
    x[4] = 0  # a sample without a gradient
    with use_backend(body):
        scores = fisher_diag(x, grad_y).scores
        max_norm = float(scores.sqrt().median())
        found = clipped_grad(x, grad_y, scores, max_norm)
        assert scores[4] == 0
        assert found.dtype == torch.float32
        assert_near(found, clipped_truth(x, grad_y, scores, max_norm), "fisher")
        lengths = torch.tensor([0, 33, 1, 20, 0, *[7] * 14])
        offsets = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
        real = torch.arange(33) < lengths[:, None]
        packed = (x[real], grad_y[real])
        scores = fisher_diag(*packed, offsets).scores
        found = clipped_grad(*packed, scores, max_norm, offsets)
        assert_near(found, clipped_truth(*packed, scores, max_norm, offsets), "fisher")


@bodies
def test_a_norm_that_nobody_reaches_leaves_the_ordinary_gradient(body: Any) -> None:
    x, grad_y = fisher_inputs(7, 9, 31, 12, torch.float32)
    with use_backend(body):
        plain = fisher_diag(x, grad_y, weight_grad=True)
        assert torch.equal(clipped_grad(x, grad_y, plain.scores, 1e9), plain.weight_grad)


@bodies
def test_one_sample_moves_the_sum_by_no_more_than_the_norm(body: Any) -> None:
    """What privacy rests on: with the norm of both matrices together, leaving a sample out changes little."""
    x, grad_y = fisher_inputs(6, 9, 31, 40, torch.float32)
    h, grad_h = fisher_inputs(6, 9, 4, 4, torch.float32, seed=1)
    x[2] *= 1e3

    def both(keep: torch.Tensor) -> torch.Tensor:
        tensors = [t[keep] for t in (x, h, grad_h, grad_y)]
        found = lora_fisher_diag(*tensors)
        scores = found.a.scores + found.b.scores
        parts = clipped_grad(tensors[0], tensors[2], scores, 0.5), clipped_grad(tensors[1], tensors[3], scores, 0.5)
        return torch.cat([part.flatten() for part in parts])

    with use_backend(body):
        whole = both(torch.arange(6))
        for left_out in range(6):
            change = whole - both(torch.tensor([n for n in range(6) if n != left_out]))
            assert float(change.norm()) <= 0.5 * (1 + 1e-4)


def test_it_is_the_sum_that_clipping_of_whole_gradients_gives() -> None:
    x, grad_y = fisher_inputs(5, 7, 12, 6, torch.float32)
    gradients = torch.einsum("nto,nti->noi", grad_y, x)
    norms = gradients.flatten(1).norm(dim=1)
    wanted = torch.einsum("n,noi->oi", (1.5 / norms).clamp(max=1.0), gradients)
    torch.testing.assert_close(clipped_grad(x, grad_y, norms.square(), 1.5), wanted, rtol=1e-5, atol=1e-5)


@bodies
@pytest.mark.parametrize(
    ("error", "words", "changes"),
    [
        (TypeError, r"scores: list, wanted a torch.Tensor", {"scores": [1.0] * 3}),
        (TypeError, r"scores: torch.float64 \(3,\).* wanted float32 \(3,\)", {"scores": SCORES.double()}),
        (ValueError, r"scores: .*\(2,\).* wanted float32 \(3,\)", {"scores": SCORES[1:]}),
        (ValueError, r"scores: .* on meta, wanted float32", {"scores": SCORES.to("meta")}),
        (ValueError, r"max_norm: 0, wanted a number with 0 < max_norm", {"max_norm": 0}),
        (ValueError, r"max_norm: nan", {"max_norm": float("nan")}),
        (ValueError, r"max_norm: '1', wanted", {"max_norm": "1"}),
        (ValueError, r"max_norm: True, wanted", {"max_norm": True}),
        (ValueError, r"grad_y: .* wanted \(3, 5, features\)", {"grad_y": GRAD_Y[1:]}),
    ],
)
def test_what_cannot_be_taken_is_refused_by_name(body: Any, error: Any, words: str, changes: dict[str, Any]) -> None:
    with use_backend(body), pytest.raises(error, match=words):
        clipped_grad(**{"x": X, "grad_y": GRAD_Y, "scores": SCORES, "max_norm": 1.0, **changes})


def test_the_registered_op_checks_its_weights_and_passes_opcheck() -> None:
    with pytest.raises(RuntimeError, match=r"weights: wanted float32 \(3,\)"):
        torch.ops.fibecfed.weighted_grad(X, GRAD_Y, SCORES[1:], None)
    for dtype in DTYPES:
        x, grad_y = fisher_inputs(3, 5, 31, 4, dtype)
        torch.library.opcheck(torch.ops.fibecfed.weighted_grad.default, (x, grad_y, torch.rand(3), None))


def test_it_compiles_without_a_graph_break() -> None:
    @torch.compile(backend="eager", fullgraph=True)
    def public(x: torch.Tensor, grad_y: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return clipped_grad(x * 1.0, grad_y, scores, 0.5)

    x, grad_y = fisher_inputs(3, 5, 31, 4, torch.float32)
    scores = fisher_diag(x, grad_y).scores
    assert_near(public(x, grad_y, scores), clipped_truth(x, grad_y, scores, 0.5), "fisher")
