"""The C++ bodies as poorer processors run them: every instruction set up to this machine's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fibecfed_kernels import (
    _C,
    Entry,
    fisher_diag,
    lora_fisher_diag,
    masked_adamw_,
    masked_grad_norm,
    masked_sgd_,
    row_layout,
    use_backend,
)

from .oracle import DTYPES, assert_near, fisher_inputs, fisher_truth
from .update_tools import STEPS, State, gradients, on_the_edge

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("baseline", "avx2", "avx512", "avx512bf16")
HERE = NAMES[: NAMES.index(_C.instruction_set()) + 1]
SHAPES = [(7, 63, 384, 8), (3, 1, 31, 4), (2, 257, 1000, 1), (19, 65, 70, 12), (2, 33, 200, 64), (1, 9, 1, 16)]


@pytest.fixture(params=HERE)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    assert _C.limit_instruction_set(request.param) == request.param
    yield request.param
    _C.limit_instruction_set(NAMES[-1])


def test_the_limit_is_taken_back_and_an_unknown_one_refused() -> None:
    assert _C.limit_instruction_set("baseline") == _C.instruction_set() == "baseline"
    assert _C.limit_instruction_set(NAMES[-1]) == HERE[-1]
    for unknown in ("mmx", None, "avx2\0"):
        with pytest.raises(ValueError, match=r"name: unknown, wanted one of baseline"):
            _C.limit_instruction_set(unknown)
    assert _C.instruction_set() == HERE[-1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("samples", "tokens", "d_in", "d_out"), SHAPES)
def test_fisher(instruction_set: str, samples: int, tokens: int, d_in: int, d_out: int, dtype: torch.dtype) -> None:
    for x, grad_y in (
        fisher_inputs(samples, tokens, d_in, d_out, dtype),
        fisher_inputs(samples, tokens, d_out, d_in, dtype),
    ):
        result = fisher_diag(x, grad_y, weight_grad=True)
        for found, truth in zip(result, fisher_truth(x, grad_y), strict=True):
            assert found is not None
            assert_near(found, truth, "fisher")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fisher_of_every_number_of_rows_that_a_tile_may_leave(instruction_set: str, dtype: torch.dtype) -> None:
    for rank in range(1, 20):
        x, grad_y = fisher_inputs(3, 5, 41, rank, dtype)
        for found, truth in zip(fisher_diag(x, grad_y, weight_grad=True), fisher_truth(x, grad_y), strict=True):
            assert found is not None
            assert_near(found, truth, "fisher")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 4, 5, 8, 15, 17, 31, 33, 100])
def test_the_score_of_an_infinite_gradient_is_infinite(instruction_set: str, width: int, dtype: torch.dtype) -> None:
    """Also where a register is filled up with zeros: infinity times zero is NaN."""
    x = torch.ones(2, 1, width, dtype=dtype)
    grad_y = torch.tensor([[[torch.inf, 1.0]], [[1.0, 2.0]]], dtype=dtype)
    for result in (fisher_diag(x, grad_y), fisher_diag(grad_y, x)):
        assert result.scores.tolist() == [torch.inf, 5.0 * width]


def test_infinities_of_float16_stay_what_they_are(instruction_set: str) -> None:
    x, grad_y = torch.ones(4, 1, 41, dtype=torch.float16), torch.ones(4, 1, 3, dtype=torch.float16)
    for place in (0, 40):  # whole vectors, and what is left of a row
        for tensor, at in ((x, place), (grad_y, place % 3)):
            for value in (torch.inf, -torch.inf, torch.nan):
                changed = tensor.clone()
                changed[2, 0, at] = value
                found = fisher_diag(changed if tensor is x else x, changed if tensor is grad_y else grad_y)
                assert found.scores.isfinite().tolist() == [True, True, False, True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_score_has_the_same_bits_alone_and_in_a_packed_batch(instruction_set: str, dtype: torch.dtype) -> None:
    lengths = [5, 0, 63, 1, 17]
    offsets = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    (x, grad_y), (h, grad_h) = (fisher_inputs(1, sum(lengths), *d, dtype) for d in ((384, 384), (8, 8)))
    tensors = [t[0] for t in (x, h, grad_h, grad_y)]
    together = lora_fisher_diag(*tensors, offsets)
    for n, (start, length) in enumerate(zip(offsets.tolist(), lengths, strict=False)):
        alone = lora_fisher_diag(*(t[None, start : start + length] for t in tensors))
        assert torch.equal(alone.a.scores[0], together.a.scores[n])
        assert torch.equal(alone.b.scores[0], together.b.scores[n])


@pytest.mark.parametrize("kind", ["adamw", "sgd", "nesterov"])
def test_updates(instruction_set: str, kind: str) -> None:
    entries = [Entry("a", (8, 101), 0, 0), Entry("b", (101, 8), 808, 0), Entry("head", (3,), 1616, None)]
    layout, rows, numel = row_layout(entries), 112, 1619
    generator = torch.Generator().manual_seed(0)
    data, grad = (torch.randn(numel, generator=generator) for _ in range(2))
    mask = torch.rand(rows, generator=generator) < 0.6

    def after(body: str) -> torch.Tensor:
        values, first, second = data.clone(), torch.zeros(numel), torch.zeros(numel)
        steps = torch.zeros(rows, dtype=torch.int32)
        with use_backend(body):  # type: ignore[arg-type]
            for _ in range(3):
                if kind == "adamw":
                    masked_adamw_(values, grad, first, second, steps, mask, layout, lr=1e-2, weight_decay=0.1)
                else:
                    hyper = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1, "nesterov": kind == "nesterov"}
                    masked_sgd_(values, grad, first, steps, mask, layout, **hyper)  # type: ignore[arg-type]
        return values

    found, wanted = after("cpp"), after("reference")
    assert_near(found, wanted.double(), "update")
    still = ~mask.repeat_interleave(layout[:, 3].repeat_interleave(layout[:, 2]))
    assert torch.equal(found[still], data[still])


@pytest.mark.parametrize("name", STEPS)
def test_scaled_gradients_are_gradients_multiplied_before(instruction_set: str, name: str) -> None:
    state, other, factor = State().used(), State().used(), torch.tensor(0.37)
    (grad,) = gradients(state.numel, 1)
    STEPS[name](state, grad, grad_scale=factor)
    STEPS[name](other, grad * factor)
    for buffer in ("data", "first", "second", "steps"):
        assert torch.equal(getattr(state, buffer), getattr(other, buffer))


def test_the_norm_has_the_same_bits_everywhere(instruction_set: str) -> None:
    state = State(((1, 20_000),))  # one line: every sum that a register holds tells in the total
    for seed in range(20):
        grad = on_the_edge(state.numel, seed)
        found = masked_grad_norm(grad, state.mask, state.layout)
        _C.limit_instruction_set("baseline")
        assert torch.equal(found, masked_grad_norm(grad, state.mask, state.layout))
        _C.limit_instruction_set(instruction_set)
