"""Per-sample Fisher information of linear modules: checks and dispatch; the bodies are reference, C++ and Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor

from .. import _ops  # noqa: F401  the schemas must exist before a body is called
from .._backend import runs_cpp
from .._dispatch import run
from .arguments import check_clipping, check_lora, check_pair, modules_of


class FisherDiag(NamedTuple):
    """Fisher information of one weight W (d_out, d_in) over a batch of N samples, all float32.

    scores: (N,) ‖G_n‖²_F. diag: (d_out, d_in) Σ_n G_n². weight_grad: (d_out, d_in) Σ_n G_n, or None if not asked for.
    """

    scores: Tensor
    diag: Tensor
    weight_grad: Tensor | None


class LoraFisherDiag(NamedTuple):
    """:class:`FisherDiag` of the two matrices of a LoRA pair, A (r, d_in) and B (d_out, r)."""

    a: FisherDiag
    b: FisherDiag


def fisher_diag(
    x: Tensor, grad_y: Tensor, cu_seqlens: Tensor | None = None, *, weight_grad: bool = False
) -> FisherDiag:
    """Diagonal of the empirical Fisher information of W in y = x Wᵀ, true per sample.

    With G_n = Σ_t ∂y_{n,t} x_{n,t}ᵀ, the gradient of sample n's loss by W: ``scores[n] = ‖G_n‖²_F``,
    ``diag = Σ_n G_n²`` (elementwise), ``weight_grad = Σ_n G_n``. The square is taken AFTER the sum over the tokens; the
    per-sample gradients are never held in memory.

    Args:
        x: input of the module, (N, T, d_in), or packed (total, d_in) with ``cu_seqlens``. float32, bfloat16 or float16.
        grad_y: gradient of the SUM of the samples' losses by y, (N, T, d_out) or (total, d_out); same dtype as ``x``.
        cu_seqlens: int32 (N+1,), 0 = c_0 ≤ … ≤ c_N = total: sample n owns the tokens c_n … c_{n+1}−1.
        weight_grad: also return Σ_n G_n, the ordinary gradient, from the same pass.

    Products are accumulated in float32; a subnormal bfloat16 value (below 1.2e-38) may count as zero. The same input
    gives the same bits, and a sample's score does not depend on its neighbours in the batch. Differentiation through
    this op is not supported: its inputs are read as constants.

    Raises:
        TypeError: a tensor of another dtype. ValueError: shapes or offsets that do not fit.

    Source: per-sample Fisher as in Liu et al., EMNLP 2024 (arXiv 2410.00131), step 1.
    """
    check_pair("x", x, "grad_y", grad_y, cu_seqlens)
    args = (x.detach(), grad_y.detach(), cu_seqlens, weight_grad)
    scores, diag, grad = run("fisher_diag", x, *args)
    return FisherDiag(scores, diag, grad if weight_grad else None)


@overload
def lora_fisher_diag(
    x: Tensor, h: Tensor, grad_h: Tensor, grad_y: Tensor, cu_seqlens: Tensor | None = None, *, weight_grad: bool = False
) -> LoraFisherDiag: ...


@overload
def lora_fisher_diag(
    x: Tensor,
    h: Sequence[Tensor],
    grad_h: Sequence[Tensor],
    grad_y: Sequence[Tensor],
    cu_seqlens: Tensor | None = None,
    *,
    weight_grad: bool = False,
) -> list[LoraFisherDiag]: ...


def lora_fisher_diag(x, h, grad_h, grad_y, cu_seqlens=None, *, weight_grad=False):  # type: ignore[no-untyped-def]
    """:func:`fisher_diag` of both matrices of a LoRA pair y = B(A x), in one launch.

    Args:
        x: input of A, (N, T, d_in) or packed (total, d_in).
        h: A x, the input of B, (…, r).
        grad_h: gradient of the sum of the losses by h, (…, r).
        grad_y: gradient of the sum of the losses by B's output (the LoRA scaling is downstream of it), (…, d_out).
        cu_seqlens: see :func:`fisher_diag`.
        weight_grad: also return the ordinary gradients of A and B.

    ``h``, ``grad_h`` and ``grad_y`` may be lists of equal length: several LoRA modules that read the same ``x`` (query,
    key, value of a block); ``r`` and ``d_out`` may differ between them. Then a list is returned.

    Returns:
        ``LoraFisherDiag(a=FisherDiag, b=FisherDiag)``, or a list of them.

    Raises: as :func:`fisher_diag`.
    """
    several = isinstance(h, (list, tuple))
    if several:
        hs, grad_hs, grad_ys = (modules_of(n, t) for n, t in (("h", h), ("grad_h", grad_h), ("grad_y", grad_y)))
        if not hs or not len(hs) == len(grad_hs) == len(grad_ys):
            raise ValueError(
                f"h, grad_h, grad_y: lists of {len(hs)}, {len(grad_hs)}, {len(grad_ys)} tensors, "
                "wanted equal lengths of at least 1"
            )
    else:
        hs, grad_hs, grad_ys = [h], [grad_h], [grad_y]
    found = _by_cpp(x, hs, grad_hs, grad_ys, cu_seqlens, weight_grad)
    if found is None:
        for i, (h_m, grad_h_m, grad_y_m) in enumerate(zip(hs, grad_hs, grad_ys, strict=True)):
            check_lora(x, h_m, grad_h_m, grad_y_m, cu_seqlens, f"[{i}]" if several else "")
        lists = ([t.detach() for t in ts] for ts in (hs, grad_hs, grad_ys))
        found = run("lora_fisher_diag", x, x.detach(), *lists, cu_seqlens, weight_grad)
    results = _lora_results(found, x, hs, grad_ys, weight_grad)
    return results if several else results[0]


def _by_cpp(
    x: Tensor, hs: list[Tensor], grad_hs: list[Tensor], grad_ys: list[Tensor], cu_seqlens: Tensor | None,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor] | None:  # fmt: skip
    """The results of C++ if it is next and takes what it is given. It checks that by itself, so the checks in Python,
    which cost as much as a small batch, are left for what it refuses: they say by name what is wrong."""
    if not isinstance(x, Tensor) or not runs_cpp(x):
        return None
    try:
        others = (*hs, *grad_hs, *grad_ys) if cu_seqlens is None else (*hs, *grad_hs, *grad_ys, cu_seqlens)
        if not all(t.is_cpu for t in others):  # the dispatcher would go by the other device
            return None
        if any(t.requires_grad for t in (x, *hs, *grad_hs, *grad_ys)):
            x = x.detach()
            hs, grad_hs, grad_ys = ([t.detach() for t in ts] for ts in (hs, grad_hs, grad_ys))
        return torch.ops.fibecfed.lora_fisher_diag.default(x, hs, grad_hs, grad_ys, cu_seqlens, weight_grad)
    except Exception:  # of whatever kind: after the checks the second try raises it again
        return None


def _lora_results(
    found: tuple[Tensor, Tensor, Tensor], x: Tensor, hs: Sequence[Tensor], grad_ys: Sequence[Tensor], weight_grad: bool
) -> list[LoraFisherDiag]:
    """The flat results of the op, a view for each matrix."""
    scores, diag, grad = found
    d_in, offset, results = x.shape[-1], 0, []
    for i, (h, grad_y) in enumerate(zip(hs, grad_ys, strict=True)):
        r, d_out = h.shape[-1], grad_y.shape[-1]
        # (shape, strides, offset) of A and of B: as_strided is one call where a slice and a view are two
        a = (r, d_in), (d_in, 1), offset
        b = (d_out, r), (r, 1), offset + r * d_in
        offset += r * (d_in + d_out)
        grad_a, grad_b = (grad.as_strided(*a), grad.as_strided(*b)) if weight_grad else (None, None)
        results.append(
            LoraFisherDiag(
                FisherDiag(scores[2 * i], diag.as_strided(*a), grad_a),
                FisherDiag(scores[2 * i + 1], diag.as_strided(*b), grad_b),
            )
        )
    return results


def clipped_grad(
    x: Tensor, grad_y: Tensor, scores: Tensor, max_norm: float, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Sum of the samples' gradients of W in y = x Wᵀ, each scaled down to a norm of at most ``max_norm``::

        Σ_n min(1, C / √scores[n]) · G_n,    G_n = Σ_t ∂y_{n,t} x_{n,t}ᵀ

    With scores of W alone (:func:`fisher_diag`) that is per-layer clipping; with each sample's scores summed over all
    modules of an adapter, and one call a module, the clipped sum of DP-SGD, before its noise. Per-sample gradients are
    never held in memory.

    Args:
        x, grad_y, cu_seqlens: as :func:`fisher_diag`.
        scores: float32 (N,), ‖g_n‖² of each sample. A sample with score 0 is left as it is.
        max_norm: C > 0.

    Returns float32 (d_out, d_in).

    Raises: as :func:`fisher_diag`, also for scores of another shape or dtype and for ``max_norm``.

    Source: Abadi et al., 2016 (arXiv 1607.00133), algorithm 1, for the clipped sum.
    """
    check_pair("x", x, "grad_y", grad_y, cu_seqlens)
    check_clipping(scores, max_norm, x, cu_seqlens)
    weights = (max_norm / scores.detach().sqrt()).clamp(max=1.0)
    return run("weighted_grad", x, x.detach(), grad_y.detach(), weights, cu_seqlens)
