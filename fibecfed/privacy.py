"""dp_step: DP-SGD on LoRA adapters, with the noise here and the accountant a library's (``opacus.accountants``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary, WeakMethod, ref

import torch
from torch import Generator, Tensor, nn

from .backward import FisherCaptureError
from .clipping import accumulate, checked_number, clip_sample_gradients
from .lora import lora_pairs, trainable_linears
from .losses import SampleLoss, Task, TaskName, own_losses, task_of
from .sample_axis import check_sample_axis, few_of

# the loss with which a model was seen last (weak, for a loss may hold on to its model), and what was trained then
_CHECKED: WeakKeyDictionary[nn.Module, tuple[ref[Any], frozenset[str]]] = WeakKeyDictionary()


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
            memory; none, or one of no samples, if nothing was drawn), on the model's device.
        optimizer: over the model's trainable parameters, which must be float32, and nothing else; or a ``MaskedAdamW``
            on its ``FlatAdapter``.
        noise_multiplier: σ ≥ 0; 0 is clipping without privacy, and no accountant takes it.
        sample_loss: a task's name or a function, as for :func:`fibecfed.score_samples`; the loss of one sample must not
            depend on the others.
        generator: of the noise, on the parameters' device. torch's generators are no cryptographic ones, and noise of
            floats has known attacks (Mironov, 2012); who must defend against them needs more than this.
        accountant: its ``step(noise_multiplier=, sample_rate=)`` is called, just before the optimizer's; with
            ``sample_rate``.

    In a model's first step with a loss, and with what it trains, it is seen, on a few of the samples, that a sample's
    loss reaches its own place in every module alone, see :func:`fibecfed.check_sample_axis`: what is mixed could not be
    clipped.

    Raises as :class:`clip_sample_gradients` and :func:`fibecfed.check_sample_axis`, and ValueError or TypeError naming
    the argument; then no step was taken, parameters and optimizer are what they were, and ``.grad`` is untouched or
    zero.

    Source: Abadi et al., 2016 (arXiv 1607.00133), algorithm 1.
    """
    parts, parameters, loss_of = _checked_model(model, batches, optimizer, sample_loss)
    max_norm = checked_number("max_norm", max_norm, positive=True)
    std = checked_number("noise_multiplier", noise_multiplier) * max_norm
    divisor = checked_number("expected_batch_size", expected_batch_size, positive=True)
    _check_accounting(accountant, sample_rate, noise_multiplier)
    _check_generator(generator, parameters)

    _clear(parameters)
    seen = []
    try:
        for part in parts:
            with torch.enable_grad(), clip_sample_gradients(model, max_norm, "sum") as clipped:
                losses = own_losses(loss_of, model, part)
                losses.sum().backward()
            if clipped.scores.shape != losses.shape:
                raise ValueError(
                    f"sample_loss: {losses.numel()} losses for {clipped.scores.numel()} samples on the first axis of "
                    "the modules' inputs, wanted one each"
                )
            trained = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
            known, then = _CHECKED.get(model, (lambda: None, trained))
            if (known() != loss_of or then != trained) and len(losses) > 1:
                few = few_of(part, len(losses))
                if check_sample_axis(model, few, loss_of) or check_sample_axis(model, part, loss_of):
                    weak = WeakMethod(loss_of) if isinstance(loss_of, MethodType) else ref(loss_of)
                    _CHECKED[model] = weak, trained
            seen.append(DpStep(losses.detach().float(), clipped.scores, clipped.factors))
        _add_noise(parameters, std, divisor, generator)
        if accountant is not None and sample_rate is not None:
            # before the parameters move: a step that failed may be counted, one that was made must be
            accountant.step(noise_multiplier=float(noise_multiplier), sample_rate=float(sample_rate))
        optimizer.step()
    except BaseException:
        _clear(parameters)
        raise
    if not seen:
        return DpStep(*(torch.zeros(0, device=parameters[0].device) for _ in DpStep._fields))
    return DpStep(*(torch.cat(values) for values in zip(*seen, strict=True)))


