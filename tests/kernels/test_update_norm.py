"""The norm of the active rows' gradients: its truth, its bits, what it does not read, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fibecfed_kernels import masked_adamw_, masked_grad_norm, use_backend

from .bodies import BODIES, bodies
from .update_tools import SHAPES, State, gradients, on_the_edge

pytestmark = pytest.mark.usefixtures("one_thread")
EPS = torch.finfo(torch.float32).eps


def masked(share: float, shapes: tuple[tuple[int, ...], ...] = SHAPES, line_numel: int = 1024, seed: int = 5) -> State:
    state = State(shapes, line_numel=line_numel)
    state.mask = torch.rand(state.rows, generator=torch.Generator().manual_seed(seed)) < share
    return state


def truth(state: State, grad: Tensor) -> float:
    """√ of the exact sum of the active values' squares."""
    return math.sqrt(math.fsum(g * g for g in grad[state.per_value(state.mask)].tolist()))


def norm_of(state: State, grad: Tensor) -> Tensor:
    norm = masked_grad_norm(grad, state.mask, state.layout)
    assert norm.shape == ()
    assert norm.dtype == torch.float32
    assert norm.device == grad.device
    return norm


@pytest.mark.usefixtures("poisoned")
@bodies
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("line_numel", [7, 64, 1024, 100_000])
def test_it_is_the_exact_norm_rounded_and_inactive_rows_are_not_read(body: str, share: float, line_numel: int) -> None:
    state = masked(share, line_numel=line_numel)
    for grad in gradients(state.numel, 3):
        grad[state.per_value(~state.mask)] = torch.nan
        with use_backend(body):
            norm = float(norm_of(state, grad))
        assert abs(norm - truth(state, grad)) <= EPS / 2 * 1.0001 * truth(state, grad)


@bodies
def test_it_is_the_norm_that_torch_clips_by(body: str) -> None:
    state = masked(0.5)
    (grad,) = gradients(state.numel, 1)
    rows = [nn.Parameter(torch.zeros(len(g))) for g in grad.split(state.lengths.tolist())]
    for row, g in zip(rows, grad.split(state.lengths.tolist()), strict=True):
        row.grad = g.clone()
    active = [row for row, is_active in zip(rows, state.mask.tolist(), strict=True) if is_active]
    with use_backend(body):
        found = norm_of(state, grad)
    torch.testing.assert_close(found, nn.utils.clip_grad_norm_(active, 1.0), rtol=1e-6, atol=0.0)


@bodies
def test_squares_that_float32_cannot_hold_are_summed(body: str) -> None:
    state = masked(1.0)
    for size in (1e-30, 1e30):
        grad = torch.full((state.numel,), size)
        with use_backend(body):
            assert float(norm_of(state, grad)) == pytest.approx(size * state.numel**0.5, rel=1e-6)


@bodies
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_from_any_place_of_an_active_row(body: str, value: float) -> None:
    state = masked(0.5)
    active = state.per_value(state.mask).nonzero().squeeze(1)
    for at in (*active[:20].tolist(), *active[-20:].tolist()):
        (grad,) = gradients(state.numel, 1)
        grad[at] = value
        with use_backend(body):
            assert not norm_of(state, grad).isfinite(), at


@bodies
def test_bits_do_not_depend_on_the_number_of_threads(body: str) -> None:
    state = State(((4500, 64), (64, 9)))  # more than a megabyte: below it one thread does all
    for seed in range(8):
        grad, found = on_the_edge(state.numel, seed), set()
        for threads in (1, 2, 3, 2, 1):
            torch.set_num_threads(threads)  # the fixture one_thread puts it back
            with use_backend(body):
                found.add(float(norm_of(state, grad)))
        assert len(found) == 1, seed


@bodies
def test_a_buffer_without_values_has_norm_zero(body: str) -> None:
    with use_backend(body):
        for shapes in ((), ((0, 4), (3, 0))):
            state = State(shapes)
            assert float(norm_of(state, torch.zeros(0))) == 0.0


