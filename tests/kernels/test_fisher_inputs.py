"""Inputs of the Fisher ops as callers have them: strided views, and tensors that autograd follows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fibecfed_kernels import clipped_grad, fisher_diag, lora_fisher_diag, use_backend

from .oracle import fisher_inputs

pytestmark = pytest.mark.usefixtures("one_thread")
bodies = pytest.mark.parametrize("body", ["reference", "cpp"])
VIEWS = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "sliced": lambda t: torch.cat([t, t], -1)[..., t.shape[-1] :],
    "every other": lambda t: torch.stack([t, -t], -1).flatten(-2)[..., ::2],
}


def flattened(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    return [t for part in found for t in flattened(part)] if found is not None else []


def pair() -> list[Tensor]:
    (x, grad_y), (h, grad_h) = (fisher_inputs(5, 9, *d, torch.float32, seed=d[0]) for d in ((31, 40), (4, 4)))
    return [x, h, grad_h, grad_y]


@bodies
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("place", range(4), ids=["x", "h", "grad_h", "grad_y"])
def test_a_pair_need_not_be_contiguous(body: Any, view: Any, place: int) -> None:
    tensors = pair()
    with use_backend(body):
        plain = lora_fisher_diag(*tensors, weight_grad=True)
        tensors[place] = view(tensors[place])
        assert not tensors[place].is_contiguous()
        listed = lora_fisher_diag(tensors[0], *([t] for t in tensors[1:]), weight_grad=True)[0]
        for found in (lora_fisher_diag(*tensors, weight_grad=True), listed):
            assert all(torch.equal(a, b) for a, b in zip(flattened(found), flattened(plain), strict=True))


@bodies
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("place", range(3), ids=["x", "grad_y", "scores"])
def test_what_is_clipped_need_not_be_contiguous(body: Any, view: Any, place: int) -> None:
    x, _, _, grad_y = pair()
    arguments = [x, grad_y, torch.arange(1.0, 6.0)]
    with use_backend(body):
        plain = clipped_grad(*arguments, 1.5)
        arguments[place] = view(arguments[place][None])[0] if place == 2 else view(arguments[place])
        assert torch.equal(clipped_grad(*arguments, 1.5), plain)


@bodies
def test_offsets_need_not_be_contiguous(body: Any) -> None:
    flat = [t.flatten(0, 1) for t in pair()]
    offsets = torch.tensor([0, 9, 18, 40, 45], dtype=torch.int32)
    strided = torch.stack([offsets, -offsets], 1)[:, 0]
    assert not strided.is_contiguous()
    with use_backend(body):
        plain, found = (lora_fisher_diag(*flat, given) for given in (offsets, strided))
        assert all(torch.equal(a, b) for a, b in zip(flattened(found), flattened(plain), strict=True))


@bodies
def test_offsets_are_looked_at_again_when_they_or_the_tokens_change(body: Any) -> None:
    x, grad_y = (torch.randn(9, d) for d in (6, 5))
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32)
    with use_backend(body):
        for _ in range(2):
            fisher_diag(x, grad_y, offsets)
        with pytest.raises(ValueError, match="cu_seqlens: values must rise from 0 to 8"):
            fisher_diag(x[:8], grad_y[:8], offsets)
        offsets[1] = 10
        with pytest.raises(ValueError, match=r"cu_seqlens: values must rise .* got \[0, 10, 9\]"):
            fisher_diag(x, grad_y, offsets)


@bodies
@pytest.mark.parametrize("place", range(4), ids=["x", "h", "grad_h", "grad_y"])
def test_results_are_constants_for_autograd(body: Any, place: int) -> None:
    tensors = pair()
    tensors[place].requires_grad_()
    x, h, grad_h, grad_y = tensors
    scores = torch.ones(5).requires_grad_()
    with use_backend(body):
        found = [
            fisher_diag(x, grad_h, weight_grad=True),
            fisher_diag(h, grad_y, weight_grad=True),
            lora_fisher_diag(*tensors, weight_grad=True),
            lora_fisher_diag(x, [h], [grad_h], [grad_y], weight_grad=True),
            clipped_grad(x, grad_y, scores, 1.0),
        ]
    assert not any(t.requires_grad for t in flattened(found))


def test_scores_of_a_pair_may_be_changed_in_place() -> None:
    found = lora_fisher_diag(*pair())
    found.a.scores.mul_(torch.nn.Parameter(torch.ones(())))
    assert found.a.scores.requires_grad
