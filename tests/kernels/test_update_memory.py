"""Where the update ops may write: lines that cover the buffer one after another, and tensors of their own memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fibecfed_kernels import Entry, masked_adamw_, masked_grad_norm, masked_sgd_, row_layout, use_backend

from .bodies import bodies, needs_cpp
from .update_tools import State

pytestmark = pytest.mark.usefixtures("one_thread")
LINES = ((0, 0, 2, 8), (16, 2, 2, 8), (32, 4, 3, 5), (47, 7, 1, 1))  # 48 values in 8 rows


def arguments() -> dict[str, Tensor]:
    data, grad, exp_avg, exp_avg_sq = (torch.full((48,), value) for value in (1.0, 0.5, 0.25, 0.125))
    return {
        "data": data,
        "grad": grad,
        "exp_avg": exp_avg,
        "exp_avg_sq": exp_avg_sq,
        "steps": torch.ones(8, dtype=torch.int32),
        "mask": torch.ones(8, dtype=torch.bool),
        "layout": torch.tensor(LINES),
    }


def sgd_of(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"momentum_buffer" if k == "exp_avg" else k: v for k, v in given.items() if k != "exp_avg_sq"}


def with_line(line: int, column: int, value: int) -> Tensor:
    layout = torch.tensor(LINES)
    layout[line, column] = value
    return layout


WRONG_LAYOUTS = [
    (with_line(0, 0, 8), "layout: line 0 starts at value 8 and row 0, wanted 0 and 0: lines must follow one another"),
    (with_line(1, 0, 8), "layout: line 1 starts at value 8 and row 2, wanted 16 and 2"),
    (with_line(1, 1, 3), "layout: line 1 starts at value 16 and row 3, wanted 16 and 2"),
    (with_line(1, 2, 1), "layout: line 2 starts at value 32 and row 4, wanted 24 and 3"),
    (with_line(2, 3, 4), "layout: line 3 starts at value 47 and row 7, wanted 44 and 7"),
    (with_line(2, 2, -3), "layout: line 2 has -3 rows of 5 values, wanted a part of 48 values .data. in 8 rows"),
    (with_line(2, 2, 9), "layout: line 2 has 9 rows of 5 values"),
    (with_line(1, 3, -8), "layout: line 1 has 2 rows of -8 values"),
    (with_line(1, 3, 49), "layout: line 1 has 2 rows of 49 values"),
    (with_line(0, 3, 2**62), "layout: line 0 has 2 rows of 4611686018427387904 values"),  # 2 * 2**62 is negative
    (torch.tensor(LINES)[[1, 0, 2, 3]], "layout: line 0 starts at value 16 and row 2, wanted 0 and 0"),
    (torch.tensor(LINES)[:3], "layout: covers 47 values in 7 rows, wanted 48 values .data. in 8 rows .mask."),
    (with_line(3, 3, 0), "layout: covers 47 values in 8 rows, wanted 48 values .data. in 8 rows"),
    (with_line(3, 2, 0), "layout: covers 47 values in 7 rows"),
    (torch.zeros(0, 4, dtype=torch.int64), "layout: covers 0 values in 0 rows, wanted 48"),
]


@bodies
@pytest.mark.parametrize(("layout", "words"), WRONG_LAYOUTS)
def test_a_layout_that_does_not_cover_the_buffer_in_order_is_refused(body: str, layout: Tensor, words: str) -> None:
    given = {**arguments(), "layout": layout}
    before = {name: tensor.clone() for name, tensor in given.items()}
    with use_backend(body):
        for _ in range(2):  # a layout that was refused is not taken for one that was checked
            with pytest.raises(ValueError, match=words):
                masked_adamw_(**given, lr=0.1)
            with pytest.raises(ValueError, match=words):
                masked_sgd_(**sgd_of(given), lr=0.1, momentum=0.9)
            with pytest.raises(ValueError, match=words.replace("data", "grad")):
                masked_grad_norm(given["grad"], given["mask"], given["layout"])
    assert all(torch.equal(given[name], before[name]) for name in given)


def test_a_layout_is_checked_again_when_it_was_changed_or_serves_other_buffers() -> None:
    given = arguments()
    masked_adamw_(**given, lr=0.1)
    given["layout"][1, 0] = 8
    with pytest.raises(ValueError, match="layout: line 1 starts at value 8"):
        masked_adamw_(**given, lr=0.1)
    given["layout"][1, 0] = 16
    masked_adamw_(**given, lr=0.1)
    with pytest.raises(ValueError, match="layout: covers 48 values in 8 rows, wanted 47 values"):
        masked_adamw_(**{k: v[:47].clone() if v.numel() == 48 else v for k, v in given.items()}, lr=0.1)
    assert (given["steps"] == 3).all()


def test_a_layout_is_read_once_an_object_where_reading_it_waits_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    given, reads = arguments(), []
    to_cpu = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda self: reads.append(self) or to_cpu(self))
    with use_backend("reference"):
        for _ in range(3):
            masked_adamw_(**given, lr=0.1)
            masked_grad_norm(given["grad"], given["mask"], given["layout"])
    assert len(reads) == 1


@needs_cpp
def test_cpp_looks_at_a_layout_every_time() -> None:
    """So that it sees what NumPy changes, which torch does not count."""
    given = arguments()
    with use_backend("reference"):  # which looks once
        masked_adamw_(**given, lr=0.1)
    given["layout"].numpy()[3, 2] = 2
    with pytest.raises(ValueError, match="layout: covers 49 values in 9 rows, wanted 48"):
        masked_adamw_(**given, lr=0.1)


ALIASES = [
    ("grad", "data", lambda t: t),
    ("exp_avg", "data", lambda t: t),
    ("exp_avg_sq", "exp_avg", lambda t: t.view(48)),
    ("steps", "data", lambda t: t.view(torch.int32)[:8]),
    ("steps", "grad", lambda t: t.view(torch.int32)[8:16]),
    ("steps", "exp_avg_sq", lambda t: t.view(torch.int32)[40:]),
    ("mask", "data", lambda t: t.view(torch.bool)[3:11]),
    ("mask", "steps", lambda t: t.view(torch.bool)[24:]),
    ("grad_scale", "data", lambda t: t[47]),
    ("lr_scale", "exp_avg", lambda t: t.view(torch.float64)[20:]),
]


@bodies
@pytest.mark.parametrize(("name", "other", "view"), ALIASES)
def test_a_changed_tensor_that_shares_memory_is_refused_by_name(body: str, name: str, other: str, view) -> None:  # type: ignore[no-untyped-def]
    given = arguments()
    given[name] = view(given[other])
    before = {key: tensor.clone() for key, tensor in given.items()}
    words = rf"^({name}: shares memory with {other}|{other}: shares memory with {name}), wanted tensors that do not"
    with use_backend(body):
        with pytest.raises(ValueError, match=words):
            masked_adamw_(**given, lr=0.1)
        if "exp_avg_sq" not in (name, other):
            words = words.replace("exp_avg", "momentum_buffer")
            with pytest.raises(ValueError, match=words):
                masked_sgd_(**sgd_of(given), lr=0.1, momentum=0.9)
    assert all(torch.equal(given[key], before[key]) for key in given)


def test_tensors_that_overlap_by_one_value_are_refused_and_neighbours_taken() -> None:
    room = torch.zeros(4 * 48)
    given = {**arguments(), "data": room[:48], "grad": room[48:96], "exp_avg": room[96:144], "exp_avg_sq": room[144:]}
    masked_adamw_(**given, lr=0.1)
    assert (given["steps"] == 2).all()
    given["grad"] = room[47:95]
    with pytest.raises(ValueError, match="grad: shares memory with data"):
        masked_adamw_(**given, lr=0.1)


def test_a_small_tensor_inside_a_large_one_is_seen_past_others_in_between() -> None:
    """Both ``mask`` and ``grad_scale`` lie in ``data``: by address, the second comes after the end of the first."""
    given = arguments()
    layout = given["layout"]
    given["mask"], scale = given["data"].view(torch.bool)[8:16], given["data"][40]
    with pytest.raises(ValueError, match=r"mask: shares memory with data"):
        masked_sgd_(given["data"], given["grad"], None, given["steps"], given["mask"], layout, lr=0.1, grad_scale=scale)
    given["mask"] = torch.ones(8, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"grad_scale: shares memory with data"):
        masked_sgd_(given["data"], given["grad"], None, given["steps"], given["mask"], layout, lr=0.1, grad_scale=scale)


def test_a_changed_tensor_is_seen_inside_a_large_one_past_what_may_lie_there() -> None:
    given = arguments()
    given["steps"] = given["grad"].view(torch.int32)[16:24]
    with pytest.raises(ValueError, match="steps: shares memory with grad"):
        masked_sgd_(**sgd_of(given), lr=0.1, grad_scale=given["grad"][2])


def test_what_is_only_read_may_share_memory() -> None:
    given = arguments()
    masked_sgd_(**sgd_of(given), lr=0.1, grad_scale=given["grad"][0])
    assert (given["data"] != 1.0).all()


def test_empty_tensors_share_nothing() -> None:
    state = State(((3, 0),))
    inside = state.steps.view(torch.float32)[1:1]
    masked_sgd_(inside, inside, None, state.steps, state.mask, state.layout, lr=0.1)
    assert (state.steps == 1).all()


@pytest.mark.parametrize("name", ["data", "grad", "exp_avg", "exp_avg_sq", "steps", "mask", "layout"])
def test_none_is_refused_where_a_tensor_is_wanted(name: str) -> None:
    with pytest.raises(TypeError, match=f"^{name}: NoneType, wanted a torch.Tensor"):
        masked_adamw_(**{**arguments(), name: None}, lr=0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["steps", "mask"])
@pytest.mark.parametrize("size", [3, 11])
def test_of_mask_and_steps_the_one_that_does_not_fit_the_layout_is_named(name: str, size: int) -> None:
    given = arguments()
    given[name] = torch.ones(size, dtype=given[name].dtype)
    with pytest.raises(ValueError, match=rf"^{name}: .* \({size},\) on cpu, wanted .* \(8,\) on cpu"):
        masked_adamw_(**given, lr=0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize("byte", [2, 128, 255])
def test_any_byte_but_0_of_a_mask_is_true(byte: int) -> None:
    """As torch takes flags of uint8 that are viewed as bool."""
    layout = row_layout([Entry("a", (4096, 4), 0, None), Entry("b", (3, 70), 16384, None)])
    flags = (torch.rand(4099) < 0.5).to(torch.uint8)
    found = []
    for mask in (flags.bool(), (flags * byte).view(torch.bool)):
        data, grad = torch.ones(16594), torch.linspace(-1, 1, 16594)
        m, v, steps = torch.zeros_like(data), torch.zeros_like(data), torch.zeros(4099, dtype=torch.int32)
        for _ in range(3):
            masked_adamw_(data, grad, m, v, steps, mask, layout, lr=0.1)
        found.append((data, m, v, steps, masked_grad_norm(grad, mask, layout)))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_a_line_whose_size_overflows_is_refused_by_the_op_itself() -> None:
    """Under torch.compile nothing else looks at the layout."""
    layout, mask = torch.tensor([[0, 0, 4, 2**62]]), torch.tensor([True, False, True, True])
    with pytest.raises(RuntimeError, match="layout: its lines do not cover data and mask"):
        torch.ops.fibecfed.masked_grad_norm(torch.ones(16), mask, layout)


@bodies
def test_what_is_made_in_inference_mode_is_checked_every_time(body: str) -> None:
    state = State()
    with torch.inference_mode():
        lr_scale = torch.ones(len(state.layout), dtype=torch.float64)
    with use_backend(body):
        state.adamw(torch.ones(state.numel), lr=0.1, lr_scale=lr_scale)
    with torch.inference_mode():
        lr_scale[1] = float("nan")
    with use_backend(body), pytest.raises(ValueError, match=r"^lr_scale: nan for line 1"):
        state.adamw(torch.ones(state.numel), lr=0.1, lr_scale=lr_scale)


def test_rows_without_values_count_too() -> None:
    """Nine rows where the layout has eight: no value tells."""
    given = {**arguments(), "steps": torch.ones(9, dtype=torch.int32), "mask": torch.ones(9, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"layout: covers 48 values in 8 rows, wanted 48 values \(data\) in 9 rows"):
        masked_adamw_(**given, lr=0.1)


def test_a_number_beyond_float64_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^eps: too large, wanted what float64 can hold"):
        masked_adamw_(**arguments(), lr=0.1, eps=10**400)


@pytest.mark.parametrize("value", ["0.1", True])
def test_text_and_truth_are_no_numbers(value: object) -> None:
    state = State()
    with pytest.raises(TypeError, match=rf"^lr: {value!r}, wanted a number"):
        state.adamw(torch.ones(state.numel), lr=value)
