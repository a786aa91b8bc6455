"""Masked optimizers over a FlatAdapter: torch.optim.Optimizers whose inactive rows stand still, exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fibecfed_kernels import masked_adamw_, masked_sgd_
from fibecfed_kernels.update import check_adamw, check_sgd

from .adapter import FlatAdapter


class _Masked(torch.optim.Optimizer):
    """One parameter (the flat buffer), one group; the mask lives in the group, so schedulers and state_dict carry
    it."""

    def __init__(self, flat: FlatAdapter, mask: Tensor | None, defaults: dict[str, Any]) -> None:
        if not isinstance(flat, FlatAdapter):
            raise TypeError(f"flat: {type(flat).__name__}, wanted a FlatAdapter")
        self.flat = flat
        rows = torch.ones(flat.num_rows, dtype=torch.bool, device=flat.data.device) if mask is None else mask
        super().__init__([flat.data], {**defaults, "mask": self._checked(rows)})

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
        """As torch's; refuses, before anything is changed, the state of another optimizer or of another adapter."""
        if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
            raise ValueError(f"state_dict: wanted what {type(self).__name__}.state_dict() gives")
        groups = state_dict["param_groups"]
        if len(groups) != 1 or not self.defaults.keys() <= groups[0].keys():
            raise ValueError(f"state_dict: of another optimizer, wanted one of {type(self).__name__}")
        for state in state_dict["state"].values():
            names = {*self._moments(groups[0]), "step"}
            if state.keys() != names:
                raise ValueError(f"state_dict: state of {sorted(state)}, wanted {sorted(names)}")
            for name, tensor in state.items():
                wanted = self.flat.num_rows if name == "step" else self.flat.numel
                if tensor.numel() != wanted:
                    raise ValueError(f"state_dict: {name} holds {tensor.numel()} values, wanted {wanted}")
        self._checked(groups[0]["mask"])
        super().load_state_dict(state_dict)
        self.set_mask(self.mask)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step on the active rows. Raises BrokenViewsError when the model's parameters left the buffer."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.flat.check()
        self._update(self.param_groups[0], self._state())
        return loss

    def _state(self) -> dict[str, Tensor]:
        state = self.state[self.flat.data]
        if not state:
            for name in self._moments(self.param_groups[0]):
                state[name] = torch.zeros_like(self.flat.grad)
            # torch keeps a state called "step" as it is when loading, where it would cast others to the parameter's
            # dtype
            state["step"] = torch.zeros(self.flat.num_rows, dtype=torch.int32, device=self.flat.data.device)
        return state

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        raise TypeError(f"{type(self).__name__}: use MaskedAdamW or MaskedSGD")

    def _update(self, group: dict[str, Any], state: dict[str, Tensor]) -> None:
        raise TypeError(f"{type(self).__name__}: use MaskedAdamW or MaskedSGD")


class MaskedAdamW(_Masked):
    """AdamW on the active rows of a flat adapter; see :func:`fibecfed_kernels.masked_adamw_` for the equation.

    An inactive row keeps value, both moments, decay and step count exactly; an active row becomes what
    torch.optim.AdamW would make of it had that row been stepped only when active.

    Args:
        flat: the adapter. mask: bool (num_rows,), None: all rows. lr, betas, eps, weight_decay: as torch.optim.AdamW.

    Raises TypeError or ValueError, naming the argument, for a mask of another shape or hyper-parameters out of range
    (what a scheduler sets later is checked at the step).
    """

    def __init__(
        self,
        flat: FlatAdapter,
        mask: Tensor | None = None,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        check_adamw(lr, betas, eps, weight_decay)
        super().__init__(flat, mask, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def _update(self, group: dict[str, Any], state: dict[str, Tensor]) -> None:
        masked_adamw_(
            self.flat.data.detach(),
            self.flat.grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            state["step"],
            group["mask"],
            self.flat.layout,
            **{key: group[key] for key in ("lr", "betas", "eps", "weight_decay")},
        )


class MaskedSGD(_Masked):
    """SGD on the active rows of a flat adapter; see :func:`fibecfed_kernels.masked_sgd_` for the equation.

    Args: flat and mask as :class:`MaskedAdamW`; the others as torch.optim.SGD.
    """

    def __init__(
        self,
        flat: FlatAdapter,
        mask: Tensor | None = None,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        check_sgd(lr, momentum, dampening, weight_decay, nesterov)
        hyper = {"momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(flat, mask, {"lr": lr, **hyper})

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _update(self, group: dict[str, Any], state: dict[str, Tensor]) -> None:
        masked_sgd_(
            self.flat.data.detach(),
            self.flat.grad,
            state.get("momentum_buffer"),
            state["step"],
            group["mask"],
            self.flat.layout,
            **{key: group[key] for key in ("lr", "momentum", "dampening", "weight_decay", "nesterov")},
        )
