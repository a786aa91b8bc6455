"""A factor on the gradients and a learning rate a line: what torch does with scaled gradients and parameter groups."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fibecfed_kernels import use_backend

from .bodies import BODIES, bodies
from .oracle import assert_near
from .update_tools import HYPER, SHAPES, STEPS, State, flat, give_gradients, gradients

pytestmark = pytest.mark.usefixtures("one_thread")
steps = pytest.mark.parametrize("name", STEPS)
BUFFERS = ("data", "first", "second", "steps")


def used(share: float = 0.6, line_numel: int = 64) -> State:
    state = State(line_numel=line_numel).used()
    state.mask = torch.rand(state.rows, generator=torch.Generator().manual_seed(5)) < share
    return state


def per_line(state: State, chosen: Callable[[int], float]) -> Tensor:
    """float64 (lines,): ``chosen`` of the number of the parameter that a line belongs to."""
    starts = torch.tensor([entry.offset for entry in state.entries])
    owner = torch.searchsorted(starts, state.layout[:, 0].contiguous(), right=True) - 1
    return torch.tensor([chosen(i) for i in owner.tolist()], dtype=torch.float64)


def ones_but(line: int, value: float) -> Tensor:
    lr_scale = torch.ones(10, dtype=torch.float64)
    lr_scale[line] = value
    return lr_scale


def assert_same(state: State, other: State) -> None:
    for buffer in BUFFERS:
        assert torch.equal(getattr(state, buffer), getattr(other, buffer)), buffer


@bodies
@steps
@pytest.mark.parametrize("scale", [0.37, 1.0, 2.0**-16, 0.0])
def test_scaled_gradients_are_gradients_multiplied_before(body: str, name: str, scale: float) -> None:
    state, other, factor = used(), used(), torch.tensor(scale)
    (grad,) = gradients(state.numel, 1)
    grad[state.per_value(~state.mask)] = torch.nan
    before = grad.clone()
    with use_backend(body):
        STEPS[name](state, grad, grad_scale=factor)
        STEPS[name](other, grad * factor)
    assert_same(state, other)
    assert torch.equal(grad.nan_to_num(), before.nan_to_num()), "the gradients were changed"


@bodies
@steps
def test_scales_of_one_give_the_bits_of_no_scales(body: str, name: str) -> None:
    state, other = used(), used()
    ones = {"grad_scale": torch.tensor(1.0), "lr_scale": torch.ones(len(state.layout), dtype=torch.float64)}
    with use_backend(body):
        for grad in gradients(state.numel, 2):
            STEPS[name](state, grad, **ones)
            STEPS[name](other, grad)
    assert_same(state, other)


@bodies
@steps
def test_learning_rates_of_lines_are_parameter_groups_under_a_scheduler(body: str, name: str) -> None:
    state = State(line_numel=64)
    parameters = state.parameters()
    groups = [
        {"params": parameters[::2]},
        {"params": parameters[1::2], "lr": 16 * HYPER[name]["lr"]},
    ]
    kind = torch.optim.AdamW if name == "adamw" else torch.optim.SGD
    optimizer = kind(groups, **HYPER[name])
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 25, eta_min=0.0)
    lr_scale = per_line(state, lambda i: 16.0 if i % 2 else 1.0)
    for k, grad in enumerate(gradients(state.numel, 20)):
        give_gradients(parameters, grad * 0.3)
        for group, ratio in zip(optimizer.param_groups, (1, 16), strict=True):
            group["lr"] = ratio * optimizer.param_groups[0]["lr"]  # the scheduler rounds each group's own
        with use_backend(body):
            lr = optimizer.param_groups[0]["lr"]
            STEPS[name](state, grad, lr=lr, lr_scale=lr_scale, grad_scale=torch.tensor(0.3))
        optimizer.step()
        scheduler.step()
        assert k < 1 or optimizer.param_groups[0]["lr"] < HYPER[name]["lr"]
    if body == "reference":
        assert torch.equal(state.data, flat(parameters))
    else:
        assert_near(state.data, flat(parameters).double(), "update")


@steps
@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("line_numel", [7, 64, 3000])
def test_cpp_agrees_with_the_reference_on_a_rate_for_every_line(name: str, share: float, line_numel: int) -> None:
    states = {}
    for body in BODIES:
        state = states[body] = used(share, line_numel)
        state.steps[:: 2 if share < 1 else 1] = 3  # rows of one step count in lines of several rates
        lr_scale = torch.rand(len(state.layout), generator=torch.Generator().manual_seed(6), dtype=torch.float64)
        lr_scale[::4], lr_scale[1::4] = 0.0, 16.0
        with use_backend(body):
            for grad in gradients(state.numel, 2):
                STEPS[name](state, grad, lr_scale=lr_scale, grad_scale=torch.tensor(0.25))
    assert torch.equal(states["cpp"].steps, states["reference"].steps)
    for buffer in ("data", "first", "second"):
        assert_near(getattr(states["cpp"], buffer), getattr(states["reference"], buffer).double(), "update")


@bodies
@steps
def test_a_learning_rate_of_zero_moves_moments_but_no_values(body: str, name: str) -> None:
    state = used()
    before = state.copy()
    with use_backend(body):
        lr_scale = per_line(state, lambda i: 0.0 if i == 1 else 1.0)
        STEPS[name](state, gradients(state.numel, 1)[0], lr_scale=lr_scale)
    entry = state.entries[1]
    span = slice(entry.offset, entry.offset + entry.numel)
    assert torch.equal(state.data[span], before.data[span])
    assert torch.equal(state.steps, before.steps + state.mask)
    active = state.per_value(state.mask)
    assert (state.data != before.data)[active].float().mean() > 0.8
    if name not in ("plain", "sgd"):
        assert (state.first[span] != before.first[span])[active[span]].all()


@bodies
@pytest.mark.parametrize(
    ("scales", "error", "words"),
    [
        ({"grad_scale": 0.5}, TypeError, "grad_scale: float, wanted a torch.Tensor"),
        (
            {"grad_scale": torch.tensor(0.5).double()},
            TypeError,
            r"grad_scale: torch.float64 \(\) .* torch.float32 \(\)",
        ),
        ({"grad_scale": torch.ones(1)}, ValueError, r"grad_scale: torch.float32 \(1,\) .* wanted torch.float32 \(\)"),
        ({"grad_scale": torch.ones((), device="meta")}, ValueError, "grad_scale: .* on meta"),
        ({"lr_scale": [1.0]}, TypeError, "lr_scale: list, wanted a torch.Tensor"),
        ({"lr_scale": torch.ones(11)}, TypeError, r"lr_scale: torch.float32 \(11,\) .* torch.float64 \(10,\)"),
        ({"lr_scale": torch.ones(11).double()}, ValueError, r"lr_scale: .*\(11,\)"),
        ({"lr_scale": torch.ones(20).double()[::2]}, ValueError, r"lr_scale: strides \(2,\)"),
        ({"lr_scale": ones_but(3, -1.0)}, ValueError, "lr_scale: -1.0 for line 3, wanted finite numbers ≥ 0"),
        ({"lr_scale": ones_but(9, torch.nan)}, ValueError, "lr_scale: nan for line 9"),
        ({"lr_scale": ones_but(0, torch.inf)}, ValueError, "lr_scale: inf for line 0"),
    ],
)
def test_wrong_scales_are_refused_by_name(body: str, scales: dict, error: type[Exception], words: str) -> None:
    state = State(SHAPES[1:2], line_numel=80)
    before = state.copy()
    for name in ("adamw", "momentum"):
        with use_backend(body), pytest.raises(error, match=words):
            STEPS[name](state, torch.ones(state.numel), **scales)
    assert_same(state, before)


def test_rates_changed_in_place_are_checked_again() -> None:
    state = State(SHAPES[1:2], line_numel=80)
    lr_scale = torch.ones(10, dtype=torch.float64)
    for k in range(2):
        state.adamw(torch.ones(state.numel), lr=0.1, lr_scale=lr_scale)
        assert (state.steps == k + 1).all()
    lr_scale[7] = torch.inf
    with pytest.raises(ValueError, match="lr_scale: inf for line 7"):
        state.adamw(torch.ones(state.numel), lr=0.1, lr_scale=lr_scale)


@pytest.mark.parametrize(
    ("scales", "words"),
    [
        ({"grad_scale": torch.ones(2)}, r"grad_scale: wanted float32 \(\)"),
        ({"grad_scale": torch.tensor(1.0).double()}, r"grad_scale: wanted float32 \(\)"),
        ({"lr_scale": torch.ones(9).double()}, r"lr_scale: wanted contiguous float64 \(10,\)"),
        ({"lr_scale": torch.ones(10)}, r"lr_scale: wanted contiguous float64 \(10,\)"),
    ],
)
def test_the_registered_ops_check_the_scales_too(scales: dict[str, Tensor], words: str) -> None:
    state = State(SHAPES[1:2], line_numel=80)
    moments = (state.first, state.second)
    rest = (state.steps, state.mask, state.layout)
    with pytest.raises(RuntimeError, match=words):
        torch.ops.fibecfed.masked_adamw_(state.data, state.data * 2, *moments, *rest, 0.1, 0.9, 0.9, 0.1, 0.0, **scales)
    with pytest.raises(RuntimeError, match=words):
        torch.ops.fibecfed.masked_sgd_(
            state.data, state.data * 2, state.first, *rest, 0.1, 0.9, 0.0, 0.0, False, **scales
        )


def test_opcheck() -> None:
    state = State(SHAPES[1:2], line_numel=80).used()
    grad, rest = torch.ones(state.numel), (state.steps, state.mask, state.layout)
    for scales in (
        (torch.tensor(0.5), None),
        (None, torch.rand(10, dtype=torch.float64)),
        (torch.tensor(0.5), torch.rand(10, dtype=torch.float64)),
    ):
        adamw = (state.data, grad, state.first, state.second, *rest, 1e-2, 0.9, 0.999, 1e-8, 0.01)
        torch.library.opcheck(torch.ops.fibecfed.masked_adamw_.default, (*adamw, *scales))
        sgd = (state.data, grad, state.first, *rest, 1e-2, 0.9, 0.0, 0.01, True)
        torch.library.opcheck(torch.ops.fibecfed.masked_sgd_.default, (*sgd, *scales))


def test_a_scaled_step_compiles_without_a_graph_break() -> None:
    state, other = used(), used()
    lr_scale = torch.rand(len(state.layout), dtype=torch.float64)
    (grad,) = gradients(state.numel, 1)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(grad: Tensor, norm: Tensor, lr_scale: Tensor) -> None:
        state.adamw(grad, lr=1e-2, grad_scale=(1.0 / norm).clamp(max=1.0), lr_scale=lr_scale)

    norm = nn.utils.get_total_norm([grad])
    step(grad, norm, lr_scale)
    other.adamw(grad, lr=1e-2, grad_scale=(1.0 / norm).clamp(max=1.0), lr_scale=lr_scale)
    assert_same(state, other)
