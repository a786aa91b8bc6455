"""The launch tables: every value has one writer, and nothing that shapes a sum depends on the number of samples."""

from __future__ import annotations

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fibecfed_kernels import _launch
from fibecfed_kernels._launch import (
    FISHER_TILES,
    POWERS,
    SCORE_BLOCK,
    VALUE_BLOCK,
    cdiv,
    finish_grid,
    linear_plan,
    lora_plan,
    powers,
    sample_groups,
    thin_rows,
)

SIZES = st.integers(1, 5000)
MODULES = st.lists(st.tuples(st.integers(1, 130), SIZES), min_size=1, max_size=5)


@given(st.integers(0, 10**6))
def test_groups_share_the_samples_evenly_and_are_few(samples: int) -> None:
    groups = sample_groups(samples)
    assert groups == max(1, min(samples, 8))
    sizes = [len(range(g, samples, groups)) for g in range(groups)]
    assert sum(sizes) == samples
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 5000))
def test_thin_rows_are_what_a_tensor_core_takes_and_waste_no_whole_tile(total: int) -> None:
    rows = thin_rows(total)
    assert rows in {rows for _, rows in FISHER_TILES}
    assert rows >= min(total, 64)
    assert rows == 16 or rows // 2 < total


@given(SIZES, MODULES, st.sampled_from([2, 4]))
def test_results_of_a_lora_plan_follow_one_another_as_the_public_op_cuts_them(
    d_in: int, modules: list[tuple[int, int]], itemsize: int
) -> None:
    ranks, d_outs = zip(*modules, strict=True)
    plan = lora_plan(d_in, ranks, d_outs, itemsize)
    offset = 0
    for m, (rank, d_out) in enumerate(modules):  # A_m, then B_m
        assert plan.bases[0][m] == offset
        assert plan.bases[m + 1] == (offset + rank * d_in,)
        offset += rank * (d_in + d_out)
    assert plan.values == offset


@given(SIZES, MODULES, st.sampled_from([2, 4]))
def test_every_partial_score_has_one_writer_and_one_reader(
    d_in: int, modules: list[tuple[int, int]], itemsize: int
) -> None:
    ranks, d_outs = zip(*modules, strict=True)
    plan = lora_plan(d_in, ranks, d_outs, itemsize)
    written = []
    programs = 0
    for stack, width in enumerate((d_in, *d_outs)):
        tiles = cdiv(width, plan.tile.features) * plan.thin_tiles[stack]
        assert plan.thin_tiles[stack] * plan.rows[stack] >= sum(plan.ranks[stack])
        programs += tiles
        for slot in plan.slots[stack]:
            written += range(slot, slot + tiles)
    assert programs == plan.tiles
    assert sorted(written) == list(range(plan.bounds[-1]))
    order = [key for m in range(len(modules)) for key in ((0, m), (m + 1, 0))]
    assert [plan.slots[stack][part] for stack, part in order] == list(plan.bounds[:-1])


@given(SIZES, SIZES, st.sampled_from([2, 4]))
def test_the_longer_side_of_one_matrix_is_the_wide_one(d_in: int, d_out: int, itemsize: int) -> None:
    plan = linear_plan(d_in, d_out, itemsize)
    assert plan.ranks == ((min(d_in, d_out),),)
    assert plan.transposed == (d_in < d_out,)
    assert plan.tiles == plan.bounds[-1]
    assert plan.values == d_in * d_out


def test_starts_of_thin_parts_are_the_ranks_before_them() -> None:
    assert lora_plan(64, (8, 12, 4), (1, 2, 3), 2).starts == ((0, 8, 20), (0,), (0,), (0,))


@pytest.mark.parametrize("function", [_launch.lora_plan, _launch.linear_plan, _launch.thin_rows])
def test_tiles_cannot_depend_on_the_number_of_samples(function: object) -> None:
    assert not {"samples", "tokens"} & set(inspect.signature(function).parameters)  # type: ignore[arg-type]


@pytest.mark.parametrize("tile", FISHER_TILES.values())
def test_tiles_are_powers_of_two_and_a_step_fills_a_tensor_core(tile: _launch.FisherTile) -> None:
    assert tile.tokens >= 16
    assert all(n & (n - 1) == 0 for n in (tile.features, tile.tokens, tile.warps))


def test_the_second_launch_covers_scores_and_partial_diagonals() -> None:
    plan = lora_plan(1000, (8, 8), (31, 1), 4)
    scores = 4 * cdiv(SCORE_BLOCK + 1, SCORE_BLOCK)
    assert finish_grid(plan, SCORE_BLOCK + 1, 8) == (scores + cdiv(plan.values, VALUE_BLOCK),)
    assert finish_grid(plan, 1, 1) == (4,)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.9999999])
def test_products_of_powers_are_every_power_an_int32_can_ask_for(beta: float) -> None:
    fine, coarse = powers(beta)
    for step in (1, 2, 1000, POWERS - 1, POWERS, POWERS + 1, 10**6, 2**31 - 1):
        assert fine[step % POWERS] * coarse[step // POWERS] == pytest.approx(beta**step, rel=1e-10, abs=1e-300)
