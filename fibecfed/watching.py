"""What a forward inside a capture tells: how many samples came, and whether they went through different adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from .lora import LoraPair
from .tree import unwrapped

INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features")  # samples come first


class ForwardWatch:
    """Hooks on a model and its LoRA modules, from here to ``remove``.

    Attributes: ``samples``: the first axis of what the model was called with, None where it was not called or with
    nothing that tells. ``mixed``: the first module that PEFT's ``adapter_names`` had send samples through different
    adapters (a pair then sees some of the batch, and cannot tell which), empty: none.
    """

    def __init__(self, model: nn.Module, pairs: list[LoraPair]) -> None:
        self.samples: int | None = None
        self.mixed = ""
        inside = unwrapped(model)
        self._inputs = (getattr(inside, "main_input_name", "input_ids"), *INPUTS)
        base = inside.get_base_model() if isinstance(inside, PeftModel) else inside  # may be called by itself
        watched = {id(module): module for module in (model, inside, base)}
        self._hooks = [m.register_forward_pre_hook(self._count, with_kwargs=True) for m in watched.values()]
        # PEFT adds the argument on the way to each module, and leaves hooks of its own behind where anything is raised
        # there: this only takes note
        layers = {pair.name: pair.layer for pair in pairs}
        self._hooks += [
            layer.register_forward_hook(self._note(name), with_kwargs=True) for name, layer in layers.items()
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        known = [kwargs[name] for name in self._inputs if name in kwargs]
        found = first_axis([*known, *args, *kwargs.values()])
        self.samples = self.samples if found is None else found

    def _note(self, name: str) -> Callable[..., None]:
        def watch(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if kwargs.get("adapter_names") is not None and not self.mixed:
                self.mixed = name

        return watch


def first_axis(values: Iterable[Any]) -> int | None:
    """Of the first tensor that has one, or of the first dict's inputs."""
    for value in values:
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape[0]
        if isinstance(value, Mapping):
            return first_axis(value.get(name) for name in INPUTS)
    return None
