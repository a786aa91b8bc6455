"""What the tests of the masked steps share: buffers over odd shapes, gradients, and the steps to take."""

from __future__ import annotations

import math
from itertools import accumulate

import torch
from torch import Tensor, nn

from fibecfed_kernels import Entry, masked_adamw_, masked_sgd_, row_layout

# LoRA pairs, a bias, a scalar, a rank-3 parameter, a row longer than a line
SHAPES = ((8, 31), (100, 8), (4, 384), (384, 12), (7,), (), (3, 5, 7), (2, 3000), (19, 1))


def entries_of(shapes: tuple[tuple[int, ...], ...]) -> list[Entry]:
    sizes = [torch.Size(shape).numel() for shape in shapes]
    offsets = accumulate(sizes, initial=0)
    return [Entry(f"p{i}", shape, offset, i) for i, (shape, offset) in enumerate(zip(shapes, offsets, strict=False))]


class State:
    """Buffers of an update over ``shapes``; ``step`` makes one with the hyper-parameters of torch.optim's group."""

    def __init__(self, shapes=SHAPES, seed: int = 0, line_numel: int = 1024):
        self.entries = entries_of(shapes)
        self.layout = row_layout(self.entries, line_numel=line_numel)
        self.rows = sum(entry.rows for entry in self.entries)
        self.numel = sum(entry.numel for entry in self.entries)
        self.lengths = self.layout[:, 3].repeat_interleave(self.layout[:, 2])
        generator = torch.Generator().manual_seed(seed)
        self.data = torch.randn(self.numel, generator=generator)
        self.first, self.second = torch.zeros(self.numel), torch.zeros(self.numel)
        self.steps = torch.zeros(self.rows, dtype=torch.int32)
        self.mask = torch.ones(self.rows, dtype=torch.bool)

    def used(self, seed: int = 1) -> State:
        """As after many steps, each row with a count of its own (more counts than any small table holds)."""
        generator = torch.Generator().manual_seed(seed)
        self.first = torch.randn(self.numel, generator=generator) * 1e-2
        self.second = torch.rand(self.numel, generator=generator) * 1e-3
        self.steps = torch.randint(0, 200, (self.rows,), generator=generator, dtype=torch.int32)
        return self

    def copy(self) -> State:
        other = State.__new__(State)
        other.__dict__ = {k: v.clone() if isinstance(v, Tensor) else v for k, v in self.__dict__.items()}
        return other

    def adamw(self, grad: Tensor, **hyper) -> None:
        masked_adamw_(self.data, grad, self.first, self.second, self.steps, self.mask, self.layout, **hyper)

    def sgd(self, grad: Tensor, **hyper) -> None:
        buffer = self.first if hyper.get("momentum") else None
        masked_sgd_(self.data, grad, buffer, self.steps, self.mask, self.layout, **hyper)

    def parameters(self) -> list[nn.Parameter]:
        return [nn.Parameter(self.data[e.offset : e.offset + e.numel].clone().view(e.shape)) for e in self.entries]

    def per_value(self, rows: Tensor) -> Tensor:
        return rows.repeat_interleave(self.lengths)


def give_gradients(parameters: list[nn.Parameter], grad: Tensor) -> None:
    for parameter, part in zip(parameters, grad.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view(parameter.shape).clone()


def flat(tensors) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def gradients(numel: int, count: int, seed: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(numel, generator=generator) * 10.0 ** (k % 5 - 4) for k in range(count)]


def on_the_edge(numel: int, seed: int) -> Tensor:
    """Gradients whose norm is half-way between two float32s: the last bit of a float64 sum of squares decides."""
    (grad,) = gradients(numel, 1, seed)
    grad[-4:] = 0.0
    squares = [g * g for g in grad.tolist()]
    norm = 1.001 * math.sqrt(math.fsum(squares))
    ulp = 2.0 ** (math.frexp(norm)[1] - 24)
    edge = (math.floor(norm / ulp) + 0.5) * ulp
    for place in range(-4, 0):  # what is missing in the sum, each time all but a millionth of it
        grad[place] = math.sqrt(-math.fsum([*squares, -edge * edge])) * (1 - 2e-7)
        squares.append(float(grad[place]) ** 2)
    assert math.sqrt(math.fsum(squares)) == edge
    return grad


HYPER = {
    "adamw": {"lr": 1e-2, "weight_decay": 0.1},
    "plain": {"lr": 0.1},
    "sgd": {"lr": 0.1, "weight_decay": 0.1},
    "momentum": {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
}


def _step(name: str):
    method = State.adamw if name == "adamw" else State.sgd
    return lambda state, grad, **changes: method(state, grad, **{**HYPER[name], **changes})


STEPS = {name: _step(name) for name in HYPER}  # each a function of a state, a gradient and what differs from HYPER
