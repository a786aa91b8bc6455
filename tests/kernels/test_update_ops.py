"""The update ops as torch sees them: threads, version counters, what is refused, opcheck, torch.compile."""

from __future__ import annotations

import pytest
import torch

from fibecfed_kernels import Entry, masked_adamw_, masked_sgd_, row_layout, use_backend
from fibecfed_kernels.update.arguments import _check_layout

pytestmark = pytest.mark.usefixtures("one_thread")
bodies = pytest.mark.parametrize("body", ["reference", "cpp"])


def arguments(rows: int = 12, length: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    numel = rows * length
    data, grad, exp_avg, exp_avg_sq = torch.randn(4, numel, generator=generator).unbind()
    return {
        "data": data.clone(),
        "grad": grad.clone(),
        "exp_avg": exp_avg.clone(),
        "exp_avg_sq": exp_avg_sq.abs(),
        "steps": torch.randint(0, 20, (rows,), generator=generator, dtype=torch.int32),
        "mask": torch.rand(rows, generator=generator) < 0.6,
        "layout": row_layout([Entry("p", (rows, length), 0, 0)]),
    }


def sgd_arguments() -> dict[str, torch.Tensor]:
    given = arguments()
    del given["exp_avg_sq"]
    return {("momentum_buffer" if key == "exp_avg" else key): value for key, value in given.items()}


@bodies
def test_bits_do_not_depend_on_the_number_of_threads(body):
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)  # the fixture one_thread puts it back
        given = arguments(rows=9000)  # more than a megabyte: below it one thread does all
        with use_backend(body):
            masked_adamw_(**given, lr=1e-2)
        results.append(given)
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in result)


@bodies
def test_changed_tensors_say_so_to_autograd(body):
    given = arguments()
    with use_backend(body):
        before = {name: tensor._version for name, tensor in given.items()}
        masked_adamw_(**given, lr=1e-2)
        changed = {name for name, tensor in given.items() if tensor._version > before[name]}
        assert changed == {"data", "exp_avg", "exp_avg_sq", "steps"}
        given = sgd_arguments()
        before = {name: tensor._version for name, tensor in given.items()}
        masked_sgd_(**given, lr=1e-2, momentum=0.9)
        changed = {name for name, tensor in given.items() if tensor._version > before[name]}
        assert changed == {"data", "momentum_buffer", "steps"}


@bodies
def test_a_leaf_that_requires_grad_is_stepped(body):
    given = arguments()
    given["data"] = torch.nn.Parameter(given["data"])
    before = given["data"].detach().clone()
    with use_backend(body):
        masked_adamw_(**given, lr=1e-2)
    assert not torch.equal(given["data"].detach(), before)
    assert given["data"].is_leaf


