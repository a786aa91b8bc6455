"""The truth that every body is held to, and one tolerance table: max-relative and RMS error against float64."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

SAMPLES = (0, 1, 7)
TOKENS = (1, 63, 257)
RANKS = (1, 4, 8, 12, 16, 64)
FEATURES = (1, 31, 384, 1000, 4096)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Inputs are exact in every dtype (they are rounded before the truth is computed) and accumulation is float32, so the
# error is that of float32 sums, whatever the input's dtype; tensor cores, which multiply halves, cut their sums off.
# (max error / max |truth|, RMS error / RMS of truth)
TOLERANCE = {"fisher": (2e-5, 4e-6), "fisher on tensor cores": (4e-5, 1.5e-5), "update": (1e-6, 1e-6)}


def assert_near(actual: Tensor, truth: Tensor, kind: str) -> None:
    """Both norms of the error of ``actual`` against the float64 ``truth`` are within TOLERANCE[kind]."""
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)}, wanted {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    assert torch.isfinite(actual).all(), "not finite: a value was never written, or overflowed"
    max_tolerance, rms_tolerance = TOLERANCE[kind]
    error = actual.double() - truth
    scale, rms = truth.abs().max().clamp_min(1e-300), truth.square().mean().sqrt().clamp_min(1e-300)
    assert error.abs().max() / scale <= max_tolerance
    assert error.square().mean().sqrt() / rms <= rms_tolerance


def fisher_truth(x: Tensor, grad_y: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """scores, diag, weight_grad by a batch-of-1 loop of float64 autograd through nn.Linear."""
    bounds = cu_seqlens.tolist() if cu_seqlens is not None else None
    pieces = (
        [(x[n], grad_y[n]) for n in range(x.shape[0])]
        if bounds is None
        else [(x[a:b], grad_y[a:b]) for a, b in pairwise(bounds)]
    )
    linear = nn.Linear(x.shape[-1], grad_y.shape[-1], bias=False, dtype=torch.float64)
    gradients = []
    for x_n, grad_n in pieces:
        y = linear(x_n.cpu().double())
        (gradient,) = torch.autograd.grad((y * grad_n.cpu().double()).sum(), linear.weight)
        gradients.append(gradient)
    if not gradients:
        zero = torch.zeros_like(linear.weight, requires_grad=False)
        return zero.new_zeros(0), zero.clone(), zero.clone()
    g = torch.stack(gradients)
    return g.square().sum((1, 2)), g.square().sum(0), g.sum(0)


def clipped_truth(
    x: Tensor, grad_y: Tensor, scores: Tensor, max_norm: float, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Σ_n min(1, C/√scores[n]) G_n by a float64 batch-of-1 loop."""
    bounds = cu_seqlens.tolist() if cu_seqlens is not None else None
    total = torch.zeros(grad_y.shape[-1], x.shape[-1], dtype=torch.float64)
    for n, score in enumerate(scores.tolist()):
        part = slice(n, n + 1) if bounds is None else slice(bounds[n], bounds[n + 1])
        one = (x[part], grad_y[part]) if bounds is None else (x[None, part], grad_y[None, part])
        total += min(1.0, max_norm / score**0.5 if score > 0 else 1.0) * fisher_truth(*one)[2]
    return total


def fisher_inputs(
    samples: int, tokens: int, d_in: int, d_out: int, dtype: torch.dtype, seed: int = 0, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """x and ∂y with tokens that are correlated inside a sample, so that per-token and per-sample squares differ."""
    generator = torch.Generator().manual_seed(seed)

    def draw(features: int) -> Tensor:
        own = torch.randn(samples, tokens, features, generator=generator)
        shared = torch.randn(samples, 1, features, generator=generator)
        return (own + 0.5 * shared).to(dtype).to(device)

    return draw(d_in), draw(d_out)
