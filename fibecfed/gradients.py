"""The gradients of several parameters as views of one buffer, whatever a training loop does to them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fibecfed_kernels import Entry


class GradientViews:
    """Makes each parameter's ``.grad`` a view of ``buffer`` and brings it back there.

    ``model.zero_grad()`` (transformers' Trainer calls it) drops the views, and the next backward pass makes tensors of
    its own: as soon as a gradient is there it is copied into the buffer and the view put in its place, by a hook on the
    parameter. What was assigned to ``.grad`` past a backward pass :meth:`collect` brings in.

    Args: entries, parameters: one of each for a parameter; ``parameters[i]`` is a view of the values at
    ``entries[i].offset``, the gradients lie likewise in ``buffer``.
    """

    def __init__(self, entries: Sequence[Entry], parameters: Sequence[nn.Parameter], buffer: Tensor) -> None:
        self._entries, self._parameters, self._buffer = tuple(entries), tuple(parameters), buffer
        self._offsets = [buffer.element_size() * entry.offset for entry in entries]
        self._reached: set[int] = set()  # by a backward pass, since the last zero_grad
        self.attach()
        for i, parameter in enumerate(self._parameters):
            parameter.register_post_accumulate_grad_hook(_keeper(weakref.ref(self), i, parameter.data_ptr()))

    def attach(self) -> None:
        """Put the views in place, as if no backward pass had been; what else was in ``.grad`` is dropped."""
        self._reached.clear()
        for i, parameter in enumerate(self._parameters):
            if not self._is_view(i):
                parameter.grad = self._view(i)

    def take(self, i: int) -> None:
        """Copy the gradient of a parameter into the buffer, unless there is none or it lies there."""
        self._reached.add(i)
        gradient = self._parameters[i].grad
        if gradient is not None and not self._is_view(i):
            with torch.no_grad():
                self._parameters[i].grad = self._view(i).copy_(gradient)

    def collect(self) -> tuple[list[int], list[int]]:
        """Bring all gradients into the buffer. Returns which parameters' had to be brought, and which parameters are
        not to be stepped: without a gradient (their part of the buffer is zeroed) or frozen. One that no backward pass
        has reached has none if its part of the buffer is still zero."""
        brought, still, buffer = [], [], self._buffer.data_ptr()
        for i, (parameter, offset) in enumerate(zip(self._parameters, self._offsets, strict=True)):
            gradient = parameter.grad
            if gradient is None:
                self._view(i).zero_()
            elif gradient.data_ptr() != buffer + offset:
                self.take(i)
                brought.append(i)
        for i, parameter in enumerate(self._parameters):
            missed = i not in self._reached and not bool(self._view(i).any())
            if parameter.grad is None or not parameter.requires_grad or missed:
                still.append(i)
        return brought, still

    def _view(self, i: int) -> Tensor:
        entry = self._entries[i]
        return self._buffer[entry.offset : entry.offset + entry.numel].view(entry.shape)

    def _is_view(self, i: int) -> bool:
        gradient = self._parameters[i].grad
        return gradient is not None and gradient.data_ptr() == self._buffer.data_ptr() + self._offsets[i]


def _keeper(views: weakref.ref[GradientViews], i: int, address: int) -> Callable[[Tensor], None]:
    """The hook of a parameter: while its values lie at ``address`` (else it is another buffer's by now)."""

    def keep(parameter: Tensor) -> None:
        owner = views()
        # the gradient of a gradient (create_graph) belongs to a graph, which a copy would cut off
        if owner is not None and parameter.data_ptr() == address and not torch.is_grad_enabled():
            owner.take(i)

    return keep
