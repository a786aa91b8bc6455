"""Which layers travel: each transformer block's sensitivity to adversarial noise on the embeddings; the GAL choice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from .losses import wide
from .tree import evaluating


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a model in order: the elements of the one outermost nn.ModuleList with parameters.

    Works on BERT, RoBERTa, MPNet, DistilBERT, LLaMA, GPT and their like, wrapped by PEFT or not. Of several lists the
    one with trainable parameters is meant.

    Raises ValueError when none or several are left (an encoder-decoder model has two).
    """
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in found)  # experts, sub-layers: lists inside a block
        if isinstance(module, nn.ModuleList) and not nested and any(True for _ in module.parameters()):
            found[name] = module
    if len(found) > 1:
        found = {name: module for name, module in found.items() if any(p.requires_grad for p in module.parameters())}
    if len(found) != 1:
        raise ValueError(f"model: blocks in the module lists {sorted(found)}, wanted exactly one list with the adapter")
    return list(next(iter(found.values())))


def sensitivity(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    norm: float = 2.0,
    gamma: float = 1e-2,
    layers: Sequence[int] | None = None,
) -> Tensor:
    """How much each block's output answers to the worst small noise on the input embeddings [paper]::

        I_l = mean over samples of ‖h_l(x + ε) − h_l(x)‖_F / ‖h_l(x)‖_F

    h_l is the output of block l, ε = :func:`perturbation` of that sample's own loss gradient by its embeddings (output
    of ``model.get_input_embeddings()``; position embeddings and norms come after). Padding takes no noise and counts in
    no norm. A sample whose gradient is zero contributes 0, as does one without a token.

    Two passes: forward and backward for the gradient, then one forward of clean and noisy samples side by side, so that
    of h_l only norms are kept. Dropout is off during the call; training flags, parameters' ``.grad`` and hooks are
    afterwards what they were. Parameters need no gradient. In bf16 the rounding of h drowns a small γ: use a float32
    model without autocast.

    Args:
        model: a Hugging Face model (PEFT-wrapped or not) that returns a loss when given labels, a sum or a mean over
            samples: ε does not depend on its scale.
        batch: tensors (N, …) with input_ids (N, T), labels, attention_mask (N, T) unless nothing is padded.
        norm: p of the ball ‖ε‖_p ≤ γ, in [1, ∞].
        gamma: γ > 0, in units of the embeddings; of a whole sample's noise, not of each token's. The default is [ours].
        layers: block indices to measure; None: all.

    Returns float64 (number of layers,) on the CPU, in the order of ``layers``.
    Raises ValueError for a batch or model that does not fit, FloatingPointError for a result that is not finite.
    """
    blocks = find_blocks(model)
    chosen = list(range(len(blocks))) if layers is None else list(layers)
    if not chosen or len(set(chosen)) != len(chosen) or not set(chosen) <= set(range(len(blocks))):
        raise ValueError(f"layers: {chosen}, wanted different block indices in 0 … {len(blocks) - 1}")
    real = _real_positions(batch)
    embeddings = cast(Any, model).get_input_embeddings()
    with evaluating(model):
        grad = wide(_embedding_grad(model, embeddings, batch)).masked_fill(~real[..., None], 0.0)
        noise = perturbation(grad, norm, gamma)
        values = _relative_changes(model, embeddings, [blocks[l] for l in chosen], batch, real, noise)
    result = values.mean(dim=1).cpu()
    if not bool(result.isfinite().all()):
        raise FloatingPointError(f"model: sensitivity {result.tolist()}, wanted finite outputs and gradients")
    return result


def perturbation(grad: Tensor, norm: float, gamma: float) -> Tensor:
    """The noise that raises each sample's loss most, to first order, within ‖ε‖_p ≤ γ [paper]::

        ε = γ · sign(g)·|g|^{q−1} / ‖g‖_q^{q−1},   1/p + 1/q = 1

    p = 2: γ·g/‖g‖₂; p = ∞: γ·sign(g); p = 1: all on the largest values of g.

    Args:
        grad: float (N, …), one gradient a sample; norms run over everything but the first dimension.
        norm: p in [1, ∞].  gamma: γ > 0.

    Returns a tensor like ``grad``; zero where a sample's whole gradient is zero. It does not depend on the scale of g.
    """
    if not norm >= 1.0:
        raise ValueError(f"norm: {norm}, wanted 1 ≤ norm ≤ ∞")
    if not 0.0 < gamma < math.inf:
        raise ValueError(f"gamma: {gamma}, wanted 0 < gamma < ∞")
    flat = grad.flatten(1)
    size = flat.abs()
    largest = size.amax(dim=1, keepdim=True)
    tiny = torch.finfo(grad.dtype).tiny
    size = size / largest.clamp_min(tiny)  # a power of a small gradient would underflow
    if norm == 1.0:
        step = (size == 1.0).to(grad.dtype)
        step = step / step.sum(dim=1, keepdim=True).clamp_min(1.0)
    else:
        q = 1.0 if math.isinf(norm) else norm / (norm - 1.0)
        length = torch.linalg.vector_norm(size, q, dim=1, keepdim=True).clamp_min(1.0)  # ≥ 1 unless all is zero
        step = (size / length) ** (q - 1.0)
    return (gamma * flat.sign() * step).view_as(grad)


