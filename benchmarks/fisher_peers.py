"""Fisher scores and diagonal of one LoRA pair by everyone who offers them, or the parts of them.

Each provider gets the same tensors and gives (scores, diagonals), or scores alone where its name says so. What a peer
computes beside that (its own forward and backward pass, say) is in its time; the README says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from fibecfed_kernels import backend, lora_fisher_diag, use_backend

Found = tuple[Tensor, ...]


@dataclass(frozen=True)
class Pair:
    """x (N, T, d), h = x Aᵀ (N, T, r), ∂h = ∂y B (N, T, r), ∂y (N, T, d); A (r, d), B (d, r)."""

    x: Tensor
    h: Tensor
    grad_h: Tensor
    grad_y: Tensor
    a: Tensor
    b: Tensor

    @property
    def matrices(self) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
        """(weight, input, gradient of the output) of A and of B."""
        return (self.a, self.x, self.grad_h), (self.b, self.h, self.grad_y)


def make_pair(samples: int, tokens: int, d: int, r: int, dtype: torch.dtype, device: torch.device) -> Pair:
    """Random tensors of one LoRA pair; everything is rounded to ``dtype`` before anything is computed from it."""
    x, grad_y = (torch.randn(samples, tokens, d).to(dtype).to(device) for _ in range(2))
    a, b = ((torch.randn(shape) / d**0.5).to(dtype).to(device) for shape in ((r, d), (d, r)))
    return Pair(x, x @ a.T, grad_y @ b, grad_y, a, b)


def truth(pair: Pair) -> Found:
    """scores (N,), diagonals of A and B in float64."""
    scores, diagonals = 0.0, []
    for _, inputs, grads in pair.matrices:
        diagonal = 0.0
        parts = []
        for x_n, g_n in zip(inputs, grads, strict=True):  # one sample at a time: all of them would not fit
            square = (g_n.double().T @ x_n.double()).square()
            diagonal = diagonal + square
            parts.append(square.sum())
        scores = scores + torch.stack(parts)
        diagonals.append(diagonal)
    return scores, *diagonals


def ours(pair: Pair) -> Found:
    found = lora_fisher_diag(pair.x, pair.h, pair.grad_h, pair.grad_y)
    return found.a.scores + found.b.scores, found.a.diag, found.b.diag


def ours_with_gradient(pair: Pair) -> Found:
    found = lora_fisher_diag(pair.x, pair.h, pair.grad_h, pair.grad_y, weight_grad=True)
    return found.a.scores + found.b.scores, found.a.diag, found.b.diag


def reference(pair: Pair) -> Found:
    with use_backend("reference"):
        return ours(pair)


def _of_gradients(gradients: list[Tensor]) -> Found:
    """From per-sample gradients, held in memory."""
    squares = [g.square() for g in gradients]
    scores = sum((s.sum((1, 2), dtype=torch.float32) for s in squares[1:]), squares[0].sum((1, 2), dtype=torch.float32))
    return scores, *(s.sum(0, dtype=torch.float32) for s in squares)


def bmm(pair: Pair) -> Found:
    return _of_gradients([torch.bmm(grads.mT, inputs) for _, inputs, grads in pair.matrices])


def einsum(pair: Pair) -> Found:
    return _of_gradients([torch.einsum("nto,nti->noi", grads, inputs) for _, inputs, grads in pair.matrices])


def vmap_grad(pair: Pair) -> Found:
    def output(weight: Tensor, x: Tensor, grad: Tensor) -> Tensor:
        return (nn.functional.linear(x, weight) * grad).sum()

    per_sample = torch.func.vmap(torch.func.grad(output), in_dims=(None, 0, 0))
    return _of_gradients([per_sample(weight, inputs, grads) for weight, inputs, grads in pair.matrices])


def loop(pair: Pair) -> Found:
    """The batch-of-1 loop: one backward pass a sample, no gradient kept."""
    scores, diagonals = [], [torch.zeros_like(w, dtype=torch.float32) for w, _, _ in pair.matrices]
    weights = [w.detach().requires_grad_() for w, _, _ in pair.matrices]
    for n in range(len(pair.x)):
        score = 0.0
        for i, (weight, (_, inputs, grads)) in enumerate(zip(weights, pair.matrices, strict=True)):
            (gradient,) = torch.autograd.grad(nn.functional.linear(inputs[n], weight), weight, grads[n])
            square = gradient.float().square()
            diagonals[i] += square
            score = score + square.sum()
        scores.append(score)
    return torch.stack(scores), *diagonals


def opacus(pair: Pair) -> Found:
    from opacus.grad_sample.linear import compute_linear_grad_sample

    gradients = []
    for weight, inputs, grads in pair.matrices:
        layer = _linear(weight)
        gradients.append(compute_linear_grad_sample(layer, [inputs], grads)[layer.weight])
    return _of_gradients(gradients)


def opacus_ghost(pair: Pair) -> Found:
    """Its fast gradient clipping: norms by Gram matrices (T x T), no gradient and no diagonal."""
    from opacus.grad_sample.linear import compute_linear_norm_sample

    norms = []
    for weight, inputs, grads in pair.matrices:
        layer = _linear(weight)
        norms.append(compute_linear_norm_sample(layer, [inputs], grads)[layer.weight].float())
    return (norms[0].square() + norms[1].square(),)


def backpack(pair: Pair) -> Found:
    """Through modules, as it works: a forward and a backward pass of the pair are in its time."""
    from backpack import backpack as context
    from backpack import extend
    from backpack.extensions import BatchL2Grad, SumGradSquared

    model = extend(nn.Sequential(_linear(pair.a), _linear(pair.b)))
    with context(SumGradSquared(), BatchL2Grad()):
        (model(pair.x) * pair.grad_y).sum().backward()
    weights = [layer.weight for layer in model]
    return sum(w.batch_l2 for w in weights), *(w.sum_grad_squared for w in weights)  # type: ignore[attr-defined]


def kronfluence(pair: Pair) -> Found:
    from kronfluence.module.linear import TrackedLinear

    gradients = []
    for weight, inputs, grads in pair.matrices:
        tracked = TrackedLinear("linear", _linear(weight))
        gradients.append(tracked.compute_per_sample_gradient(inputs, grads))
    return _of_gradients(gradients)


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    return layer


def providers() -> dict[str, Callable[[Pair], Found]]:
    """Those that are installed, ours first."""
    found: dict[str, Callable[[Pair], Found]] = {
        "fibecfed": ours,
        "fibecfed + gradient": ours_with_gradient,
        "fibecfed reference": reference,
        "bmm + square": bmm,
        "einsum": einsum,
        "vmap(grad)": vmap_grad,
        "batch-of-1 loop": loop,
    }
    for package, name, call in (
        ("opacus", "Opacus", opacus),
        ("opacus", "Opacus ghost norm (scores only)", opacus_ghost),
        ("backpack", "BackPACK", backpack),
        ("kronfluence", "kronfluence", kronfluence),
    ):
        if find_spec(package) is not None:
            found[name] = call
    return found


def body(device: torch.device) -> str:
    """Which of our bodies is measured."""
    return backend(device)
