"""How the Triton bodies are launched: tiles, grids, warps. Pure functions of shapes, tested without a GPU.

Nothing is autotuned: a table row is chosen by element size and rank, and every row is compiled for every target in the
tests. What shapes the order of a sum (tile, tokens a step) never depends on the number of samples, so that a sample's
score does not depend on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

MAX_GROUPS = 8  # groups of samples that run side by side; each writes its own partial diagonal, so few
GROUPED_VALUES = 1 << 20  # of one linear module, above which there is one group
SCORE_BLOCK = 64  # samples that one program of the second launch sums the scores of
VALUE_BLOCK = 512  # values of the diagonal that one program of the second launch sums
UPDATE_BLOCK = 1024  # values that an update program takes at a time: most lines of a layout in one step
UPDATE_WARPS = 4
POWERS = 1 << 16  # entries of the fine table of powers; the coarse one has 2**31 / POWERS


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class FisherTile:
    """One row of the table: features of the wide side a program owns, tokens a step, warps, pipeline stages."""

    features: int
    tokens: int
    warps: int
    stages: int


# (bytes of an element, rows of the thin side) -> tile. 16-bit inputs go through tensor cores, float32 through plain
# FMAs in full precision, whose operands sit in registers: hence the smaller steps.
FISHER_TILES = {
    (2, 16): FisherTile(features=128, tokens=32, warps=8, stages=3),
    (2, 32): FisherTile(features=64, tokens=32, warps=8, stages=4),
    (2, 64): FisherTile(features=128, tokens=32, warps=8, stages=4),
    (4, 16): FisherTile(features=64, tokens=16, warps=4, stages=4),
    (4, 32): FisherTile(features=64, tokens=16, warps=4, stages=4),
    (4, 64): FisherTile(features=128, tokens=16, warps=8, stages=4),
}


def thin_rows(total: int) -> int:
    """Rows of the thin side that one program holds: 16 (the least a tensor core takes), 32 or 64; the rest is tiled."""
    return 16 if total <= 16 else 32 if total <= 32 else 64


def sample_groups(samples: int, limit: int = MAX_GROUPS) -> int:
    """Groups of samples, group g taking samples g, g + groups, …: a function of the number of samples alone."""
    return max(1, min(samples, limit))


@dataclass(frozen=True)
class FisherPlan:
    """Where the programs of one launch read and write. Tuples have one element a stack, nested ones one a thin part.

    A *stack* is a wide matrix and the thin ones multiplied with it: x with ∂h of every module, or one ∂y with its h.
    """

    ranks: tuple[tuple[int, ...], ...]
    starts: tuple[tuple[int, ...], ...]  # first row of the part among the thin rows of its stack
    rows: tuple[int, ...]  # thin rows of a program
    thin_tiles: tuple[int, ...]  # programs that share a wide tile, since the thin side has more rows than that
    transposed: tuple[bool, ...]  # results are (wide, thin) instead of (thin, wide)
    bases: tuple[tuple[int, ...], ...]  # first value of the part's result in the flat diagonal
    slots: tuple[tuple[int, ...], ...]  # first of the part's rows in the table of partial scores
    bounds: tuple[int, ...]  # the same by matrix, in the order of the results, with the end
    tiles: int  # feature tiles of all stacks: the first axis of the grid
    values: int  # values of the flat diagonal
    tile: FisherTile


def _plan(
    stacks: tuple[tuple[int, tuple[int, ...], bool], ...], order: tuple[tuple[int, int], ...], itemsize: int
) -> FisherPlan:
    """Plan stacks of (width, ranks, transposed); ``order``: (stack, part) of each result."""
    rows = tuple(thin_rows(sum(ranks)) for _, ranks, _ in stacks)
    tile = FISHER_TILES[itemsize, max(rows)]
    thin_tiles = tuple(cdiv(sum(ranks), r) for (_, ranks, _), r in zip(stacks, rows, strict=True))
    counts = [thin * cdiv(width, tile.features) for (width, _, _), thin in zip(stacks, thin_tiles, strict=True)]
    sizes = [stacks[s][0] * stacks[s][1][part] for s, part in order]
    base = dict(zip(order, accumulate(sizes, initial=0), strict=False))
    bounds = tuple(accumulate((counts[s] for s, _ in order), initial=0))
    slot = dict(zip(order, bounds, strict=False))
    parts = [[(s, part) for part in range(len(ranks))] for s, (_, ranks, _) in enumerate(stacks)]
    return FisherPlan(
        ranks=tuple(ranks for _, ranks, _ in stacks),
        starts=tuple(tuple(accumulate(ranks[:-1], initial=0)) for _, ranks, _ in stacks),
        rows=rows,
        thin_tiles=thin_tiles,
        transposed=tuple(transposed for _, _, transposed in stacks),
        bases=tuple(tuple(base[key] for key in keys) for keys in parts),
        slots=tuple(tuple(slot[key] for key in keys) for keys in parts),
        bounds=bounds,
        tiles=sum(counts),
        values=sum(sizes),
        tile=tile,
    )


@lru_cache(maxsize=256)
def lora_plan(d_in: int, ranks: tuple[int, ...], d_outs: tuple[int, ...], itemsize: int) -> FisherPlan:
    """Modules that share x: one stack of x with every ∂h, one stack a module of ∂y with h; results A_0, B_0, A_1, …"""
    stacks = ((d_in, ranks, False), *((d_out, (rank,), True) for rank, d_out in zip(ranks, d_outs, strict=True)))
    order = tuple(key for m in range(len(ranks)) for key in ((0, m), (m + 1, 0)))
    return _plan(stacks, order, itemsize)


@lru_cache(maxsize=256)
def linear_plan(d_in: int, d_out: int, itemsize: int) -> FisherPlan:
    """One matrix: the longer side is the wide one."""
    stack = (d_out, (d_in,), True) if d_in < d_out else (d_in, (d_out,), False)
    return _plan((stack,), ((0, 0),), itemsize)


def finish_grid(plan: FisherPlan, samples: int, groups: int) -> tuple[int]:
    """Programs of the second launch: sums of scores, and of partial diagonals where there are several."""
    return (
        (len(plan.bounds) - 1) * cdiv(samples, SCORE_BLOCK) + (cdiv(plan.values, VALUE_BLOCK) if groups > 1 else 0),
    )


@lru_cache(maxsize=16)
def powers(beta: float) -> tuple[list[float], list[float]]:
    """β^i for i < POWERS and β^(POWERS·j): their products are β^s for every int32 step s, whatever β in [0, 1)."""
    block = beta**POWERS
    return [beta**i for i in range(POWERS)], [block**j for j in range((1 << 31) // POWERS)]
