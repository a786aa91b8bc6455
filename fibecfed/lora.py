"""The LoRA pairs of a PEFT model, and what else it trains: finding them all, and refusing by name whatever a capture
does not understand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parallel import DistributedDataParallel

from .tree import unwrapped

# PEFT's modules that compute y = W x + B(A x) with A and B plain nn.Linear, whatever W is. By name: the module of those
# of bitsandbytes (QLoRA, LLM.int8) imports it.
LAYERS = frozenset(
    {"peft.tuners.lora.layer.Linear", "peft.tuners.lora.bnb.Linear4bit", "peft.tuners.lora.bnb.Linear8bitLt"}
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that the kernels take


class UnsupportedModuleError(ValueError):
    """A LoRA module whose per-sample Fisher information cannot be had; the message names it and says why."""


@dataclass(frozen=True, eq=False)
class LoraPair:
    """One adapter of the LoRA module ``layer``: y = B(A x), ``a`` (r, d_in) and ``b`` (d_out, r) plain nn.Linear."""

    name: str
    layer: nn.Module
    a: nn.Linear
    b: nn.Linear
    a_name: str
    b_name: str

    @property
    def trained(self) -> dict[str, Tensor]:
        """{name: weight} of A and B, or of the one that is not frozen."""
        both = {self.a_name: self.a.weight, self.b_name: self.b.weight}
        return {name: weight for name, weight in both.items() if weight.requires_grad}


def lora_pairs(model: nn.Module, allow_frozen: bool = False) -> list[LoraPair]:
    """All active LoRA pairs of ``model`` in its own order. ``allow_frozen``: of a pair A or B may be frozen (FFA-LoRA,
    Sun et al. 2024, arXiv 2403.12313, trains B alone); pairs that are frozen whole are left out.

    Raises UnsupportedModuleError naming the module for: a layer that is not one of ``LAYERS`` (embedding, convolution,
    other quantised ones) or of another dtype, DoRA and other variants, merged, disabled or inactive adapters, a LoRA
    bias, a frozen A or B unless allowed, a weight shared by two modules. ValueError when there is no LoRA module at
    all, or none that is trained.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: {type(model).__name__}, wanted a PEFT model (a torch.nn.Module with LoRA)")
    layers = [(name, module) for name, module in unwrapped(model).named_modules() if isinstance(module, LoraLayer)]
    if not layers:
        kinds = {type(config).__name__ for config in getattr(unwrapped(model), "peft_config", {}).values()}
        there = f" (its adapters: {', '.join(sorted(kinds))})" if kinds else ""
        raise ValueError(
            f"model: no LoRA module found{there}; wrap it with peft.get_peft_model(model, LoraConfig(...)) first"
        )
    pairs = [pair for name, module in layers for pair in _pairs_of(name, module, allow_frozen) if pair.trained]
    if not pairs:
        raise ValueError("model: every LoRA weight is frozen, wanted one that is trained")
    owners: dict[int, str] = {}
    for pair in pairs:
        for weight in (pair.a.weight, pair.b.weight):
            other = owners.setdefault(id(weight), pair.name)
            if other != pair.name:
                raise UnsupportedModuleError(f"{pair.name}: shares a LoRA weight with {other}")
    return pairs


@dataclass(frozen=True, eq=False)
class HeadLinear:
    """A linear module outside LoRA, of which the weight, the bias or both are trained: a task head."""

    name: str
    linear: nn.Linear


def trainable_linears(model: nn.Module, pairs: list[LoraPair]) -> list[HeadLinear]:
    """The plain nn.Linear modules with a trainable parameter, besides those of ``pairs``.

    Raises UnsupportedModuleError, naming the parameter, for anything else that is trainable (embeddings, norms, a
    weight that two modules share), and for a DistributedDataParallel wrapper, whose exchange would be passed by.
    """
    wrapper = next((name for name, m in model.named_modules() if isinstance(m, DistributedDataParallel)), None)
    if wrapper is not None:
        raise UnsupportedModuleError(
            f"{wrapper or 'model'}: DistributedDataParallel would not see gradients that are clipped by sample; give "
            "the module inside it and add up the clipped sums of the ranks"
        )
    lora = [linear for pair in pairs for linear in (pair.a, pair.b)]
    known = {id(linear.weight) for linear in lora}
    heads = []
    for path, module in model.named_modules():
        own = {f"{path}.{name}": p for name, p in module.named_parameters(recurse=False) if p.requires_grad}
        if not own or any(module is linear for linear in lora):
            continue
        name, parameter = next(iter(own.items()))
        if type(module) is not nn.Linear:
            raise UnsupportedModuleError(
                f"{name}: trainable in a {type(module).__name__}, whose gradients of single samples are not "
                "supported; wanted LoRA and nn.Linear alone: freeze it"
            )
        _check_plain(path, module)
        if any(id(p) in known for p in own.values()):
            raise UnsupportedModuleError(f"{name}: shared with another trainable module")
        if isinstance(parameter, DTensor):
            raise UnsupportedModuleError(f"{name} is sharded (a DTensor, as FSDP2 makes them), wanted a whole weight")
        known.update(map(id, own.values()))
        heads.append(HeadLinear(path, module))
    return heads


