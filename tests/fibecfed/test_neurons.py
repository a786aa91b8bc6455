"""Row importance, its momentum, and masks: worked cases, ties, the head, and the starting state B = 0."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fibecfed.neurons import lowest_active_layer, row_importance, row_mask, smooth
from fibecfed_kernels import Entry, row_layout

# two layers of A (2, 6) and B (5, 2), a head (3, 4): rows 0-6, 7-13, 14-16
LAYERS = {0: slice(0, 7), 1: slice(7, 14)}
LENGTHS = torch.tensor(([6] * 2 + [2] * 5) * 2 + [4] * 3)


def active(mask: torch.Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()


def test_importance_of_a_row_is_the_sum_of_its_diagonal() -> None:
    entries = [Entry("a", (2, 6), 0, 0), Entry("b", (5, 2), 12, 0), Entry("bias", (3,), 22, None)]
    layout = row_layout(entries)
    diag = torch.rand(25)
    wanted = torch.cat([diag[:12].view(2, 6).sum(1), diag[12:22].view(5, 2).sum(1), diag[22:]])
    found = row_importance(diag, layout[:, 3].repeat_interleave(layout[:, 2]))
    torch.testing.assert_close(found, wanted)
    assert found.dtype == torch.float32


def test_importance_of_long_rows_is_summed_without_loss() -> None:
    diag = torch.rand(2**18) + 0.1
    found = row_importance(diag, torch.tensor([2**18 - 7, 7]))
    exact = [math.fsum(part.tolist()) for part in (diag[:-7], diag[-7:])]
    torch.testing.assert_close(found, torch.tensor(exact), rtol=1e-7, atol=0.0)


def test_importance_refuses_lengths_of_another_buffer() -> None:
    with pytest.raises(ValueError, match=r"diag: shape \(5,\), wanted \(6,\)"):
        row_importance(torch.ones(5), torch.tensor([2, 4]))


def test_momentum_keeps_gamma_of_the_past_and_starts_with_the_first() -> None:
    first, second = torch.tensor([4.0, 0.0]), torch.tensor([0.0, 8.0])
    start = smooth(None, first, 0.75)
    assert start.tolist() == [4.0, 0.0]  # not (1 − γ)·first
    assert smooth(start, second, 0.75).tolist() == [3.0, 2.0]
    assert smooth(start, second, 0.0).tolist() == [0.0, 8.0]
    start += 1.0
    assert first.tolist() == [4.0, 0.0]  # a copy: the caller may go on adding to its sums


@pytest.mark.parametrize("gamma", [1.0, -0.1, math.nan])
def test_momentum_refuses_gamma_outside_zero_to_one(gamma: float) -> None:
    with pytest.raises(ValueError, match="gamma"):
        smooth(None, torch.ones(2), gamma)


def test_momentum_refuses_another_shape() -> None:
    with pytest.raises(ValueError, match="new: shape"):
        smooth(torch.ones(1), torch.ones(2), 0.5)


def test_gal_and_head_are_whole_and_a_local_layer_keeps_its_best() -> None:
    importance = torch.tensor([0.0, 9, 1, 8, 2, 7, 3] + [0.0] * 7 + [0.0] * 3)
    assert active(row_mask(importance, LAYERS, [1], 0.5)) == [1, 3, 5, 6, *range(7, 17)]  # round(3.5) = 4


@pytest.mark.parametrize(("share", "wanted"), [(0.0, 0), (0.01, 1), (0.3, 2), (0.5, 4), (0.93, 7), (1.0, 7)])
def test_number_of_active_rows(share: float, wanted: int) -> None:
    mask = row_mask(torch.rand(17), LAYERS, (), share)
    assert [int(mask[rows].sum()) for rows in LAYERS.values()] == [wanted, wanted]
    assert bool(mask[14:].all())


def test_equally_important_rows_are_taken_from_the_lowest_index() -> None:
    assert active(row_mask(torch.ones(17), LAYERS, (1,), 0.5)) == [0, 1, 2, 3, *range(7, 17)]
    importance = torch.tensor([1.0, 2, 1, 2, 1, 1, 1] + [0.0] * 10)
    assert active(row_mask(importance, LAYERS, (1,), 0.43))[:3] == [0, 1, 3]


def test_share_of_each_layer() -> None:
    mask = row_mask(torch.arange(17.0), LAYERS, (), {0: 0.0, 1: 0.3})
    assert active(mask) == [12, 13, 14, 15, 16]
    with pytest.raises(ValueError, match="share: no value for local layer 1"):
        row_mask(torch.ones(17), LAYERS, (), {0: 0.5})
    assert active(row_mask(torch.ones(17), LAYERS, (1,), {0: 0.0})) == list(range(7, 17))  # GAL asks for no share


def test_at_the_start_rows_of_A_lose_to_rows_of_B() -> None:
    diag = torch.cat([torch.zeros(12), torch.rand(10), torch.zeros(12), torch.rand(10), torch.rand(12)])  # B = 0: no ∂A
    mask = row_mask(row_importance(diag, LENGTHS), LAYERS, (), 0.5)
    assert not mask[[0, 1, 7, 8]].any()
    assert [int(mask[m].sum()) for m in LAYERS.values()] == [4, 4]


@given(
    share=st.floats(0.0, 1.0),
    gal=st.sets(st.sampled_from([0, 1])),
    seed=st.integers(0, 99),
)
def test_no_frozen_row_is_more_important_than_an_active_one(share: float, gal: set[int], seed: int) -> None:
    importance = torch.randint(0, 4, (17,), generator=torch.Generator().manual_seed(seed)).float()
    mask = row_mask(importance, LAYERS, gal, share)
    assert bool(mask[14:].all())
    for layer, rows in LAYERS.items():
        kept, values = mask[rows], importance[rows]
        if layer in gal:
            assert bool(kept.all())
            continue
        assert int(kept.sum()) == max(round(share * len(values)), int(share > 0))
        if kept.any() and not kept.all():
            assert values[kept].min() >= values[~kept].max()
            border = (values == values[kept].min()).nonzero().flatten()
            assert kept[border].int().diff().le(0).all()  # among equals: first the active ones, then the frozen


def test_masks_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"gal: no such layers \[5\]"):
        row_mask(torch.ones(17), LAYERS, (5,), 0.5)
    with pytest.raises(ValueError, match=r"importance: .* NaN"):
        row_mask(torch.full((17,), math.nan), LAYERS, (), 0.5)
    with pytest.raises(ValueError, match=r"rows_by_layer: .* for layer 1"):
        row_mask(torch.ones(10), LAYERS, (), 0.5)
    for share in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="share"):
            row_mask(torch.ones(17), LAYERS, (), share)


def test_lowest_active_layer() -> None:
    mask = torch.zeros(17, dtype=torch.bool)
    mask[14:] = True
    assert lowest_active_layer(mask, LAYERS) is None  # the head alone
    mask[13] = True
    assert lowest_active_layer(mask, LAYERS) == 1
    mask[0] = True
    assert lowest_active_layer(mask, dict(reversed(LAYERS.items()))) == 0