def _checked_model(
    model: nn.Module,
    batches: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    sample_loss: TaskName | SampleLoss,
) -> tuple[list[Mapping[str, Tensor]], list[nn.Parameter], SampleLoss]:
    """The micro-batches that hold samples, what is trained, and the loss; after every check that needs no pass."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: {type(model).__name__}, wanted a PEFT model (a torch.nn.Module with LoRA)")
    if torch.is_inference_mode_enabled():
        raise FisherCaptureError("dp_step: inference mode is on, in which nothing has a gradient")
    parts = [batches] if isinstance(batches, Mapping) else batches
    if not isinstance(parts, Sequence) or not all(isinstance(part, Mapping) for part in parts):
        raise TypeError(f"batches: {type(batches).__name__}, wanted a dict of tensors or a sequence of them")
    trainable_linears(model, lora_pairs(model, allow_frozen=True))
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, p in named.items():
        if p.dtype != torch.float32:
            raise TypeError(f"{name}: {p.dtype}, wanted float32: in fewer digits the noise is rounded away")
    _check_optimizer(optimizer, list(named.values()))
    task = task_of(sample_loss)
    loss_of = task.loss if isinstance(task, Task) else task
    return [part for part in parts if not _is_empty(part)], list(named.values()), loss_of


def _check_optimizer(optimizer: torch.optim.Optimizer, trained: list[nn.Parameter]) -> None:
    """It may move what is clipped and noised, and nothing else: the parameters themselves, or the one buffer under all
    of them."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: {type(optimizer).__name__}, wanted a torch.optim.Optimizer")
    accumulating = getattr(optimizer, "gradient_state", None)  # accelerate's wrapper has one
    if accumulating is not None and not accumulating.sync_gradients:
        raise ValueError(
            "optimizer: accelerate would leave out this step (accumulate), wanted all micro-batches in one dp_step"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError("optimizer: LBFGS, which evaluates a closure several times a step; wanted one step a batch")
    known = {id(p) for p in trained}
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        end = p.data_ptr() + p.numel() * p.element_size()
        under = all(p.data_ptr() <= t.data_ptr() and t.data_ptr() + 4 * t.numel() <= end for t in trained)
        if id(p) not in known and not (under and sum(t.numel() for t in trained) == p.numel()):
            raise ValueError(
                f"optimizer: moves a parameter {tuple(p.shape)} that is not a trainable one of the model; it would be "
                "stepped by a gradient that is neither clipped nor noised"
            )


def _check_accounting(accountant: Accountant | None, sample_rate: float | None, noise_multiplier: float) -> None:
    if (accountant is None) != (sample_rate is None):
        raise ValueError("accountant, sample_rate: one without the other, wanted both or none")
    if accountant is None or sample_rate is None:
        return
    if isinstance(accountant, type) or not callable(getattr(accountant, "step", None)):
        raise TypeError(f"accountant: {accountant!r}, wanted an object with step(noise_multiplier=, sample_rate=)")
    if not 0.0 < checked_number("sample_rate", sample_rate) <= 1.0:
        raise ValueError(f"sample_rate: {sample_rate!r}, wanted a number with 0 < sample_rate ≤ 1")
    if noise_multiplier == 0:
        raise ValueError("noise_multiplier: 0 with an accountant; without noise no ε is finite")


def _check_generator(generator: Generator | None, parameters: list[nn.Parameter]) -> None:
    if generator is None:
        return
    if not isinstance(generator, Generator):
        raise TypeError(f"generator: {type(generator).__name__}, wanted a torch.Generator")
    if generator.device.type != parameters[0].device.type:
        raise ValueError(f"generator: on {generator.device}, wanted one on {parameters[0].device}")


def _is_empty(part: Mapping[str, Tensor]) -> bool:
    """Whether a batch holds no sample, as a Poisson draw may."""
    tensors = [value for value in part.values() if isinstance(value, Tensor) and value.dim() > 0]
    return bool(tensors) and all(value.shape[0] == 0 for value in tensors)


@torch.no_grad()
def _add_noise(parameters: list[nn.Parameter], std: float, divisor: float, generator: Generator | None) -> None:
    for p in parameters:
        if std > 0:
            noise = torch.randn(p.shape, generator=generator, device=p.device, dtype=torch.float32)
            accumulate(p, noise.mul_(std))
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        p.grad.div_(divisor)


@torch.no_grad()
def _clear(parameters: list[nn.Parameter]) -> None:
    for p in parameters:  # in place: gradients may be views into a flat buffer
        if p.grad is not None:
            p.grad.zero_()