def check_unmixed(model: nn.Module) -> None:
    """Raise UnsupportedModuleError for a module that mixes the samples of a batch as it stands now."""
    for name, module in model.named_modules():
        of_batch = isinstance(module, _BatchNorm) and (module.training or not module.track_running_stats)
        if of_batch or (isinstance(module, _InstanceNorm) and module.training and module.track_running_stats):
            raise UnsupportedModuleError(
                f"{name}: {type(module).__name__} mixes the samples of a batch, wanted it in eval mode"
            )


def _pairs_of(name: str, module: LoraLayer, allow_frozen: bool) -> Iterator[LoraPair]:
    def refuse(why: str) -> UnsupportedModuleError:
        return UnsupportedModuleError(f"{name}: {why}")

    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if kind not in LAYERS or not isinstance(module, nn.Module):  # a LoraLayer is a mixin
        raise refuse(f"{kind} is not supported, only LoRA on nn.Linear and bitsandbytes' Linear4bit, Linear8bitLt")
    if module.merged:
        raise refuse("its adapter is merged into the base weight; call model.unmerge_adapter() first")
    if module.disable_adapters:
        raise refuse("its adapters are disabled; call model.enable_adapter_layers() first")
    active = [adapter for adapter in module.active_adapters if adapter in module.lora_A]
    idle = sorted(set(module.lora_A) - set(active))
    if not active or any(_trainable(module, adapter) for adapter in idle):
        raise refuse(f"adapter {', '.join(idle)} is there but not active; call model.set_adapter(...) or delete it")
    for adapter in active:
        if adapter in module.lora_variant or module.use_dora.get(adapter, False):
            raise refuse(f"adapter {adapter!r} is a LoRA variant (DoRA or the like), which is not supported")
        a, b = (
            _plain_linear(linear, f"{name}: {label} of adapter {adapter!r}", allow_frozen)
            for label, linear in (("lora_A", module.lora_A[adapter]), ("lora_B", module.lora_B[adapter]))
        )
        yield LoraPair(name, module, a, b, f"{name}.lora_A.{adapter}.weight", f"{name}.lora_B.{adapter}.weight")


def _trainable(module: LoraLayer, adapter: str) -> bool:
    return any(p.requires_grad for side in (module.lora_A, module.lora_B) for p in side[adapter].parameters())


def _plain_linear(linear: nn.Module, what: str, allow_frozen: bool) -> nn.Linear:
    if type(linear) is not nn.Linear:
        raise UnsupportedModuleError(f"{what} is a {type(linear).__name__}, wanted nn.Linear")
    _check_plain(what, linear)
    if linear.bias is not None:
        raise UnsupportedModuleError(f"{what} has a bias, whose Fisher information is not supported")
    if isinstance(linear.weight, DTensor):
        raise UnsupportedModuleError(f"{what} is sharded (a DTensor, as FSDP2 makes them), wanted a whole weight")
    if linear.weight.dtype not in DTYPES:
        raise UnsupportedModuleError(f"{what} is {linear.weight.dtype}, wanted {', '.join(map(str, DTYPES))}")
    if not linear.weight.requires_grad and not allow_frozen:
        raise UnsupportedModuleError(
            f"{what} is frozen, so its Fisher information would be missing; allow_frozen=True leaves it out"
        )
    return linear


def _check_plain(what: str, linear: nn.Linear) -> None:
    """Refuse a weight that is computed from others before each forward (weight_norm, pruning), and added parameters."""
    own = dict(linear.named_parameters(recurse=False))
    if not own.keys() <= {"weight", "bias"} or own.get("weight") is not linear.weight:
        raise UnsupportedModuleError(
            f"{what} has the parameters {', '.join(own)}, wanted weight and bias alone (no weight_norm, no pruning)"
        )
