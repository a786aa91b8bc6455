"""The cases of the Triton bodies of update, as tests; they are run as those of triton_cases.py are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fibecfed_kernels import Entry, masked_adamw_, masked_grad_norm, masked_sgd_, row_layout
from fibecfed_kernels._launch import UPDATE_BLOCK
from fibecfed_kernels.update import reference
from tests.kernels.oracle import assert_near
from tests.kernels.triton_cases import DEVICE, FP32, triton_body  # noqa: F401  the fixture is used by every test

SHAPES = ((8, 384), (384, 8), (1500,), (2, 4096), (), (31, 12))


class State:
    """A flat buffer of odd shapes with its moments, step counts and a mask; gradients of inactive rows are NaN."""

    def __init__(self, share: float, line_numel: int = 1024) -> None:
        entries, offset = [], 0
        for i, shape in enumerate(SHAPES):
            entries.append(Entry(f"p{i}", shape, offset, 0))
            offset += entries[-1].numel
        self.layout = row_layout(entries, DEVICE, line_numel)
        rows = sum(entry.rows for entry in entries)
        self.steps = torch.randint(0, 4, (rows,), dtype=torch.int32).to(DEVICE)
        self.mask = (torch.rand(rows) < share).to(DEVICE)
        self.mask[400:500] = False
        self.data, self.m = torch.randn(offset).to(DEVICE), torch.randn(offset).to(DEVICE)
        self.v = torch.rand(offset).to(DEVICE)
        lengths = self.layout[:, 3].repeat_interleave(self.layout[:, 2])
        self.active = self.mask.repeat_interleave(lengths)
        self.grad = torch.where(self.active, torch.randn(offset).to(DEVICE), float("nan"))

    def check(self, moved: dict[str, Tensor], truth: dict[str, Tensor], steps: Tensor) -> None:
        """``moved``: buffers after the step; ``truth``: the same in float64 from the reference."""
        assert torch.equal(steps, self.steps + self.mask)
        for name, after in moved.items():
            before = getattr(self, name)
            assert torch.equal(after[~self.active], before[~self.active]), f"{name}: an inactive row moved"
            assert_near(after[self.active].cpu(), truth[name][self.active].cpu(), "update")


@pytest.mark.parametrize(
    ("share", "line_numel", "betas", "decay"),
    [
        (0.5, 1024, (0.9, 0.999), 0.01),
        (1.0, 1024, (0.0, 0.95), 0.0),
        (0.1, 3000, (0.3, 0.9999999), 0.1),
        (0.0, 1024, (0.9, 0.999), 0.01),
    ],
)
def test_adamw_moves_active_rows_as_the_reference_and_leaves_the_others(
    share: float, line_numel: int, betas: tuple[float, float], decay: float
) -> None:
    state = State(share, line_numel)
    state.steps[:3] = torch.tensor([70_000, 200_000, 2**31 - 2], dtype=torch.int32)  # past both tables' first entries
    moved = {name: getattr(state, name).clone() for name in ("data", "m", "v")}
    steps = state.steps.clone()
    masked_adamw_(
        moved["data"], state.grad, moved["m"], moved["v"], steps, state.mask, state.layout,
        lr=3e-3, betas=betas, weight_decay=decay,
    )  # fmt: skip
    truth = {name: getattr(state, name).double() for name in ("data", "m", "v")}
    tensors = (truth["data"], state.grad.double(), truth["m"], truth["v"])
    reference.masked_adamw_(*tensors, state.steps.clone(), state.mask, state.layout, 3e-3, *betas, 1e-8, decay)
    state.check(moved, truth, steps)


@pytest.mark.parametrize(
    ("share", "momentum", "dampening", "decay", "nesterov"),
    [
        (0.5, 0.9, 0.3, 0.01, False),
        (0.5, 0.9, 0.0, 0.01, True),
        (0.5, 0.0, 0.0, 0.0, False),
        (1.0, 0.5, 0.0, 0.0, False),
    ],
)
def test_sgd_moves_active_rows_as_the_reference_and_leaves_the_others(
    share: float, momentum: float, dampening: float, decay: float, nesterov: bool
) -> None:
    state = State(share)
    fresh = (state.steps == 0).repeat_interleave(state.layout[:, 3].repeat_interleave(state.layout[:, 2]))
    state.m[fresh & state.active] = float("nan")  # what a row's buffer holds before its first step must not matter
    moved = {"data": state.data.clone(), "m": state.m.clone()}
    steps = state.steps.clone()
    masked_sgd_(
        moved["data"], state.grad, moved["m"] if momentum else None, steps, state.mask, state.layout,
        lr=0.1, momentum=momentum, dampening=dampening, weight_decay=decay, nesterov=nesterov,
    )  # fmt: skip
    truth = {"data": state.data.double(), "m": state.m.double()}
    tensors = (truth["data"], state.grad.double(), truth["m"])
    reference.masked_sgd_(
        *tensors, state.steps.clone(), state.mask, state.layout, 0.1, momentum, dampening, decay, nesterov
    )
    if momentum:
        state.check(moved, truth, steps)
    else:
        state.check({"data": moved["data"]}, truth, steps)
        assert torch.equal(moved["m"].isnan(), state.m.isnan())


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.99999, 0.9999999)])
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_a_step_of_adamw_is_within_ulps_of_the_truth_at_every_step_count(
    start: float, betas: tuple[float, float]
) -> None:
    counts = [0, 1, 2, 9, 164, 17_000, 65_534, 65_535, 65_536, 1_000_000, 2**31 - 2]
    length = 100
    layout = row_layout([Entry("p", (len(counts), length), 0, 0)])
    steps, mask = torch.tensor(counts, dtype=torch.int32), torch.ones(len(counts), dtype=torch.bool)
    # A moment of the gradient's sign, so that nothing cancels; from zero every ulp of the step itself is seen.
    tensors = [torch.full((len(counts) * length,), start), *(torch.rand(len(counts) * length) + 0.1 for _ in range(3))]
    truth = [t.double() for t in tensors]
    reference.masked_adamw_(*truth, steps.clone(), mask, layout, 3e-3, *betas, 1e-8, 0.01)
    moved = [t.to(DEVICE) for t in tensors]
    others = (t.to(DEVICE) for t in (steps.clone(), mask, layout))
    masked_adamw_(*moved, *others, lr=3e-3, betas=betas, weight_decay=0.01)
    # The step from zero is a chain of seven float32 roundings; torch's own is as far from the truth.
    for name, wanted, actual, most in zip(
        ("p", "grad", "m", "v"), truth, moved, (2 if start else 4, 0, 2, 2), strict=True
    ):
        ulps = (actual.cpu().double() - wanted).abs() / (torch.finfo(FP32).eps * wanted.abs())
        assert ulps.max() <= most, f"{name}: {ulps.view(len(counts), length).amax(1)} ulp"


def test_adamw_with_all_rows_active_follows_torch_optim() -> None:
    state = State(1.0)
    state.mask[:] = True
    state.steps.zero_()
    parameter = torch.nn.Parameter(state.data.clone())
    optimizer = torch.optim.AdamW([parameter], lr=1e-2, weight_decay=0.1, foreach=False)
    m, v = torch.zeros_like(state.data), torch.zeros_like(state.data)
    for _ in range(3):
        parameter.grad = torch.randn(state.data.shape).to(DEVICE)
        optimizer.step()
        masked_adamw_(
            state.data, parameter.grad, m, v, state.steps, state.mask, state.layout, lr=1e-2, weight_decay=0.1
        )
    assert_near(state.data.cpu(), parameter.detach().double().cpu(), "update")
    assert (state.steps == 3).all()


@pytest.mark.parametrize("step", ["adamw", "momentum", "sgd"])
@pytest.mark.parametrize("line_numel", [1024, 100])
def test_scales_move_active_rows_as_in_the_reference(step: str, line_numel: int) -> None:
    state = State(0.6, line_numel)
    lines = len(state.layout)
    lr_scale = torch.tensor([0.0, 1.0, 16.0, 0.3], dtype=torch.float64).repeat(lines)[:lines].to(DEVICE)
    grad_scale = torch.tensor(0.37).to(DEVICE)
    state.steps.clamp_(min=1)
    moved = {name: getattr(state, name).clone() for name in ("data", "m", "v")}
    truth = {name: getattr(state, name).double() for name in ("data", "m", "v")}
    steps, rest = state.steps.clone(), (state.mask, state.layout)
    if step == "adamw":
        tensors = (moved["data"], state.grad, moved["m"], moved["v"], steps, *rest)
        masked_adamw_(*tensors, lr=3e-3, weight_decay=0.1, grad_scale=grad_scale, lr_scale=lr_scale)
        wanted = (truth["data"], state.grad.double(), truth["m"], truth["v"], state.steps.clone(), *rest)
        reference.masked_adamw_(*wanted, 3e-3, 0.9, 0.999, 1e-8, 0.1, grad_scale.double(), lr_scale)
    else:
        momentum = 0.9 if step == "momentum" else 0.0
        tensors = (moved["data"], state.grad, moved["m"], steps, *rest)
        hyper = {"lr": 0.1, "momentum": momentum, "weight_decay": 0.1}
        masked_sgd_(*tensors, **hyper, grad_scale=grad_scale, lr_scale=lr_scale)  # type: ignore[arg-type]
        wanted = (truth["data"], state.grad.double(), truth["m"], state.steps.clone(), *rest)
        reference.masked_sgd_(*wanted, 0.1, momentum, 0.0, 0.1, False, grad_scale.double(), lr_scale)
    state.check(moved, truth, steps)


@pytest.mark.parametrize("step", ["adamw", "momentum"])
def test_scales_of_one_and_gradients_scaled_before_give_the_same_bits(step: str) -> None:
    state = State(0.5)
    ones = torch.ones(len(state.layout), dtype=torch.float64, device=DEVICE)
    factor = torch.tensor(0.37).to(DEVICE)

    def after(grad: Tensor, grad_scale: Tensor | None, lr_scale: Tensor | None) -> list[Tensor]:
        data, m, v, steps = (t.clone() for t in (state.data, state.m, state.v, state.steps))
        scales = {"grad_scale": grad_scale, "lr_scale": lr_scale}
        if step == "adamw":
            masked_adamw_(data, grad, m, v, steps, state.mask, state.layout, lr=3e-3, **scales)
        else:
            masked_sgd_(data, grad, m, steps, state.mask, state.layout, lr=0.1, momentum=0.9, **scales)
        return [data, m, v, steps]

    plain = after(state.grad, None, None)
    for one, two in zip(plain, after(state.grad, factor.new_ones(()), ones), strict=True):
        assert torch.equal(one, two)
    for one, two in zip(after(state.grad * factor, None, None), after(state.grad, factor, None), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("line_numel", [1024, 10])
def test_the_norm_is_that_of_the_active_rows_and_has_the_same_bits_again(share: float, line_numel: int) -> None:
    state = State(share, line_numel)
    norm = masked_grad_norm(state.grad, state.mask, state.layout)
    assert norm.shape == ()
    assert norm.dtype == FP32
    truth = float(state.grad[state.active].double().square().sum().sqrt())
    assert float(norm) == pytest.approx(truth, rel=1e-7, abs=0.0)
    assert torch.equal(norm, masked_grad_norm(state.grad, state.mask, state.layout))


def test_more_lines_than_are_summed_at_a_time_are_all_in_the_norm() -> None:
    layout = row_layout([Entry("p", (UPDATE_BLOCK + 9, 1), 0, 0)], DEVICE, line_numel=1)
    grad = torch.ones(len(layout), device=DEVICE)
    grad[-1] = 100.0
    assert float(masked_grad_norm(grad, grad > 0, layout)) == pytest.approx((UPDATE_BLOCK + 8 + 100.0**2) ** 0.5)


def test_the_norm_of_a_buffer_without_values_is_zero() -> None:
    empty = torch.zeros(0, device=DEVICE)
    assert float(masked_grad_norm(empty, empty.bool(), row_layout([], DEVICE))) == 0.0