def combine(device_values: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """The server's I_l = Σ_k (n_k/n) I_l^k [paper]: float64 (layers,) from K tensors (layers,) and K sizes n_k > 0."""
    if not device_values or len(device_values) != len(sizes):
        raise ValueError(f"sizes: {len(sizes)} for {len(device_values)} devices, wanted one for each of at least one")
    if not all(0 < size < math.inf for size in sizes):
        raise ValueError(f"sizes: {list(sizes)}, wanted numbers of samples > 0")
    values = torch.stack([value.detach().cpu().double() for value in device_values])
    weights = torch.tensor(sizes, dtype=torch.float64)
    return (weights / weights.sum()) @ values


def choose_gal(sensitivity: Tensor, count: int, layers: Sequence[int] | None = None) -> tuple[int, ...]:
    """The ``count`` most sensitive layers [paper], ascending; of equal ones the lower index.

    ``layers`` names the layers that ``sensitivity`` (layers,) is about; None: 0, 1, …. Raises ValueError for a count
    outside 1 … number of layers, a NaN, or lengths that differ.
    """
    names = tuple(range(sensitivity.numel())) if layers is None else tuple(layers)
    if sensitivity.dim() != 1 or len(names) != sensitivity.numel() or bool(sensitivity.isnan().any()):
        raise ValueError(f"sensitivity: {sensitivity.tolist()}, wanted one number for each of {len(names)} layers")
    if not 1 <= count <= len(names):
        raise ValueError(f"count: {count}, wanted 1 … {len(names)} layers")
    ranked = sorted(zip((-sensitivity).tolist(), names, strict=True))
    return tuple(sorted(name for _, name in ranked[:count]))


def _real_positions(batch: Mapping[str, Any]) -> Tensor:
    """(N, T) bool, False at padding."""
    for name in ("input_ids", "labels"):
        if not isinstance(batch.get(name), Tensor):
            raise ValueError(f"batch: {name!r} is {type(batch.get(name)).__name__}, wanted a tensor")
    shape = batch["input_ids"].shape
    mask = batch.get("attention_mask")
    mask = torch.ones_like(batch["input_ids"]) if mask is None else mask
    if len(shape) != 2 or shape[0] == 0 or mask.shape != shape:
        raise ValueError(
            f"batch: input_ids {tuple(shape)} with attention_mask {tuple(mask.shape)}, wanted both (N, T), N ≥ 1"
        )
    return mask.bool()


def _embedding_grad(model: nn.Module, embeddings: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """(N, T, d): ∂loss/∂embeddings; rows are independent since every sample has its own embeddings."""
    leaves: list[Tensor] = []

    def as_leaf(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    with torch.enable_grad(), _hooks({embeddings: as_leaf}):
        loss = cast(Tensor, model(**batch).loss)
        _check_once("input embeddings", len(leaves))
        return torch.autograd.grad(loss, leaves[0])[0]


def _relative_changes(
    model: nn.Module,
    embeddings: nn.Module,
    blocks: list[nn.Module],
    batch: Mapping[str, Any],
    real: Tensor,
    noise: Tensor,
) -> Tensor:
    """(blocks, N) float64: ‖h(x + ε) − h(x)‖_F / ‖h(x)‖_F, from one forward of both halves."""
    samples = len(real)
    changes: dict[nn.Module, list[Tensor]] = {block: [] for block in blocks}
    padding = ~real[..., None]

    def add_noise(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return torch.cat([output[:samples], output[samples:] + noise.to(output.dtype)])

    def measure(module: nn.Module, args: Any, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        if hidden.shape[:2] != (2 * samples, real.shape[1]):
            raise ValueError(f"model: a block's output is {tuple(hidden.shape)}, wanted (N, T, …) as input_ids")
        # masked_fill, not a product: where nothing can be attended to, a padded position may be NaN
        clean, noisy = (wide(half).masked_fill(padding, 0.0).flatten(1) for half in hidden.chunk(2))
        size = torch.linalg.vector_norm(clean, dim=1, dtype=torch.float64)
        change = torch.linalg.vector_norm(noisy - clean, dim=1, dtype=torch.float64)
        changes[module].append(torch.where(size == 0.0, 0.0, change / size))

    def twice(value: Any) -> Any:
        return torch.cat([value, value]) if isinstance(value, Tensor) and value.shape[:1] == (samples,) else value

    both = {name: twice(value) for name, value in batch.items() if name != "labels"}
    with torch.no_grad(), _hooks({embeddings: add_noise, **dict.fromkeys(blocks, measure)}):
        model(**both)
    for index, values in enumerate(changes.values()):
        _check_once(f"block {index} of those asked for", len(values))
    return torch.stack([values[0] for values in changes.values()])


def _check_once(what: str, times: int) -> None:
    if times != 1:
        raise ValueError(f"model: {what} ran {times} times in one forward, wanted once")


@contextmanager
def _hooks(hooks: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, hook in hooks.items():
            stack.callback(module.register_forward_hook(hook).remove)
        yield
