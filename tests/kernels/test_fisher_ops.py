"""The Fisher ops as torch sees them: what is refused, opcheck, fakes under torch.compile."""

from __future__ import annotations

import pytest
import torch

from fibecfed_kernels import fisher_diag, lora_fisher_diag, use_backend

from .oracle import DTYPES, assert_near, fisher_inputs, fisher_truth

pytestmark = pytest.mark.usefixtures("one_thread")
X, GRAD_Y = torch.ones(3, 5, 31), torch.ones(3, 5, 4)
FLAT_X, FLAT_GRAD_Y = X.flatten(0, 1), GRAD_Y.flatten(0, 1)
OFFSETS = torch.tensor([0, 5, 5, 15], dtype=torch.int32)
LORA = (X, torch.ones(3, 5, 4), torch.ones(3, 5, 4), torch.ones(3, 5, 12))


@pytest.mark.parametrize("body", ["reference", "cpp"])
@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (TypeError, r"x: list, wanted a torch.Tensor", ([1.0], GRAD_Y)),
        (TypeError, r"x: torch.float64 \(3, 5, 31\).* wanted float32, bfloat16 or float16", (X.double(), GRAD_Y)),
        (TypeError, r"grad_y: torch.int64", (X, GRAD_Y.long())),
        (TypeError, r"grad_y: torch.float16 .* wanted the dtype and device of x", (X, GRAD_Y.half())),
        (TypeError, r"grad_y: .* on meta, wanted the dtype and device of x", (X, GRAD_Y.to("meta"))),
        (ValueError, r"x: .* wanted \(N, T, features\), or", (FLAT_X, FLAT_GRAD_Y)),
        (ValueError, r"x: .* wanted \(total, features\) since cu_seqlens", (X, GRAD_Y, OFFSETS)),
        (ValueError, r"grad_y: .* wanted \(3, 5, features\)", (X, GRAD_Y[:, 1:])),
        (ValueError, r"grad_y: .* wanted \(3, 5, features\)", (X, GRAD_Y[1:])),
        (TypeError, r"cu_seqlens: list, wanted an int32 tensor", (FLAT_X, FLAT_GRAD_Y, [0, 5, 5, 15])),
        (ValueError, r"cu_seqlens: torch.int64", (FLAT_X, FLAT_GRAD_Y, OFFSETS.long())),
        (ValueError, r"cu_seqlens: .* wanted int32 \(N\+1,\)", (FLAT_X, FLAT_GRAD_Y, OFFSETS[:0])),
        (ValueError, r"cu_seqlens: .* wanted int32 \(N\+1,\)", (FLAT_X, FLAT_GRAD_Y, OFFSETS[None])),
        (ValueError, r"cu_seqlens: values must rise from 0 to 15", (FLAT_X, FLAT_GRAD_Y, OFFSETS[:3])),
        (ValueError, r"cu_seqlens: values must rise from 0 to 15", (FLAT_X, FLAT_GRAD_Y, OFFSETS[1:])),
        (ValueError, r"cu_seqlens: values must rise from 0 to 15", (FLAT_X, FLAT_GRAD_Y, OFFSETS[[0, 2, 0, 3]])),
    ],
)
def test_what_cannot_be_taken_is_refused_by_name(body, error, words, arguments):
    with use_backend(body), pytest.raises(error, match=words):
        fisher_diag(*arguments)


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (ValueError, r"h, grad_h, grad_y: lists of 0, 0, 0 tensors, wanted equal", (X, [], [], [])),
        (ValueError, r"h, grad_h, grad_y: lists of 1, 1, 2 tensors", (X, [LORA[1]], [LORA[2]], [LORA[3]] * 2)),
        (TypeError, r"grad_h: Tensor, wanted a list of tensors since h is one", (X, [LORA[1]], LORA[2], [LORA[3]])),
        (TypeError, r"grad_y: NoneType, wanted a list of tensors", (X, [LORA[1]], [LORA[2]], None)),
        (TypeError, r"h: NoneType, wanted a torch.Tensor", (X, None, *LORA[2:])),
        (TypeError, r"grad_h: list, wanted a torch.Tensor", (X, LORA[1], [LORA[2]], LORA[3])),
        (ValueError, r"h: .*\(3, 5, 8\).* wanted the shape of grad_h", (X, torch.ones(3, 5, 8), *LORA[2:])),
        (TypeError, r"grad_h\[1\]: torch.float16", (X, [LORA[1]] * 2, [LORA[2], LORA[2].half()], [LORA[3]] * 2)),
        (
            ValueError,
            r"grad_y\[0\]: .* wanted \(3, 5, features\) as h\[0\]",
            (X, *([t] for t in LORA[1:3]), [LORA[3][1:]]),
        ),
    ],
)
@pytest.mark.parametrize("body", ["reference", "cpp"])
def test_what_cannot_be_taken_of_a_lora_module_is_refused_by_name(body, error, words, arguments):
    with use_backend(body), pytest.raises(error, match=words):
        lora_fisher_diag(*arguments)


BAD_OFFSETS = {  # cu_seqlens of 15 tokens: what is wrong with them
    "late": [1, 5, 15],
    "early": [0, 5, 14],
    "beyond": [0, 5, 16],
    "falling": [0, 10, 5, 15],
    "negative": [0, -5, 15],
}


