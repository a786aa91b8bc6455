"""Masked steps: an active row makes torch.optim's step, an inactive row keeps every bit of its state."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fibecfed_kernels import use_backend

from .bodies import BODIES, bodies, needs_cpp
from .oracle import assert_near
from .update_tools import STEPS, State, flat, give_gradients, gradients

pytestmark = pytest.mark.usefixtures("one_thread")


@bodies
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.3, 0.9), (0.0, 0.0)], ids=str)
def test_with_all_rows_active_it_is_adamw_under_a_scheduler(body, betas):
    state = State()
    parameters = state.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=betas, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=51, cycle_momentum=False)
    for grad in gradients(state.numel, 50):
        give_gradients(parameters, grad)
        (group,) = optimizer.param_groups
        with use_backend(body):
            state.adamw(grad, **{key: group[key] for key in ("lr", "betas", "eps", "weight_decay")})
        optimizer.step()
        scheduler.step()
    wanted = {
        "data": flat(parameters),
        "first": flat(optimizer.state[p]["exp_avg"] for p in parameters),
        "second": flat(optimizer.state[p]["exp_avg_sq"] for p in parameters),
    }
    assert (state.steps == 50).all()
    for name, tensor in wanted.items():
        if body == "reference":
            assert torch.equal(getattr(state, name), tensor), name
        else:
            assert_near(getattr(state, name), tensor.double(), "update")


def test_one_cpp_step_is_within_two_ulp_of_adamw():
    state = State().used()
    state.steps.fill_(9)
    parameters = state.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    (grad,) = gradients(state.numel, 1)
    give_gradients(parameters, grad)
    for p, e in zip(parameters, state.entries, strict=True):
        m, v = (t[e.offset : e.offset + e.numel].view(e.shape).clone() for t in (state.first, state.second))
        optimizer.state[p] = {"step": torch.tensor(9.0), "exp_avg": m, "exp_avg_sq": v}
    before = state.data.clone()
    with use_backend("cpp"):
        state.adamw(grad, lr=1e-2)
    optimizer.step()
    wanted = flat(parameters)
    # of the larger of the two numbers whose difference is the result: the difference itself may cancel to nothing
    largest = torch.stack([before, wanted, before - wanted]).abs().amax(0)
    ulp = torch.nextafter(largest, torch.tensor(torch.inf)) - largest
    assert ((state.data - wanted).abs() <= 2 * ulp).all()
    for name, mine in (("exp_avg", state.first), ("exp_avg_sq", state.second)):
        theirs = flat(optimizer.state[p][name] for p in parameters)
        assert torch.allclose(mine, theirs, rtol=2.4e-7, atol=1e-12), name


SGD = (
    {"lr": 0.1},
    {"lr": 0.1, "weight_decay": 0.02},
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.02},
    {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.02},
)


@bodies
@pytest.mark.parametrize("hyper", SGD, ids=str)
def test_with_all_rows_active_it_is_sgd(body, hyper):
    state = State()
    parameters = state.parameters()
    optimizer = torch.optim.SGD(parameters, **hyper)
    for grad in gradients(state.numel, 20):
        give_gradients(parameters, grad)
        optimizer.step()
        with use_backend(body):
            state.sgd(grad, **hyper)
    if body == "reference":
        assert torch.equal(state.data, flat(parameters))
    else:
        assert_near(state.data, flat(parameters).double(), "update")


steps = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)


@bodies
@steps
def test_a_row_frozen_and_woken_is_the_row_given_only_its_active_steps(body, step):
    shapes = ((8, 31), (24, 8), (5,), ())
    state = State(shapes)
    generator = torch.Generator().manual_seed(3)
    grads = gradients(state.numel, 8)
    masks = [torch.rand(state.rows, generator=generator) < 0.5 for _ in grads]
    masks[3][:] = True  # awake rows of several step counts together
    start = state.data.clone().split(state.lengths.tolist())
    with use_backend(body):
        for grad, state.mask in zip(grads, masks, strict=True):
            step(state, grad)
        for row, values in enumerate(start):
            alone = State(((1, len(values)),))
            alone.data = values.clone()
            for grad, mask in zip(grads, masks, strict=True):
                if mask[row]:
                    step(alone, grad.split(state.lengths.tolist())[row].clone())
            assert alone.steps == state.steps[row]
            for name in ("data", "first", "second"):
                mine = getattr(state, name).split(state.lengths.tolist())[row]
                assert torch.equal(mine, getattr(alone, name)), f"{name} of row {row}"


@bodies
@steps
def test_frozen_rows_keep_every_bit_even_beside_nan(body, step):
    state = State().used()
    before = state.copy()
    state.mask = torch.rand(state.rows) < 0.4
    frozen = state.per_value(~state.mask)
    (grad,) = gradients(state.numel, 1)
    grad[frozen] = torch.nan
    with use_backend(body):
        step(state, grad)
    for name in ("data", "first", "second"):
        assert torch.equal(getattr(state, name)[frozen], getattr(before, name)[frozen]), name
        assert torch.isfinite(getattr(state, name)).all(), name
    assert torch.equal(state.steps, before.steps + state.mask)
    assert (state.data != before.data)[~frozen].float().mean() > 0.99


@bodies
def test_masking_the_gradient_would_not_freeze(body):
    """AdamW on ``grad * mask`` goes on with moments and decay; the op must not."""
    state = State().used()
    state.steps.fill_(10)
    before = state.copy()
    state.mask[::2] = False
    frozen = state.per_value(~state.mask)
    masked = nn.Parameter(state.data.clone())
    optimizer = torch.optim.AdamW([masked], lr=1e-2)
    optimizer.state[masked] = {
        "step": torch.tensor(10.0), "exp_avg": state.first.clone(), "exp_avg_sq": state.second.clone()
    }  # fmt: skip
    for grad in gradients(state.numel, 3):
        masked.grad = grad.mul(state.per_value(state.mask))
        optimizer.step()
        with use_backend(body):
            state.adamw(grad, lr=1e-2)
    assert (masked.detach() - before.data)[frozen].abs().max() > 2e-2
    assert torch.equal(state.data[frozen], before.data[frozen])


@bodies
@steps
def test_with_no_active_row_nothing_changes(body, step):
    state = State().used()
    state.mask[:] = False
    before = state.copy()
    with use_backend(body):
        step(state, torch.full((state.numel,), torch.nan))
    for name in ("data", "first", "second", "steps"):
        assert torch.equal(getattr(state, name), getattr(before, name)), name


@bodies
@steps
def test_a_buffer_without_values_is_no_error(body, step):
    with use_backend(body):
        for shapes in ((), ((0, 4), (3, 0))):
            state = State(shapes)
            step(state, torch.zeros(0))
            assert (state.steps == 1).all()


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("share", [0.1, 0.6, 1.0])
def test_cpp_agrees_with_the_reference_where_rows_have_taken_many_different_steps(name, share):
    states = {}
    for body in BODIES:
        state = states[body] = State(seed=4).used()
        state.mask = torch.rand(state.rows, generator=torch.Generator().manual_seed(5)) < share
        with use_backend(body):
            STEPS[name](state, gradients(state.numel, 1)[0])
    for buffer in ("data", "first", "second", "steps"):
        assert_near(getattr(states["cpp"], buffer), getattr(states["reference"], buffer).double(), "update")


@pytest.mark.parametrize("name", STEPS)
@given(
    shapes=st.lists(
        st.lists(st.sampled_from((1, 2, 3, 7, 8, 16, 31, 65)), max_size=2).map(tuple), min_size=1, max_size=5
    ).map(tuple),
    line_numel=st.sampled_from((1, 7, 64, 1024)),
    share=st.sampled_from((0.1, 0.5, 0.95, 1.0)),
    seed=st.integers(0, 99),
)
def test_cpp_agrees_with_the_reference_on_any_layout(name, shapes, line_numel, share, seed):
    state = State(shapes, seed, line_numel).used(seed)
    state.mask = torch.rand(state.rows, generator=torch.Generator().manual_seed(seed)) < share
    other = state.copy()
    (grad,) = gradients(state.numel, 1, seed)
    with use_backend("reference"):
        STEPS[name](state, grad)
    with use_backend("cpp"):
        STEPS[name](other, grad)
    assert torch.equal(state.steps, other.steps)
    for buffer in ("data", "first", "second"):
        assert_near(getattr(other, buffer), getattr(state, buffer).double(), "update")


@needs_cpp
@pytest.mark.parametrize("active", [0.03, 0.5, 1.0])
@pytest.mark.parametrize("counts", ["equal", "each its own"])
@pytest.mark.parametrize("step", STEPS)
def test_long_stretches_of_short_rows_step_as_in_the_reference(step: str, counts: str, active: float) -> None:
    """More rows than are stepped in one call, of more than one length."""
    state = State(((1300, 8), (1300, 8), (700, 3))).used()
    if counts == "equal":
        state.steps.fill_(3)
    state.mask = torch.rand(state.rows, generator=torch.Generator().manual_seed(5)) < active
    (grad,) = gradients(state.numel, 1)
    frozen = ~state.mask.repeat_interleave(state.lengths)
    grad[frozen] = float("nan")
    before, other = state.copy(), state.copy()
    STEPS[step](state, grad)
    with use_backend("reference"):
        STEPS[step](other, grad)
    for name in ("data", "first", "second"):
        found, wanted = getattr(state, name), getattr(other, name)
        assert_near(found, wanted.double(), "update")
        assert torch.equal(found[frozen], getattr(before, name)[frozen])
    assert torch.equal(state.steps, other.steps)
    assert torch.equal(state.steps, before.steps + state.mask)
