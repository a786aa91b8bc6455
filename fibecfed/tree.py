"""A model as a tree of modules: what lies inside its wrappers, its mode, and whether it still is what it was when its
parameters were gathered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import nn
from torch.nn.parallel import DistributedDataParallel

Children = dict[str, nn.Module | None] | dict[str, nn.Parameter | None]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile: so its names are those that it has without them."""
    while True:
        inside = model.module if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", None)
        if not isinstance(inside, nn.Module):
            return model
        model = inside


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout and key/value caches off; every module's flag comes back as it was, also when they were mixed."""
    training = [module for module in model.modules() if module.training]
    config = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    try:
        model.eval()
        if cached:
            cast(Any, config).use_cache = False
        yield
    finally:
        if cached:
            cast(Any, config).use_cache = cached
        for module in training:
            module.training = True


class BrokenViewsError(RuntimeError):
    """The parameters of a FlatAdapter are no longer (all of) what its model trains, or no longer live in its buffer:
    the model was moved, cast, or parameters, modules or adapters were replaced or added."""


class ModelTree:
    """The parameters of ``names`` and the modules on the way to them, as they hang in ``model`` now."""

    def __init__(self, model: nn.Module, names: Sequence[str], parameters: Sequence[nn.Parameter]) -> None:
        self._model, self._own = model, {id(parameter) for parameter in parameters}
        # where each one hangs, its name there, itself, and its path; modules once each
        branches: dict[str, tuple[Children, str, object, str]] = {}
        for full, parameter in zip(names, parameters, strict=True):
            module, *path = model, *full.split(".")
            for i, name in enumerate(path[:-1], 1):
                child = module._modules[name]
                assert child is not None
                branches.setdefault(".".join(path[:i]), (module._modules, name, child, ".".join(path[:i])))
                module = child
            branches[full] = (module._parameters, path[-1], parameter, full)
        self._branches = list(branches.values())
        self._sizes = self._count()

    def check(self) -> None:
        """Raise BrokenViewsError, naming it, for what was replaced, deleted, or added and is trained."""
        for children, name, child, path in self._branches:
            if children.get(name) is not child:
                raise BrokenViewsError(
                    f"{path} was replaced in the model, or deleted, after FlatAdapter(model); make a new FlatAdapter"
                )
        if any(len(children) != size for children, size in self._sizes):
            self.check_all()
            self._sizes = self._count()

    def check_all(self) -> None:
        """Raise BrokenViewsError for a parameter that is trained and not one of these. Looks at the whole model."""
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad and id(parameter) not in self._own:
                raise BrokenViewsError(
                    f"{name} is trained and not in the FlatAdapter (another adapter was added or set, or it was frozen "
                    "before); make a new FlatAdapter"
                )

    def _count(self) -> list[tuple[Children, int]]:
        containers = {id(children): children for children, *_ in self._branches}
        return [(children, len(children)) for children in containers.values()]
