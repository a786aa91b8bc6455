"""The Triton bodies on a real GPU: the interpreter's cases, large sizes, determinism, CUDA graphs, opcheck."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fibecfed_kernels import backend, fisher_diag, lora_fisher_diag, masked_adamw_, masked_grad_norm
from tests.kernels.oracle import DTYPES, fisher_inputs
from tests.kernels.triton_cases import *  # noqa: F403  every case, run on the GPU here
from tests.kernels.triton_cases import assert_true, equal, lora_inputs
from tests.kernels.triton_update_cases import *  # noqa: F403
from tests.kernels.triton_update_cases import State

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the Triton bodies cannot run"),
]


def test_triton_is_what_cuda_tensors_run() -> None:
    assert backend("cuda") == "triton"


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_matrices(dtype: torch.dtype) -> None:
    x, grad_y = fisher_inputs(3, 257, 4096, 1000, dtype, device="cuda")
    assert_true(fisher_diag(x, grad_y, weight_grad=True), x, grad_y)
    x, h, grad_h, grad_y_list = lora_inputs(9, 513, 4096, (8, 8, 64), (4096, 1000, 4096), dtype)
    found = lora_fisher_diag(x, h, grad_h, grad_y_list, weight_grad=True)
    for m, pair in enumerate(found):
        assert_true(pair.a, x, grad_h[m])
        assert_true(pair.b, h[m], grad_y_list[m])
    for one, two in zip(found, lora_fisher_diag(x, h, grad_h, grad_y_list, weight_grad=True), strict=True):
        assert equal(one.a, two.a)
        assert equal(one.b, two.b)


def captured(call):  # type: ignore[no-untyped-def]
    """A CUDA graph of ``call`` and its result; one call before it compiles kernels and brings tables to the device."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def test_lora_fisher_diag_replays_in_a_cuda_graph() -> None:
    x, h, grad_h, grad_y = lora_inputs(8, 64, 384, (8, 8), (384, 384), torch.bfloat16)
    graph, replayed = captured(lambda: lora_fisher_diag(x, h, grad_h, grad_y, weight_grad=True))
    for fresh in (x, *h, *grad_h, *grad_y):
        fresh.copy_(torch.randn_like(fresh))
    graph.replay()
    for one, two in zip(replayed, lora_fisher_diag(x, h, grad_h, grad_y, weight_grad=True), strict=True):
        assert equal(one.a, two.a)
        assert equal(one.b, two.b)


def test_adamw_replays_in_a_cuda_graph() -> None:
    state = State(0.5)
    before = [t.clone() for t in (state.data, state.m, state.v, state.steps)]

    def step() -> None:
        masked_adamw_(state.data, state.grad, state.m, state.v, state.steps, state.mask, state.layout, lr=1e-3)

    graph, _ = captured(step)

    def three(call) -> list[Tensor]:  # type: ignore[no-untyped-def]
        for tensor, value in zip((state.data, state.m, state.v, state.steps), before, strict=True):
            tensor.copy_(value)
        for _ in range(3):
            call()
        return [t.clone() for t in (state.data, state.m, state.v, state.steps)]

    for one, two in zip(three(graph.replay), three(step), strict=True):
        assert torch.equal(one, two)


def test_a_clipped_step_replays_in_a_cuda_graph() -> None:
    state = State(0.5)

    def step() -> Tensor:
        norm = masked_grad_norm(state.grad, state.mask, state.layout)
        scale = torch.clamp(1.0 / (norm + 1e-6), max=1.0)
        tensors = (state.data, state.grad, state.m, state.v, state.steps, state.mask, state.layout)
        masked_adamw_(*tensors, lr=1e-3, grad_scale=scale)
        return norm

    graph, norm = captured(step)
    state.grad.mul_(3.0)
    buffers = (state.data, state.m, state.v, state.steps)
    before = [t.clone() for t in buffers]
    graph.replay()
    found = [t.clone() for t in (*buffers, norm)]
    for tensor, value in zip(buffers, before, strict=True):
        tensor.copy_(value)
    norm = step()
    for one, two in zip(found, (*buffers, norm), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_of_the_fisher_ops(dtype: torch.dtype) -> None:
    x, h, grad_h, grad_y = lora_inputs(2, 5, 31, (8,), (12,), dtype)
    ops = torch.ops.fibecfed
    torch.library.opcheck(ops.fisher_diag.default, (x, grad_y[0], None, True))
    torch.library.opcheck(ops.lora_fisher_diag.default, (x, h, grad_h, grad_y, None, True))
    torch.library.opcheck(ops.weighted_grad.default, (x, grad_y[0], torch.rand(2, device="cuda"), None))


def test_opcheck_of_the_update_ops() -> None:
    state = State(0.5)
    state.grad.nan_to_num_()
    tensors = (state.data, state.grad, state.m, state.v, state.steps, state.mask, state.layout)
    torch.library.opcheck(torch.ops.fibecfed.masked_adamw_.default, (*tensors, 1e-3, 0.9, 0.999, 1e-8, 0.01))
    tensors = (state.data, state.grad, state.m, state.steps, state.mask, state.layout)
    torch.library.opcheck(torch.ops.fibecfed.masked_sgd_.default, (*tensors, 0.1, 0.9, 0.0, 0.0, False))
    scales = (torch.tensor(0.5).cuda(), torch.ones(len(state.layout), dtype=torch.float64).cuda())
    torch.library.opcheck(torch.ops.fibecfed.masked_sgd_.default, (*tensors, 0.1, 0.9, 0.0, 0.0, False, *scales))
    torch.library.opcheck(torch.ops.fibecfed.masked_grad_norm.default, (state.grad, state.mask, state.layout))
