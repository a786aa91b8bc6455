"""DP-SGD on LoRA adapters: every sample's gradient clipped over the whole adapter, in one backward pass, and noise.

The norms come out of the Fisher kernel, the clipped sum out of one more weighted pass over what the backward saw.
The accountant, which turns noise and sampling into ε, is a library's: ``opacus.accountants`` fits as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fibecfed_kernels import LoraFisherDiag, backend, clipped_grad, fisher_diag

from .backward import FisherCaptureError, LoraBackward
from .lora import HeadLinear, LoraPair, UnsupportedModuleError, lora_pairs, trainable_linears
from .losses import SampleLoss, Task, TaskName, own_losses, task_of
from .sharing import Seen, SharedInputs


class _Kept(NamedTuple):
    """One matrix's tensors, from its backward to the end of the block: its gradients go to ``weight`` and ``bias``."""

    weight: Tensor | None
    bias: Tensor | None
    x: Tensor
    grad_y: Tensor
    cu_seqlens: Tensor | None
    scores: Tensor


class clip_sample_gradients(LoraBackward):
    """Context manager: the backward run inside it leaves sums of clipped per-sample gradients in ``.grad``::

        Σ_n min(1, C / ‖g_n‖) · g_n,    C = max_norm

    with g_n the gradient of sample n's own loss by ALL trainable parameters, LoRA and task head together. As a
    backward does, it adds to a ``.grad`` that is there. It is a sum, whatever the loss was: nothing is divided by N.

    Usage::

        with clip_sample_gradients(model, max_norm=1.0) as clipped:
            model(**batch).loss.backward()
        clipped.scores, clipped.factors  # (N,) ‖g_n‖², (N,) min(1, C / ‖g_n‖), float32; private, not noised

    Per-sample gradients are never in memory, and there is no second backward. Instead every LoRA pair's inputs and
    output gradients are kept to the end of the block: N·T·(d_in + d_out + 2r) values, of which the plain backward would
    have freed each block's as it went. ``scores`` and ``factors`` are there when the block has ended.

    Args:
        model: a PEFT model whose trainable parameters are LoRA on nn.Linear, and weights and biases of other nn.Linear.
        max_norm: C > 0.
        reduction, loss_scale, cu_seqlens, num_samples: as for :class:`fibecfed.capture_fisher`.

    Raises as :class:`fibecfed.capture_fisher`; also UnsupportedModuleError, naming it, for a trainable parameter that
    is none of these, for DistributedDataParallel, and for BatchNorm in training, which mixes samples; ValueError when a
    sample's gradient is not finite (``.grad`` stays what it was).

    Source: Abadi et al., 2016 (arXiv 1607.00133), algorithm 1; keeping the layers' inputs and output gradients for the
    weighted sum is the book-keeping of Bu et al., 2023 (arXiv 2210.00038).
    """

    def __init__(
        self,
        model: nn.Module,
        max_norm: float,
        reduction: Literal["mean", "sum"] = "mean",
        *,
        loss_scale: float = 1.0,
        cu_seqlens: Tensor | None = None,
        num_samples: int | None = None,
    ) -> None:
        super().__init__(model, reduction, loss_scale=loss_scale, cu_seqlens=cu_seqlens, num_samples=num_samples)
        self.max_norm = _number("max_norm", max_norm, positive=True)
        self._kept: list[_Kept] = []
        self._shared = SharedInputs(self._take)
        self._scores: Tensor | None = None
        self._factors: Tensor | None = None

    @property
    def scores(self) -> Tensor:
        """float32 (N,): ‖g_n‖² over all trainable parameters, before clipping."""
        if self._scores is None:
            raise FisherCaptureError("scores: not there yet; they are ready when the block has ended")
        return self._scores

    @property
    def factors(self) -> Tensor:
        """float32 (N,): min(1, C / ‖g_n‖)."""
        if self._factors is None:
            raise FisherCaptureError("factors: not there yet; they are ready when the block has ended")
        return self._factors

    def __enter__(self) -> clip_sample_gradients:
        mixing = next((n for n, m in self.model.named_modules() if isinstance(m, _BatchNorm) and m.training), None)
        if mixing is not None:
            raise UnsupportedModuleError(f"{mixing}: BatchNorm in training mixes the samples of a batch")
        self._kept, self._scores, self._factors = [], None, None
        self._shared = SharedInputs(self._take)
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            super().__exit__(kind, error, trace)
        finally:
            self._kept, self._shared = [], SharedInputs(self._take)

    def _find_heads(self) -> list[HeadLinear]:
        return trainable_linears(self.model, self._pairs)

    def _pair_backward(
        self, pair: LoraPair, x: Tensor, h: Tensor, grad_h: Tensor, grad_y: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        self._shared.add(Seen(pair, x, h, grad_h, grad_y), backend(x.device), self.cu_seqlens)
        return None, None

    def _take(self, seen: Seen, found: LoraFisherDiag) -> None:
        a, b = seen.pair.a.weight, seen.pair.b.weight
        self._kept.append(_Kept(a, None, seen.x, seen.grad_h, self.cu_seqlens, found.a.scores))
        self._kept.append(_Kept(b, None, seen.h, seen.grad_y, self.cu_seqlens, found.b.scores))

    def _head_backward(self, head: HeadLinear, x: Tensor, grad_y: Tensor, cu_seqlens: Tensor | None) -> None:
        weight, bias = (
            p if p is not None and p.requires_grad else None for p in (head.linear.weight, head.linear.bias)
        )
        ones = [x.new_ones((*x.shape[:-1], 1))] if bias is not None else []  # a bias is the weight of an input of 1
        x = torch.cat([*([x] if weight is not None else []), *ones], dim=-1)
        self._kept.append(_Kept(weight, bias, x, grad_y, cu_seqlens, fisher_diag(x, grad_y, cu_seqlens).scores))

    def _finish(self, scale: float) -> None:
        self._shared.flush()
        seen = torch.stack([kept.scores for kept in self._kept]).sum(0)
        if not bool(seen.isfinite().all()):
            bad = [n for n, finite in enumerate(seen.isfinite().tolist()) if not finite]
            raise ValueError(f"gradient of sample {', '.join(map(str, bad))} of the batch: not finite, wanted finite")
        self._scores = seen * scale**2
        self._factors = (self.max_norm / self._scores.sqrt()).clamp(max=1.0)
        while self._kept:
            kept = self._kept.pop()
            total = clipped_grad(kept.x, kept.grad_y, seen, self.max_norm / scale, kept.cu_seqlens).mul_(scale)
            if kept.bias is not None:
                _accumulate(kept.bias, total[:, -1])
                total = total[:, :-1]
            if kept.weight is not None:
                _accumulate(kept.weight, total)


class Accountant(Protocol):
    """What counts privacy loss; ``opacus.accountants.RDPAccountant`` and ``PRVAccountant`` do."""

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None: ...


class DpStep(NamedTuple):
    """What a step saw, NOT noised: for its owner, not for release. losses, scores ‖g_n‖² and factors min(1, C / ‖g_n‖),
    each float32 (N,) over all micro-batches."""

    losses: Tensor
    scores: Tensor
    factors: Tensor


def dp_step(
    model: nn.Module,
    batches: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    *,
    max_norm: float,
    noise_multiplier: float,
    expected_batch_size: float,
    sample_loss: TaskName | SampleLoss = "classification",
    generator: Generator | None = None,
    accountant: Accountant | None = None,
    sample_rate: float | None = None,
) -> DpStep:
    """One step of DP-SGD (any torch optimizer) on all trainable parameters of a LoRA model::

        .grad ← (Σ_n min(1, C / ‖g_n‖) · g_n + σ C z) / B,   z ~ N(0, 1) for every value;   optimizer.step()

    with C = max_norm, σ = noise_multiplier and B = expected_batch_size. Old contents of ``.grad`` are dropped.

    The ε that an accountant computes holds for batches drawn by Poisson sampling: every sample is in a step's batch
    with probability ``sample_rate``, on its own (``opacus.utils.uniform_sampler.UniformWithReplacementSampler``); B is
    sample_rate times the number of samples, NOT the size of the batch that came. An empty batch is a step too: noise
    alone.

    Args:
        model: as for :class:`clip_sample_gradients`.
        batches: the step's samples as a dict of tensors, or a sequence of such dicts (micro-batches that fit in
            memory; none, if nothing was drawn), on the model's device.
        optimizer: over the model's trainable parameters, or a ``MaskedAdamW`` on its ``FlatAdapter``.
        noise_multiplier: σ ≥ 0; 0 is clipping without privacy, and no accountant takes it.
        sample_loss: a task's name or a function, as for :func:`fibecfed.score_samples`; the loss of one sample must not
            depend on the others.
        generator: of the noise, on the parameters' device. torch's generators are no cryptographic ones, and noise of
            floats has known attacks (Mironov, 2012); who must defend against them needs more than this.
        accountant: its ``step(noise_multiplier=, sample_rate=)`` is called after the optimizer's; with ``sample_rate``.

    Raises as :class:`clip_sample_gradients`, and ValueError or TypeError naming the argument; then no step was taken,
    parameters and optimizer are what they were, and ``.grad`` is zero.

    Source: Abadi et al., 2016 (arXiv 1607.00133), algorithm 1.
    """
    _number("max_norm", max_norm, positive=True)
    _number("noise_multiplier", noise_multiplier)
    _number("expected_batch_size", expected_batch_size, positive=True)
    if (accountant is None) != (sample_rate is None):
        raise ValueError("accountant, sample_rate: one without the other, wanted both or none")
    if sample_rate is not None and not 0.0 < _number("sample_rate", sample_rate) <= 1.0:
        raise ValueError(f"sample_rate: {sample_rate!r}, wanted a number with 0 < sample_rate ≤ 1")
    if accountant is not None and noise_multiplier == 0:
        raise ValueError("noise_multiplier: 0 with an accountant; without noise no ε is finite")
    parts = [batches] if isinstance(batches, Mapping) else batches
    if not isinstance(parts, Sequence) or not all(isinstance(part, Mapping) for part in parts):
        raise TypeError(f"batches: {type(batches).__name__}, wanted a dict of tensors or a sequence of them")
    parameters = [p for p in model.parameters() if p.requires_grad]
    task = task_of(sample_loss)
    loss_of = task.loss if isinstance(task, Task) else task

    _clear(parameters)
    seen = []
    try:
        for part in parts:
            with torch.enable_grad(), clip_sample_gradients(model, max_norm, "sum") as clipped:
                losses = own_losses(loss_of, model, part)
                losses.sum().backward()
            if clipped.scores.shape != losses.shape:
                raise ValueError(f"sample_loss: {losses.numel()} losses for {clipped.scores.numel()} samples")
            seen.append(DpStep(losses.detach().float(), clipped.scores, clipped.factors))
        if not parts:  # the guards, which no block has run
            trainable_linears(model, lora_pairs(model))
        _add_noise(parameters, noise_multiplier * max_norm, expected_batch_size, generator)
    except BaseException:
        _clear(parameters)
        raise
    optimizer.step()
    if accountant is not None and sample_rate is not None:
        accountant.step(noise_multiplier=noise_multiplier, sample_rate=sample_rate)
    if not seen:
        return DpStep(*(torch.zeros(0, device=parameters[0].device) for _ in DpStep._fields))
    return DpStep(*(torch.cat(values) for values in zip(*seen, strict=True)))


@torch.no_grad()
def _add_noise(parameters: list[nn.Parameter], std: float, divisor: float, generator: Generator | None) -> None:
    for p in parameters:
        if std > 0:
            noise = torch.randn(p.shape, generator=generator, device=p.device, dtype=torch.float32)
            _accumulate(p, noise.mul_(std))
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        p.grad.div_(divisor)


@torch.no_grad()
def _clear(parameters: list[nn.Parameter]) -> None:
    for p in parameters:  # in place: gradients may be views into a flat buffer
        if p.grad is not None:
            p.grad.zero_()


def _accumulate(parameter: Tensor, value: Tensor) -> None:
    """As a backward does: into the gradient that is there, if any."""
    value = value.to(parameter.dtype)
    if parameter.grad is None:
        parameter.grad = value.contiguous()
    else:
        parameter.grad.add_(value)


def _number(name: str, value: float, positive: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: {type(value).__name__}, wanted a number")
    if not (0.0 < value < math.inf if positive else 0.0 <= value < math.inf):
        raise ValueError(f"{name}: {value!r}, wanted a finite number {'>' if positive else '≥'} 0")
    return value
