"""Masked optimizers over a FlatAdapter: torch.optim.Optimizers whose inactive rows stand still, exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fibecfed_kernels import masked_adamw_, masked_grad_norm, masked_sgd_
from fibecfed_kernels.update.hyper import check_positive, checked_adamw, checked_sgd

from .adapter import FlatAdapter

# Options that state dicts did not always have, with what a step did before there was the option.
LATER_OPTIONS: dict[str, Any] = {"max_grad_norm": None, "loraplus_lr_ratio": 1.0}


class _Masked(torch.optim.Optimizer):
    """One parameter (the flat buffer), one group; the mask lives in the group, so schedulers and state_dict carry
    it."""

    # torch.amp.GradScaler then leaves the gradients as they are and tells what it knows in two attributes of the
    # optimizer that are there during a step alone: grad_scale (None after unscale_) and found_inf.
    _step_supports_amp_scaling = True

    _op: Callable[..., None]  # what makes a step, the buffers it keeps, and the options of the group that it takes
    _buffers: tuple[str, ...]
    _hyper: tuple[str, ...]

    def __init__(self, flat: FlatAdapter, mask: Tensor | None, defaults: dict[str, Any]) -> None:
        if not isinstance(flat, FlatAdapter):
            raise TypeError(f"flat: {type(flat).__name__}, wanted a FlatAdapter")
        self.flat = flat
        self.grad_norm: Tensor | None = None
        self._lr_scales: dict[float, Tensor | None] = {1.0: None}
        self._check_options(defaults)
        rows = torch.ones(flat.num_rows, dtype=torch.bool, device=flat.data.device) if mask is None else mask
        options = {**defaults, "mask": self._checked(rows)}
        self._options = frozenset(options)  # self.defaults gets more when torch loads a state
        super().__init__([flat.data], options)

    def __getstate__(self) -> dict[str, Any]:
        """Refused: a copy would step a buffer that no model uses."""
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled: it belongs to its FlatAdapter; keep its state_dict(), "
            "and make another one on the FlatAdapter of the copied model"
        )

    def _checked(self, mask: Tensor) -> Tensor:
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask: {type(mask).__name__}, wanted a torch.bool tensor ({self.flat.num_rows},)")
        if mask.dtype != torch.bool or tuple(mask.shape) != (self.flat.num_rows,):
            raise ValueError(f"mask: {mask.dtype} {tuple(mask.shape)}, wanted torch.bool ({self.flat.num_rows},)")
        return mask.to(self.flat.data.device).clone()

    @property
    def mask(self) -> Tensor:
        """bool (num_rows,): which rows are updated."""
        return self.param_groups[0]["mask"]

    def set_mask(self, mask: Tensor) -> None:
        """Change which rows are updated; every row keeps its own moments and step count."""
        self.param_groups[0]["mask"] = self._checked(mask)

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Zero the gradients in place: they are views of one buffer, so ``set_to_none`` is refused by being ignored."""
        self.flat.zero_grad()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: what is stepped is the flat adapter. (torch's constructor calls it once, for that.)"""
        if self.param_groups:
            raise ValueError("param_group: a masked optimizer steps the parameters of its flat adapter and no others")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; refuses, before anything is changed, the state of another optimizer or of another adapter.

        As with every torch optimizer what is loaded wins: the mask becomes the state's, like lr and the other options.
        ``set_mask`` afterwards goes on with another mask, on the moments and step counts that were loaded. A state from
        before ``max_grad_norm`` and ``loraplus_lr_ratio`` goes on as it was: without clipping, with one learning rate.
        """
        if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
            raise ValueError(f"state_dict: wanted what {type(self).__name__}.state_dict() gives")
        groups = [{**LATER_OPTIONS, **group} for group in state_dict["param_groups"]]
        if len(groups) != 1 or not self._options <= groups[0].keys():
            raise ValueError(f"state_dict: of another optimizer, wanted one of {type(self).__name__}")
        for state in state_dict["state"].values():
            names = {*self._moments(groups[0]), "step"}
            if not names <= state.keys() <= {*self._buffers, "step"}:
                raise ValueError(f"state_dict: state of {sorted(state)}, wanted {sorted(names)}")
            for name, tensor in state.items():
                wanted = self.flat.num_rows if name == "step" else self.flat.numel
                if tensor.numel() != wanted:
                    raise ValueError(f"state_dict: {name} holds {tensor.numel()} values, wanted {wanted}")
            if state["step"].dtype != torch.int32:
                raise ValueError(f"state_dict: step is {state['step'].dtype}, wanted torch.int32")
        self._checked(groups[0]["mask"])
        self._check_options(groups[0])
        super().load_state_dict({**state_dict, "param_groups": groups})
        for state in self.state.values():  # torch leaves a state called "step" where it was saved
            state["step"] = state["step"].to(self.flat.data.device)
        self.set_mask(self.mask)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step on the active rows; the gradients stay as they are. As with torch's optimizers, parameters without
        a gradient (``.grad`` is None) or frozen ones stand still.

        Called by a ``torch.amp.GradScaler`` it takes the gradients over the scale, in the same pass, and where one of
        the buffer's gradients overflowed, that of an inactive row too, nothing changes, step counts included.

        Raises BrokenViewsError when the model's parameters left the buffer or all are frozen, and FloatingPointError,
        naming the parameter and its rows, when there is a ``max_grad_norm`` and the norm is not finite; nothing is
        changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        self._check_options(group)
        mask, clips = group["mask"], group["max_grad_norm"] is not None
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        moving = self.flat.collect_gradients(scaled=found_inf is not None)
        if moving is not None:
            mask = mask & moving
        if found_inf is not None:
            if clips and found_inf.item():  # clipping waits for the device in any case
                return loss
            mask = mask & (found_inf == 0).to(mask.device)
        if scale is not None:
            scale = scale.to(mask.device).double().reciprocal().float()  # the factor of GradScaler.unscale_
        if clips:
            scale = self._clip(mask, group["max_grad_norm"], scale)
        self._update(mask, scale, self._lr_scale(group["loraplus_lr_ratio"]))
        return loss

    def _clip(self, mask: Tensor, max_norm: float, scale: Tensor | None) -> Tensor:
        """The factor of the gradients, min(1, C/(‖g‖ + 1e-6)) as torch.nn.utils.clip_grad_norm_'s, times ``scale``."""
        norm = masked_grad_norm(self.flat.grad, mask, self.flat.layout)
        if scale is not None:
            norm = norm * scale
        if not norm.isfinite():
            raise FloatingPointError(
                f"max_grad_norm: the norm of the gradients is {norm.item()}{self._not_finite(mask)}"
            )
        self.grad_norm = norm
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        return factor if scale is None else factor * scale

    def _not_finite(self, mask: Tensor) -> str:
        """Where the gradients of the active rows are not finite, in words: at most three parameters, five rows each."""
        row_of = torch.arange(self.flat.num_rows, device=mask.device).repeat_interleave(self.flat.row_lengths)
        bad = row_of[~self.flat.grad.isfinite()].unique()
        bad, table = bad[mask[bad]].cpu(), self.flat.table
        places = []
        for parameter in table.parameter[bad].unique().tolist()[:3]:
            rows = table.row[bad[table.parameter[bad] == parameter]].tolist()
            some = ", ".join(map(str, rows[:5])) + (", …" if len(rows) > 5 else "")
            places.append(f"{self.flat.entries[parameter].name} (rows {some})")
        return f": not finite in {len(bad)} rows, {'; '.join(places)}" if places else ": more than float32 can hold"

    def _lr_scale(self, ratio: float) -> Tensor | None:
        """float64 (lines,): what the learning rate of each line of the layout is multiplied by; None: all by 1."""
        if ratio not in self._lr_scales:
            ends = torch.tensor([entry.rows for entry in self.flat.entries]).cumsum(0)
            entry_of = torch.searchsorted(ends, self.flat.layout[:, 1].cpu().contiguous(), right=True)
            is_b = torch.tensor([_is_lora_b(entry.name) for entry in self.flat.entries])[entry_of]
            scales = torch.ones(len(entry_of), dtype=torch.float64).masked_fill_(is_b, ratio)
            self._lr_scales = {1.0: None, ratio: scales.to(self.flat.data.device)}
        return self._lr_scales[ratio]

    def _check_options(self, options: dict[str, Any]) -> None:
        """Refuse, by name, what both optimizers share and cannot take."""
        max_norm, ratio = options["max_grad_norm"], options["loraplus_lr_ratio"]
        if max_norm is not None:
            check_positive(max_grad_norm=max_norm)
        check_positive(loraplus_lr_ratio=ratio)
        if not math.isfinite(ratio):
            raise ValueError(f"loraplus_lr_ratio: {ratio}, wanted a finite number")
        if ratio not in self._lr_scales and not any(_is_lora_b(entry.name) for entry in self.flat.entries):
            raise ValueError(f"loraplus_lr_ratio: {ratio}, wanted 1: the flat adapter has no LoRA B matrix")

    def _state(self) -> dict[str, Tensor]:
        state = self.state[self.flat.data]
        for name in self._moments(self.param_groups[0]):
            if name not in state:
                state[name] = torch.zeros_like(self.flat.grad)
        if "step" not in state:
            # torch keeps a state called "step" as it is when loading, where it would cast others to the parameter's
            # dtype
            state["step"] = torch.zeros(self.flat.num_rows, dtype=torch.int32, device=self.flat.data.device)
        return state

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The buffers that a step with these options keeps."""
        return self._buffers

    def _update(self, mask: Tensor, grad_scale: Tensor | None, lr_scale: Tensor | None) -> None:
        group, state = self.param_groups[0], self._state()
        self._op(
            self.flat.data.detach(),
            self.flat.grad,
            *(state.get(name) for name in self._buffers),
            state["step"],
            mask,
            self.flat.layout,
            **{key: group[key] for key in self._hyper},
            grad_scale=grad_scale,
            lr_scale=lr_scale,
        )
        self.flat.changed()


class MaskedAdamW(_Masked):
    """AdamW on the active rows of a flat adapter; see :func:`fibecfed_kernels.masked_adamw_` for the equation.

    An inactive row keeps value, both moments, decay and step count exactly; an active row becomes what
    torch.optim.AdamW would make of it had that row been stepped only when active.

    Args:
        flat: the adapter. mask: bool (num_rows,), None: all rows. lr, betas, eps, weight_decay: as torch.optim.AdamW.
        max_grad_norm: C > 0; the step takes g·min(1, C/(‖g‖ + 1e-6)) for g, with ‖g‖ over the active rows, as
            torch.nn.utils.clip_grad_norm_ would have it; the gradients in the buffer are not changed. The norm is read
            on the host, which waits for a CUDA device once a step. None: no clipping.
        loraplus_lr_ratio: LoRA+ (Hayou et al., arXiv 2402.12354): the rows of LoRA B matrices (parameters of a
            ``lora_B`` or ``lora_embedding_B``) learn at lr·ratio, decay included, as in a parameter group of their own;
            all others at lr. Schedulers set lr, so both move together. Finite and > 0.

    Attributes:
        grad_norm: float32 (), ‖g‖ of the last step that clipped, before clipping; None before the first.

    Raises TypeError or ValueError, naming the argument, for a mask of another shape or hyper-parameters out of range
    (what a scheduler sets later is checked at the step).
    """

    _op = staticmethod(masked_adamw_)
    _buffers = ("exp_avg", "exp_avg_sq")
    _hyper = ("lr", "betas", "eps", "weight_decay")

    def __init__(
        self,
        flat: FlatAdapter,
        mask: Tensor | None = None,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_grad_norm: float | None = None,
        loraplus_lr_ratio: float = 1.0,
    ) -> None:
        checked_adamw(lr, betas, eps, weight_decay)
        shared = {"max_grad_norm": max_grad_norm, "loraplus_lr_ratio": loraplus_lr_ratio}
        super().__init__(flat, mask, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **shared})


class MaskedSGD(_Masked):
    """SGD on the active rows of a flat adapter; see :func:`fibecfed_kernels.masked_sgd_` for the equation.

    Args: flat, mask, max_grad_norm, loraplus_lr_ratio as :class:`MaskedAdamW`; the others as torch.optim.SGD. Where
    momentum is switched on after the first step, rows that were stepped before begin it at zero.
    """

    _op = staticmethod(masked_sgd_)
    _buffers = ("momentum_buffer",)
    _hyper = ("lr", "momentum", "dampening", "weight_decay", "nesterov")

    def __init__(
        self,
        flat: FlatAdapter,
        mask: Tensor | None = None,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        max_grad_norm: float | None = None,
        loraplus_lr_ratio: float = 1.0,
    ) -> None:
        checked_sgd(lr, momentum, dampening, weight_decay, nesterov)
        hyper = {"momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov}
        shared = {"max_grad_norm": max_grad_norm, "loraplus_lr_ratio": loraplus_lr_ratio}
        super().__init__(flat, mask, {"lr": lr, **hyper, **shared})

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self._buffers if group["momentum"] else ()


def _is_lora_b(name: str) -> bool:
    return not {"lora_B", "lora_embedding_B"}.isdisjoint(name.split("."))
