"""Fisher diagonal: every body against float64 autograd, sample by sample, and bit for bit against itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fibecfed_kernels import FisherDiag, fisher_diag, lora_fisher_diag, use_backend

from .bodies import bodies
from .oracle import DTYPES, FEATURES, RANKS, SAMPLES, TOKENS, assert_near, fisher_inputs, fisher_truth

pytestmark = pytest.mark.usefixtures("one_thread")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

Shape = tuple[int, int, int, int]  # samples, tokens, d_in, d_out


def _affordable(shape: Shape) -> bool:
    samples, tokens, d_in, d_out = shape
    return samples * tokens * d_in * d_out <= 2e7 and samples * d_in * d_out <= 4e5


_thin, _any = st.sampled_from(RANKS), st.sampled_from(FEATURES)
shapes = st.one_of(
    *(
        st.tuples(st.sampled_from(SAMPLES), st.sampled_from(TOKENS), d_in, d_out)
        for d_in, d_out in ((_any, _thin), (_thin, _any), (_any, _any))
    )
).filter(_affordable)


def assert_fisher_near(actual: FisherDiag, truth: tuple[Tensor, Tensor, Tensor]) -> None:
    scores, diag, weight_grad = truth
    assert_near(actual.scores, scores, "fisher")
    assert_near(actual.diag, diag, "fisher")
    if actual.weight_grad is not None:
        assert_near(actual.weight_grad, weight_grad, "fisher")


def assert_same_bits(first: FisherDiag, second: FisherDiag) -> None:
    for name, a, b in zip(first._fields, first, second, strict=True):
        assert torch.equal(a, b), f"{name} differs"


def packed(x: Tensor, grad_y: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The first lengths[n] tokens of every sample, one after the other, with their offsets."""
    pack = [torch.cat([sample[:length] for sample, length in zip(t, lengths, strict=True)]) for t in (x, grad_y)]
    return pack[0], pack[1], torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


@bodies
@given(shape=shapes, dtype=st.sampled_from(DTYPES), weight_grad=st.booleans(), seed=st.integers(0, 99))
def test_dense_batch_equals_a_loop_over_single_samples(body, shape, dtype, weight_grad, seed):
    samples, tokens, d_in, d_out = shape
    x, grad_y = fisher_inputs(samples, tokens, d_in, d_out, dtype, seed)
    with use_backend(body):
        result = fisher_diag(x, grad_y, weight_grad=weight_grad)
    assert (result.weight_grad is not None) == weight_grad
    assert all(t.dtype == torch.float32 for t in result if t is not None)
    assert_fisher_near(result, fisher_truth(x, grad_y))