@given(
    shapes=st.lists(
        st.lists(st.sampled_from((1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 65)), max_size=2).map(tuple), min_size=1, max_size=5
    ).map(tuple),
    line_numel=st.sampled_from((1, 7, 64, 1024)),
    share=st.sampled_from((0.1, 0.5, 0.95, 1.0)),
    seed=st.integers(0, 99),
)
def test_bodies_agree_on_any_layout(
    shapes: tuple[tuple[int, ...], ...], line_numel: int, share: float, seed: int
) -> None:
    state = masked(share, shapes, line_numel, seed)
    (grad,) = gradients(state.numel, 1, seed)
    for body in BODIES:
        with use_backend(body):  # type: ignore[arg-type]
            assert float(norm_of(state, grad)) == pytest.approx(truth(state, grad), rel=EPS)


@pytest.mark.parametrize(
    ("name", "wrong", "error", "words"),
    [
        ("grad", lambda t: t.double(), TypeError, r"grad: torch.float64 .* wanted torch.float32"),
        ("grad", lambda t: t.view(100, 8), ValueError, r"grad: .*\(100, 8\).* wanted torch.float32 \(800,\)"),
        ("grad", lambda t: t[:-8], ValueError, r"layout: line 0 has 100 rows of 8 values, .* 792 values \(grad\)"),
        ("grad", lambda t: t.repeat_interleave(2)[::2], ValueError, r"grad: strides \(2,\)"),
        ("grad", lambda t: None, TypeError, "grad: NoneType, wanted a torch.Tensor"),
        ("mask", lambda t: t.int(), TypeError, "mask: torch.int32"),
        ("mask", lambda t: t.to("meta"), ValueError, "mask: .* on meta"),
        ("mask", lambda t: t[:-1], ValueError, r"layout: line 0 has 100 rows of 8 values, .* 99 rows \(mask\)"),
        ("layout", lambda t: t[:, :3], ValueError, r"layout: .*, 3\)"),
        ("layout", lambda t: t.tolist(), TypeError, "layout: list"),
    ],
)
def test_a_wrong_tensor_is_refused_by_name(name: str, wrong, error: type[Exception], words: str) -> None:  # type: ignore[no-untyped-def]
    state = State(SHAPES[1:2])
    given = {"grad": torch.ones(state.numel), "mask": state.mask, "layout": state.layout}
    given[name] = wrong(given[name])
    with pytest.raises(error, match=words):
        masked_grad_norm(**given)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layout": torch.tensor([[0, 0, 100, 8], [8, 0, 100, 8]])}, "layout: its lines do not cover"),
        ({"mask": torch.ones(99, dtype=torch.bool)}, "layout: its lines do not cover"),
        ({"grad": torch.ones(800).double()}, "grad: wanted contiguous float32"),
    ],
)
def test_the_registered_op_checks_what_would_make_it_read_elsewhere(change: dict[str, Tensor], words: str) -> None:
    state = State(SHAPES[1:2])
    given = {"grad": torch.ones(state.numel), "mask": state.mask, "layout": state.layout} | change
    with pytest.raises(RuntimeError, match=words):
        torch.ops.fibecfed.masked_grad_norm(*given.values())


def test_opcheck() -> None:
    state = masked(0.5)
    args = (gradients(state.numel, 1)[0], state.mask, state.layout)
    torch.library.opcheck(torch.ops.fibecfed.masked_grad_norm.default, args)


def test_norm_and_clipped_step_compile_into_one_graph() -> None:
    state, other = masked(0.5), masked(0.5)
    (grad,) = gradients(state.numel, 1)

    def step(state: State, grad: Tensor, mask: Tensor, layout: Tensor) -> Tensor:
        norm = masked_grad_norm(grad, mask, layout)
        scale = (1.0 / (norm + 1e-6)).clamp(max=1.0)
        tensors = (state.data, grad, state.first, state.second, state.steps, mask, layout)
        masked_adamw_(*tensors, lr=1e-2, grad_scale=scale)
        return norm

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    found = compiled(state, grad, state.mask, state.layout)
    assert torch.equal(found, step(other, grad, other.mask, other.layout))
    assert torch.equal(state.data, other.data)
    assert torch.equal(state.steps, other.steps)


@bodies
def test_a_norm_is_no_function_to_differentiate(body: str) -> None:
    state = State()
    grad = torch.randn(state.numel, requires_grad=True)
    with use_backend(body):
        norm = masked_grad_norm(grad, state.mask, state.layout)
    assert not norm.requires_grad
    assert norm.item() == pytest.approx(grad.norm().item(), rel=1e-5)
