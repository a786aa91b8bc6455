"""FlatAdapter: one contiguous float32 buffer under all trainable parameters of a PEFT model.

Changing the simulated device is one copy, the optimizer is one launch over the active rows, a layer is one slice, and
packing is copying slices.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import nullcontext
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fibecfed_kernels import Entry, row_layout

from .gradients import GradientViews
from .identity import identity_of
from .tree import BrokenViewsError, ModelTree, unwrapped

LORA = re.compile(r"\.lora_[AB]\.")
BLOCK = re.compile(r"^(?P<stack>.*?\.(?:layers?|h|blocks?))\.(?P<index>\d+)\.")


class RowTable(NamedTuple):
    """All rows of a flat adapter as int64 tensors (num_rows,): parameter (index into ``entries``), layer (−1: head),
    row inside the parameter, offset and length in values."""

    parameter: Tensor
    layer: Tensor
    row: Tensor
    offset: Tensor
    length: Tensor


class FlatAdapter:
    """Make every trainable parameter of ``model`` a view into ONE float32 buffer, gradients likewise.

    Parameters are ordered by transformer block, the head (whatever belongs to no block) last, and keep the model's
    order inside a block, so each layer is one slice of the buffer. Trainable parameters of another floating dtype
    become float32 (their modules' inputs are cast), as PEFT does for LoRA weights. Names are those inside wrappers
    (torch.compile, DistributedDataParallel). Gradients come into the buffer whatever a training loop does: see
    :class:`fibecfed.gradients.GradientViews`.

    Attributes:
        data: float32 nn.Parameter (numel,), the values; ``data.grad`` is ``grad``. grad: float32 (numel,).
        entries: one :class:`fibecfed_kernels.Entry` a parameter. layers: block indices, ascending.
        num_rows: number of rows (neurons). layout: int64 (lines, 4) for the update ops.

    Raises TypeError for what is no model; RuntimeError in inference mode; ValueError when nothing is trainable,
    parameters are spread over devices, two stacks of blocks (an encoder and a decoder) would share indices, or a bias
    or norm is trained in half precision beside frozen values. Anything that breaks the views of the values later
    (``.to()``, ``.half()``, re-assigned parameters, another adapter that is trained) raises :class:`BrokenViewsError`
    at the next use; see :meth:`check`.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: {type(model).__name__}, wanted a torch.nn.Module")
        model = unwrapped(model)
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("model: no trainable parameter; wrap it with peft.get_peft_model first")
        if torch.is_inference_mode_enabled():
            raise RuntimeError("FlatAdapter: inference mode is on, in which nothing can be trained")
        devices = {p.device for _, p in named}
        if len(devices) > 1:
            raise ValueError(f"model: trainable parameters on {sorted(map(str, devices))}, wanted one device")
        layers = layers_of([name for name, _ in named])
        named.sort(key=lambda item: (layers[item[0]] is None, layers[item[0]] or 0))  # stable: keeps the model's order

        self.model = model
        entries, offset = [], 0
        for name, parameter in named:
            entries.append(Entry(name, tuple(parameter.shape), offset, layers[name]))
            offset += parameter.numel()
            if parameter.dtype != torch.float32:
                _check_neighbours(model, entries[-1], parameter.dtype)
        self.entries: tuple[Entry, ...] = tuple(entries)
        self.layers: tuple[int, ...] = tuple(sorted({e.layer for e in entries if e.layer is not None}))
        self.num_rows: int = sum(e.rows for e in entries)

        buffer = torch.cat([p.detach().reshape(-1).float() for _, p in named])
        self.data = nn.Parameter(buffer)
        self.grad = torch.zeros_like(buffer)
        self.data.grad = self.grad
        self._parameters = [p for _, p in named]
        for entry, parameter in zip(self.entries, self._parameters, strict=True):
            if parameter.dtype != torch.float32:
                take_as_float32(model.get_submodule(entry.name.rpartition(".")[0]))
            parameter.grad = None
            parameter.data = _own_storage(buffer[entry.offset : entry.offset + entry.numel].view(entry.shape))
        self._tree = ModelTree(model, [name for name, _ in named], self._parameters)
        self._frozen: frozenset[int] = frozenset()
        self._gradients = GradientViews(self.entries, self._parameters, self.grad)
        self.layout = row_layout(self.entries, buffer.device)
        self._values = _slices([(e.layer, e.numel) for e in entries])
        self._rows = _slices([(e.layer, e.rows) for e in entries])

    @property
    def numel(self) -> int:
        """Number of trainable values."""
        return self.data.numel()

    def values(self, layer: int | None) -> slice:
        """The slice of ``data`` that belongs to a transformer block; None: the head (empty if there is none)."""
        return _pick(self._values, layer, self.layers)

    def rows(self, layer: int | None) -> slice:
        """The slice of rows (of a mask) that belongs to a transformer block; None: the head."""
        return _pick(self._rows, layer, self.layers)

    def named_views(self) -> list[tuple[Entry, nn.Parameter]]:
        """(entry, the model's parameter that is a view of it), in the order of the buffer."""
        return list(zip(self.entries, self._parameters, strict=True))

    @cached_property
    def row_lengths(self) -> Tensor:
        """int64 (num_rows,): the number of values in each row."""
        return self.layout[:, 3].repeat_interleave(self.layout[:, 2])

    @cached_property
    def table(self) -> RowTable:
        """Parameter, layer, row, offset and length of every row."""
        counts = torch.tensor([e.rows for e in self.entries])
        parameter = torch.arange(len(self.entries)).repeat_interleave(counts)
        layer = torch.tensor([-1 if e.layer is None else e.layer for e in self.entries])[parameter]
        row = torch.cat([torch.arange(e.rows) for e in self.entries])
        length = self.row_lengths.cpu()
        return RowTable(parameter, layer, row, length.cumsum(0) - length, length)

    @cached_property
    def identity(self) -> Mapping[str, str]:
        """What two ends must agree on: the base model's configuration (hashed) and the adapter's."""
        return identity_of(self.model)

    def zero_grad(self) -> None:
        """Set all gradients to zero, as views of ``grad``."""
        self.check()
        self._gradients.attach()
        self.data.grad = self.grad
        self.grad.zero_()

    def collect_gradients(self, scaled: bool = False) -> Tensor | None:
        """Bring the parameters' gradients into ``grad``, also those that were assigned (``p.grad = …``).

        Returns bool (num_rows,): the rows of parameters that have a gradient and are not frozen, as torch's optimizers
        step no others; None: all rows.

        Raises BrokenViewsError when every parameter is frozen, or another one is trained instead, and, ``scaled``, when
        a gradient was assigned: a GradScaler has looked at those in ``grad`` before.
        """
        self.check()
        brought, still = self._gradients.collect()
        if brought and scaled:
            raise BrokenViewsError(
                f"{self.entries[brought[0]].name}: its gradient was assigned (DistributedDataParallel's "
                "gradient_as_bucket_view does so), and the GradScaler did not see it; wanted p.grad.copy_(…)"
            )
        if not still:
            return None
        frozen = frozenset(i for i in still if not self._parameters[i].requires_grad)
        if frozen != self._frozen:  # what is trained may be another adapter now
            self._tree.check_all()
            self._frozen = frozen
        if len(frozen) == len(self._parameters):
            raise BrokenViewsError(
                f"{self.entries[0].name} and all other parameters of the FlatAdapter are frozen, wanted one to train"
            )
        rows = torch.ones(self.num_rows, dtype=torch.bool)
        for i in still:
            rows[self._rows_of[i]] = False
        return rows.to(self.data.device)

    def copy_(self, values: Tensor) -> FlatAdapter:
        """Overwrite all trainable values with ``values`` (numel,)."""
        self.check()
        if not isinstance(values, Tensor):
            raise TypeError(f"values: {type(values).__name__}, wanted a torch.Tensor ({self.numel},)")
        if values.shape != self.data.shape:
            raise ValueError(f"values: {tuple(values.shape)}, wanted {tuple(self.data.shape)}")
        with torch.no_grad():
            self.data.copy_(values)
        self.changed()
        return self

    def changed(self) -> None:
        """Tell autograd that ``data`` was written, which is the parameters' memory: a backward pass through a forward
        pass of before then raises, as after a step of torch's optimizers."""
        torch.autograd.graph.increment_version(self._parameters)

    def __getstate__(self) -> object:
        """Refused: in a copy the model's parameters would not lie in the buffer."""
        raise TypeError(
            "a FlatAdapter cannot be copied or pickled; copy or save its model, and make FlatAdapter(model) of that"
        )

    def check(self) -> None:
        """Raise :class:`BrokenViewsError`, naming the parameter, unless the model's parameters still are views."""
        data = self.data.data_ptr()
        for entry, parameter in zip(self.entries, self._parameters, strict=True):
            if parameter.data_ptr() != data + 4 * entry.offset or parameter.dtype != torch.float32:
                raise BrokenViewsError(
                    f"{entry.name} ({parameter.dtype} on {parameter.device}) left the flat buffer: the model was "
                    "moved, cast or its parameters replaced after FlatAdapter(model); make a new FlatAdapter"
                )
        self._tree.check()

    @cached_property
    def _rows_of(self) -> list[slice]:
        """The rows of each parameter."""
        ends = torch.tensor([entry.rows for entry in self.entries]).cumsum(0).tolist()
        return [slice(end - entry.rows, end) for entry, end in zip(self.entries, ends, strict=True)]


def layer_of(name: str) -> int | None:
    """The transformer block of a parameter by its name (``…layer.3.…``, ``…layers.3.…``, ``…h.3.…``), None: the
    head."""
    match = BLOCK.match(name)
    return int(match["index"]) if match else None


def layers_of(names: list[str]) -> dict[str, int | None]:
    """:func:`layer_of` of each name. Raises ValueError where the blocks are those of several stacks."""
    stacks = {match["stack"] for name in names if (match := BLOCK.match(name))}
    if len(stacks) > 1:
        raise ValueError(
            f"model: trainable blocks in {len(stacks)} stacks ({', '.join(sorted(stacks))}), wanted one: "
            "a block index must be unique"
        )
    return {name: layer_of(name) for name in names}


def _slices(sizes: list[tuple[int | None, int]]) -> dict[int | None, slice]:
    slices, start = {}, 0
    for layer, group in groupby(sizes, key=lambda item: item[0]):
        stop = start + sum(size for _, size in group)
        slices[layer] = slice(start, stop)
        start = stop
    slices.setdefault(None, slice(start, start))
    return slices


def _pick(slices: dict[int | None, slice], layer: int | None, known: tuple[int, ...]) -> slice:
    if layer not in slices:
        raise ValueError(f"layer: {layer!r}, wanted one of {list(known)} or None (the head)")
    return slices[layer]


def _own_storage(view: Tensor) -> Tensor:
    """The same memory as a storage of its own: what saves a model by storages (accelerate, safetensors' save_model)
    would take views of one for the same tensor under many names, and save one of them."""
    with torch.cuda.device(view.device) if view.is_cuda else nullcontext():  # DLPack knows the current device alone
        return torch.from_dlpack(view) if view.device.type in ("cpu", "cuda", "xpu") else view


def _check_neighbours(model: nn.Module, entry: Entry, dtype: torch.dtype) -> None:
    """Refuse to make a parameter float32 where what lies beside or behind it would not take that: in a block, but for
    LoRA, whose output PEFT casts; and in a module with frozen parameters of another dtype."""
    module = model.get_submodule(entry.name.rpartition(".")[0])
    others = {p.dtype for p in module.parameters(recurse=False) if not p.requires_grad}
    if (entry.layer is not None and not LORA.search(entry.name)) or others - {torch.float32}:
        raise ValueError(
            f"{entry.name}: trained in {dtype} beside frozen values of the same type, wanted float32 (load the model "
            "so), or frozen"
        )


def take_as_float32(module: nn.Module) -> None:
    """Cast a module's floating inputs to float32, as its weights are, in a model of another dtype."""
    if not getattr(module, "_fibecfed_float32", False):
        module._fibecfed_float32 = True  # type: ignore[assignment]
        module.register_forward_pre_hook(_to_float32)


def _to_float32(_: nn.Module, args: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