@bodies
@given(shape=shapes.filter(lambda shape: shape[0] > 0), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_packed_batch_with_empty_samples_equals_a_loop_over_single_samples(body, shape, dtype, seed):
    samples, tokens, d_in, d_out = shape
    x, grad_y = fisher_inputs(samples, tokens, d_in, d_out, dtype, seed)
    lengths = torch.randint(0, tokens + 1, (samples,), generator=torch.Generator().manual_seed(seed)).tolist()
    lengths[seed % samples] = 0
    x, grad_y, cu_seqlens = packed(x, grad_y, lengths)
    with use_backend(body):
        result = fisher_diag(x, grad_y, cu_seqlens, weight_grad=True)
    assert_fisher_near(result, fisher_truth(x, grad_y, cu_seqlens))


@bodies
@dtypes
def test_many_samples_and_strips_with_poisoned_memory(body, dtype, poisoned):
    for tokens, d_in, d_out in ((130, 421, 12), (5, 12, 421), (5, 200, 70), (130, 70, 200)):
        x, grad_y = fisher_inputs(19, tokens, d_in, d_out, dtype)
        with use_backend(body):
            result = fisher_diag(x, grad_y, weight_grad=True)
        assert_fisher_near(result, fisher_truth(x, grad_y))


@bodies
@pytest.mark.parametrize(("samples", "tokens"), [(0, 3), (2, 0), (0, 0)])
def test_without_samples_or_tokens_everything_is_zero(body, samples, tokens, poisoned):
    x, grad_y = torch.ones(samples, tokens, 31), torch.ones(samples, tokens, 4)
    offsets = torch.arange(samples + 1, dtype=torch.int32) * tokens
    with use_backend(body):
        dense = fisher_diag(x, grad_y, weight_grad=True)
        pack = fisher_diag(x.flatten(0, 1), grad_y.flatten(0, 1), offsets, weight_grad=True)
    for result in (dense, pack):
        assert torch.equal(result.scores, torch.zeros(samples))
        assert torch.equal(result.diag, torch.zeros(4, 31))
        assert torch.equal(result.weight_grad, torch.zeros(4, 31))


@bodies
def test_squares_are_taken_per_sample_not_per_token_nor_per_batch(body):
    x, grad_y = fisher_inputs(7, 63, 31, 4, torch.float32)
    per_token = torch.einsum("nto,nti->oi", grad_y.double().square(), x.double().square())
    per_batch = torch.einsum("nto,nti->oi", grad_y.double(), x.double()).square()
    scores, per_sample, _ = fisher_truth(x, grad_y)
    for other in (per_token, per_batch):  # the test would say nothing if the three were alike
        assert (other - per_sample).norm() > 0.2 * per_sample.norm()
    with use_backend(body):
        result = fisher_diag(x, grad_y)
    assert_near(result.diag, per_sample, "fisher")
    assert_near(result.scores, scores, "fisher")
    torch.testing.assert_close(result.scores.sum(), result.diag.sum(), rtol=1e-5, atol=0)


@bodies
@dtypes
@pytest.mark.parametrize(("d_in", "d_out"), [(384, 8), (8, 421), (200, 70)])
def test_a_score_has_the_same_bits_alone_in_any_batch_dense_or_packed(body, dtype, d_in, d_out):
    x, grad_y = fisher_inputs(19, 63, d_in, d_out, dtype)
    with use_backend(body):
        scores = fisher_diag(x, grad_y).scores
        reverse = fisher_diag(x.flip(0), grad_y.flip(0)).scores
        pack = fisher_diag(*packed(x, grad_y, [63] * 19)).scores
        behind_others = fisher_diag(*packed(x, grad_y, [5, 0, 63, 1] + 15 * [7])).scores[2]
        alone = [fisher_diag(x[n : n + 1], grad_y[n : n + 1]).scores for n in (0, 2, 18)]
    assert torch.equal(reverse.flip(0), scores)
    assert torch.equal(pack, scores)
    assert torch.equal(behind_others, scores[2])
    assert torch.equal(torch.cat(alone), scores[[0, 2, 18]])


@bodies
def test_a_sample_of_infinities_spoils_no_other_score(body):
    x, grad_y = fisher_inputs(9, 5, 31, 4, torch.float32)
    with use_backend(body):
        clean = fisher_diag(x, grad_y).scores
        x[4] = torch.inf
        spoiled = fisher_diag(x, grad_y).scores
    others = torch.arange(9) != 4
    assert torch.equal(spoiled[others], clean[others])
    assert not torch.isfinite(spoiled[4])


@bodies
def test_same_input_gives_the_same_bits_on_one_thread_and_on_two(body):
    x, grad_y = fisher_inputs(19, 65, 421, 8, torch.float32)  # more than a megabyte: below it one thread does all
    results = []
    for threads in (1, 2, 2, 1):
        torch.set_num_threads(threads)  # the fixture one_thread puts it back
        with use_backend(body):
            results.append(fisher_diag(x, grad_y, weight_grad=True))
    for result in results[1:]:
        assert_same_bits(result, results[0])


@bodies
@dtypes
def test_inputs_need_not_be_contiguous(body, dtype):
    x, grad_y = fisher_inputs(7, 9, 31, 12, dtype)
    with use_backend(body):
        plain = fisher_diag(x, grad_y, weight_grad=True)
        transposed = fisher_diag(
            x.transpose(0, 1).contiguous().transpose(0, 1), grad_y.mT.contiguous().mT, weight_grad=True
        )
        sliced = fisher_diag(
            torch.cat([x, x], 2)[..., 31:], torch.cat([grad_y, grad_y], 1)[:, ::1][:, 9:], weight_grad=True
        )
        spread = fisher_diag(x[:1].expand(3, -1, -1), grad_y[:1].expand(3, -1, -1))
        one = fisher_diag(x[:1], grad_y[:1])
    assert_same_bits(transposed, plain)
    assert_same_bits(sliced, plain)
    assert torch.equal(spread.scores, one.scores.expand(3))


@bodies
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_every_half_precision_number_is_read_exactly(body, dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite()].view(1, 1, -1)
    with use_backend(body):
        found = fisher_diag(x, torch.ones(1, 1, 1, dtype=dtype), weight_grad=True).weight_grad[0]
    wanted = x[0, 0].float()
    if body == "cpp" and dtype == torch.bfloat16:  # the processor's product of pairs takes subnormal values for zero
        normal = wanted.abs() >= torch.finfo(dtype).tiny
        assert bool(((found == wanted) | (found == 0))[~normal].all())
        found, wanted = found[normal], wanted[normal]
    assert torch.equal(found, wanted)


def lora_inputs(ranks: tuple[int, ...], outs: tuple[int, ...], dtype: torch.dtype, samples: int = 9, tokens: int = 13):
    x, _ = fisher_inputs(samples, tokens, 200, 1, dtype)
    h, grad_h, grad_y = [], [], []
    for seed, (rank, out) in enumerate(zip(ranks, outs, strict=True)):
        for into, features in ((h, rank), (grad_h, rank), (grad_y, out)):
            into.append(fisher_inputs(samples, tokens, features, 1, dtype, seed=10 * seed + len(into))[0])
    return x, h, grad_h, grad_y


@bodies
@dtypes
@pytest.mark.parametrize("weight_grad", [False, True])
def test_a_lora_pair_is_two_matrices(body, dtype, weight_grad, poisoned):
    x, (h,), (grad_h,), (grad_y,) = lora_inputs((8,), (421,), dtype)
    with use_backend(body):
        pair = lora_fisher_diag(x, h, grad_h, grad_y, weight_grad=weight_grad)
        a = fisher_diag(x, grad_h, weight_grad=weight_grad)
        b = fisher_diag(h, grad_y, weight_grad=weight_grad)
    for result, single in ((pair.a, a), (pair.b, b)):
        assert torch.equal(result.scores, single.scores)
        assert torch.equal(result.diag, single.diag)
        assert result.weight_grad is None if not weight_grad else torch.equal(result.weight_grad, single.weight_grad)
    assert_fisher_near(pair.a, fisher_truth(x, grad_h))
    assert_fisher_near(pair.b, fisher_truth(h, grad_y))


@bodies
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "packed"])
def test_a_list_of_lora_modules_is_the_single_calls(body, dense):
    modules = lora_inputs((4, 16, 1, 300), (31, 200, 421, 64), torch.float32)
    offsets = None
    if not dense:
        lengths = [13, 0, 5, 13, 1, 0, 7, 2, 13]
        x, h, grad_h, grad_y = modules
        packs = [packed(t, t, lengths) for t in (x, *h, *grad_h, *grad_y)]
        offsets, flat = packs[0][2], [pack[0] for pack in packs]
        modules = flat[0], flat[1:5], flat[5:9], flat[9:13]
    x, *lists = modules
    with use_backend(body):
        results = lora_fisher_diag(x, *lists, offsets, weight_grad=True)
        singles = [lora_fisher_diag(x, *one, offsets, weight_grad=True) for one in zip(*lists, strict=True)]
    assert isinstance(results, list)
    for result, single in zip(results, singles, strict=True):
        assert_same_bits(result.a, single.a)
        assert_same_bits(result.b, single.b)