def test_the_step_is_refused_where_backward_still_needs_the_old_values():
    given = arguments()
    given["data"] = torch.nn.Parameter(given["data"])
    loss = given["data"].square().sum()
    masked_adamw_(**given, lr=1e-2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


WRONG_TENSORS = [
    ("data", lambda t: t.double(), TypeError, r"data: torch.float64 \(96,\)"),
    ("data", lambda t: t.view(12, 8), ValueError, r"data: .*\(12, 8\).* wanted torch.float32 \(96,\)"),
    ("grad", lambda t: t.half(), TypeError, r"grad: torch.float16"),
    ("grad", lambda t: t[1:], ValueError, r"grad: .*\(95,\)"),
    ("grad", lambda t: t.to("meta"), ValueError, r"grad: .* on meta"),
    ("grad", lambda t: t.repeat_interleave(2)[::2], ValueError, r"grad: strides \(2,\), wanted a contiguous tensor"),
    ("exp_avg", lambda t: t[:-1], ValueError, r"exp_avg: .*\(95,\)"),
    ("exp_avg_sq", lambda t: t.bfloat16(), TypeError, r"exp_avg_sq: torch.bfloat16"),
    ("steps", lambda t: t.long(), TypeError, r"steps: torch.int64 .* wanted torch.int32 \(12,\)"),
    ("steps", lambda t: t[1:], ValueError, r"steps: .*\(11,\)"),
    ("mask", lambda t: t.int(), TypeError, r"mask: torch.int32 .* wanted torch.bool"),
    ("mask", lambda t: t[None], ValueError, r"mask: .*\(1, 12\)"),
    ("layout", lambda t: t.int(), TypeError, r"layout: torch.int32"),
    ("layout", lambda t: t[:, :3], ValueError, r"layout: .*\(1, 3\).* wanted torch.int64 \(1, 4\)"),
    *(
        (name, lambda t: t.tolist(), TypeError, rf"^{name}: list, wanted a torch.Tensor")
        for name in ("data", "grad", "exp_avg", "steps", "mask", "layout")
    ),
    ("layout", lambda t: t - torch.tensor([0, 0, 1, 0]), ValueError, r"layout: covers 88 values in 11 rows, wanted 96"),
]


@pytest.mark.parametrize(("name", "wrong", "error", "words"), WRONG_TENSORS)
def test_a_wrong_tensor_is_refused_by_name(name, wrong, error, words):
    given = arguments()
    given[name] = wrong(given[name])
    with pytest.raises(error, match=words):
        masked_adamw_(**given, lr=1e-2)


@pytest.mark.parametrize(
    ("hyper", "words"),
    [
        ({"lr": -1.0}, "lr: -1.0, wanted lr ≥ 0"),
        ({"lr": float("nan")}, "lr: nan"),
        ({"lr": 0.1, "eps": -1e-8}, "eps: -1e-08, wanted eps ≥ 0"),
        ({"lr": 0.1, "betas": (1.0, 0.9)}, r"betas\[0\]: 1.0, wanted 0 ≤ betas\[0\] < 1"),
        ({"lr": 0.1, "betas": (0.9, -0.1)}, r"betas\[1\]: -0.1"),
        ({"lr": 0.1, "betas": (0.9,)}, r"betas: \(0.9,\), wanted two numbers"),
        ({"lr": 0.1, "betas": 0.9}, r"betas: 0.9, wanted two numbers"),
        ({"lr": 0.1, "weight_decay": -0.1}, "weight_decay: -0.1"),
    ],
)
def test_a_wrong_number_is_refused_by_name(hyper, words):
    given = arguments()
    before = given["data"].clone()
    with pytest.raises(ValueError, match=words):
        masked_adamw_(**given, **hyper)
    assert torch.equal(given["data"], before)


@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay"])
def test_what_is_no_number_is_refused_by_name(name):
    with pytest.raises(TypeError, match=rf"^{name}: 'fast', wanted a number"):
        masked_adamw_(**arguments(), **{"lr": 0.1, name: "fast"})
    if name != "eps":
        with pytest.raises(TypeError, match=rf"^{name}: 'fast', wanted a number"):
            masked_sgd_(**{**sgd_arguments(), "lr": 0.1, name: "fast"})


@pytest.mark.parametrize(
    ("hyper", "words"),
    [
        ({"momentum": -0.1}, "momentum: -0.1, wanted momentum ≥ 0"),
        ({"dampening": float("nan")}, "dampening: nan, wanted a finite number"),
        ({"nesterov": True}, "nesterov: True, wanted momentum > 0 and dampening 0"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "nesterov: "),
        ({"momentum": 0.9, "momentum_buffer": None}, "momentum_buffer: None, wanted a tensor like data"),
        ({"momentum": 0.9, "momentum_buffer": torch.zeros(95)}, r"momentum_buffer: .*\(95,\)"),
        ({"momentum": 0.0, "momentum_buffer": torch.zeros(95)}, r"momentum_buffer: .*\(95,\)"),
        ({"momentum": 0.0, "momentum_buffer": torch.zeros(0)}, r"momentum_buffer: .*\(0,\)"),
    ],
)
def test_a_wrong_argument_of_sgd_is_refused_by_name(hyper, words):
    with pytest.raises(ValueError, match=words):
        masked_sgd_(**{**sgd_arguments(), "lr": 0.1, **hyper})


@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        ("grad", lambda t: t[1:], "grad: wanted contiguous float32"),
        ("steps", lambda t: t[1:], "steps: wanted contiguous int32"),
        ("layout", lambda t: t + torch.tensor([8, 0, 0, 0]), "layout: its lines do not cover data and mask"),
        ("layout", lambda t: t + torch.tensor([0, 1, 0, 0]), "layout: its lines do not cover data and mask"),
    ],
)
def test_the_registered_op_checks_what_would_make_it_write_elsewhere(name, wrong, words):
    given = arguments()
    given[name] = wrong(given[name])
    with pytest.raises(RuntimeError, match=words):
        torch.ops.fibecfed.masked_adamw_(*given.values(), 0.1, 0.9, 0.999, 1e-8, 0.0)


def test_opcheck():
    torch.library.opcheck(
        torch.ops.fibecfed.masked_adamw_.default, (*arguments().values(), 1e-2, 0.9, 0.999, 1e-8, 0.01)
    )
    given = sgd_arguments()
    torch.library.opcheck(torch.ops.fibecfed.masked_sgd_.default, (*given.values(), 1e-2, 0.9, 0.0, 0.01, True))
    given["momentum_buffer"] = torch.empty(0)
    torch.library.opcheck(torch.ops.fibecfed.masked_sgd_.default, (*given.values(), 1e-2, 0.0, 0.0, 0.01, False))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_step_compiles_without_a_graph_break(compiler):
    given, wanted = arguments(), arguments()

    @torch.compile(backend=compiler, fullgraph=True)
    def step(data, grad, exp_avg, exp_avg_sq, steps, mask, layout):
        masked_adamw_(data, grad * 2.0, exp_avg, exp_avg_sq, steps, mask, layout, lr=1e-2)

    step(*given.values())
    masked_adamw_(**{**wanted, "grad": wanted["grad"] * 2.0}, lr=1e-2)
    assert all(torch.equal(given[name], wanted[name]) for name in wanted)


def test_a_layout_that_fitted_one_mask_is_looked_at_again_with_another():
    """On CUDA what was checked is remembered, with what it was checked against."""
    layout = arguments()["layout"]
    _check_layout(layout, "data", 96, 12, False)
    for numel, rows in ((96, 11), (88, 12)):
        with pytest.raises(ValueError, match="layout: "):
            _check_layout(layout, "data", numel, rows, False)