@pytest.mark.parametrize("body", ["reference", "cpp"])
@pytest.mark.parametrize("offsets", BAD_OFFSETS.values(), ids=BAD_OFFSETS)
def test_bad_offsets_of_a_lora_module_are_refused(body, offsets):
    flat = [t.flatten(0, 1) for t in LORA]
    with use_backend(body), pytest.raises(ValueError, match="cu_seqlens: values must rise from 0 to 15"):
        lora_fisher_diag(*flat, torch.tensor(offsets, dtype=torch.int32))


CHANGES = {  # of one of a pair's tensors
    "fewer samples": (ValueError, lambda t: t[1:]),
    "fewer tokens": (ValueError, lambda t: t[:, 1:]),
    "flat": (ValueError, lambda t: t.flatten(0, 1)),
    "other dtype": ((TypeError, ValueError), lambda t: t.half()),
    "other device": ((TypeError, ValueError), lambda t: t.to("meta")),
    "no tensor": (TypeError, lambda t: t.tolist()),
}


@pytest.mark.parametrize("body", ["reference", "cpp"])
@pytest.mark.parametrize("listed", [False, True], ids=["one", "list"])
@pytest.mark.parametrize("place", range(1, 4), ids=["h", "grad_h", "grad_y"])
@pytest.mark.parametrize(("error", "change"), CHANGES.values(), ids=CHANGES)
def test_every_tensor_of_a_lora_module_is_checked(body, listed, place, error, change):
    tensors = list(LORA)
    tensors[place] = change(tensors[place])
    arguments = [tensors[0], *([t] for t in tensors[1:])] if listed else tensors
    with use_backend(body), pytest.raises(error, match=r"^(h|grad_h|grad_y)(\[0\])?: "):
        lora_fisher_diag(*arguments)


@pytest.mark.parametrize("body", ["reference", "cpp"])
def test_offsets_of_a_lora_module_on_another_device_are_refused(body):
    flat = [t.flatten(0, 1) for t in LORA]
    with use_backend(body), pytest.raises(ValueError, match=r"cu_seqlens: .* on meta"):
        lora_fisher_diag(*flat, torch.tensor([0, 5, 15], dtype=torch.int32).to("meta"))


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("wanted float32", (X.double(), GRAD_Y.double(), None, False)),
        ("grad_y: wanted the dtype", (X, GRAD_Y.half(), None, False)),
        ("grad_y: wanted the dtype, samples and tokens", (X, GRAD_Y[:, 1:], None, False)),
        ("cu_seqlens: values must rise from 0", (FLAT_X, FLAT_GRAD_Y, OFFSETS * 2, False)),
        ("cu_seqlens: wanted int32", (FLAT_X, FLAT_GRAD_Y, OFFSETS.long(), False)),
    ],
)
def test_the_registered_op_checks_what_would_make_it_read_elsewhere(words, arguments):
    with pytest.raises(RuntimeError, match=words):
        torch.ops.fibecfed.fisher_diag(*arguments)


def test_the_registered_op_takes_no_matrices_for_batches():
    with pytest.raises(RuntimeError, match=r"wanted tensors \(N, T, features\)"):
        torch.ops.fibecfed.fisher_diag(FLAT_X, FLAT_GRAD_Y, None, False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_grad", [False, True])
def test_opcheck(dtype, weight_grad):
    x, grad_y = fisher_inputs(3, 5, 31, 4, dtype)
    flat = (x.flatten(0, 1), grad_y.flatten(0, 1), OFFSETS, weight_grad)
    torch.library.opcheck(torch.ops.fibecfed.fisher_diag.default, (x, grad_y, None, weight_grad))
    torch.library.opcheck(torch.ops.fibecfed.fisher_diag.default, flat)
    h, wide = fisher_inputs(3, 5, 4, 12, dtype, seed=1)
    lists = [h, h[..., :2].clone()], [grad_y, grad_y[..., :2].clone()], [wide, wide]
    torch.library.opcheck(torch.ops.fibecfed.lora_fisher_diag.default, (x, *lists, None, weight_grad))


def test_ops_and_public_functions_compile_without_a_graph_break():
    x, grad_y = fisher_inputs(3, 5, 31, 4, torch.float32)
    h, wide = fisher_inputs(3, 5, 4, 12, torch.float32, seed=1)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def registered(x, grad_y):
        return torch.ops.fibecfed.fisher_diag(x * 1.0, grad_y, None, True)

    @torch.compile(backend="eager", fullgraph=True)
    def public(x, h, grad_h, grad_y):
        result = lora_fisher_diag(x * 1.0, h, grad_h, grad_y, weight_grad=True)
        return result.a.scores + result.b.scores, result.a.diag, result.b.weight_grad

    truth = fisher_truth(x, grad_y)
    for actual, wanted in zip(registered(x, grad_y), truth, strict=True):
        assert_near(actual, wanted, "fisher")
    scores, diag, weight_grad = public(x, h, grad_y, wide)
    truth_b = fisher_truth(h, wide)
    assert_near(scores, truth[0] + truth_b[0], "fisher")
    assert_near(diag, truth[1], "fisher")
    assert_near(weight_grad, truth_b[2], "fisher")
