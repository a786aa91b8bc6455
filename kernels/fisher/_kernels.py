"""The two kernels of the Fisher diagonal on CUDA; their launches are in triton.py."""
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl


@triton.jit
def _stack_tile(
    wide, width, thins, bases, slots, cu_seqlens, weights, tokens, total, samples, partial, diag, grad, values, tile,
    S: tl.constexpr, RANKS: tl.constexpr, STARTS: tl.constexpr, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr,
    THIN_TILES: tl.constexpr, FEATURES: tl.constexpr, TOKENS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of stack S; RANKS, STARTS: rows of each thin part and the first of them among the stack's."""
    rows = (tile % THIN_TILES) * ROWS + tl.arange(0, ROWS)
    cols = (tile // THIN_TILES) * FEATURES + tl.arange(0, FEATURES)
    step = tl.arange(0, TOKENS)
    wide_offsets = step[:, None] * width + cols[None, :]
    squares = tl.zeros((ROWS, FEATURES), tl.float32)
    sums = tl.zeros((ROWS, FEATURES), tl.float32)
    for n in range(tl.program_id(1), samples, tl.num_programs(1)):
        if cu_seqlens is None:
            start = tl.cast(n, tl.int64) * tokens
            length = tokens
        else:  # never past the tokens there are, whatever the offsets say
            begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + n), 0), total)
            start = begin.to(tl.int64)
            length = tl.minimum(tl.load(cu_seqlens + n + 1), total) - begin
        gradient = tl.zeros((ROWS, FEATURES), tl.float32)
        for t in range(0, length, TOKENS):
            live = (t + step < length)[:, None]
            w = tl.load(wide + (start + t) * width + wide_offsets, mask=live & (cols < width)[None, :], other=0.0)
            if UPCAST:
                w = w.to(tl.float32)
            for m in tl.static_range(len(RANKS[S])):
                local = rows - STARTS[S][m]
                inside = live & ((local >= 0) & (local < RANKS[S][m]))[None, :]
                offsets = step[:, None] * RANKS[S][m] + local[None, :]
                part = tl.load(thins[m] + (start + t) * RANKS[S][m] + offsets, mask=inside, other=0.0)
                if UPCAST:
                    part = part.to(tl.float32)
                if m == 0:
                    thin = part
                else:
                    thin += part  # exact: at most one part is not zero
            gradient = tl.dot(tl.trans(thin), w, gradient, input_precision="ieee")
        square = gradient * gradient
        for m in tl.static_range(len(RANKS[S])):
            mine = (rows >= STARTS[S][m]) & (rows < STARTS[S][m] + RANKS[S][m])
            slot = tl.cast(slots[m] + tile, tl.int64)
            tl.store(partial + slot * samples + n, tl.sum(tl.where(mine[:, None], square, 0.0)))
        squares += square
        if grad is not None:
            if weights is None:
                sums += gradient
            else:
                sums += gradient * tl.load(weights + n)
    for m in tl.static_range(len(RANKS[S])):
        local = (rows - STARTS[S][m]).to(tl.int64)
        inside = ((local >= 0) & (local < RANKS[S][m]))[:, None] & (cols < width)[None, :]
        if TRANSPOSED:
            offsets = local[:, None] + cols.to(tl.int64)[None, :] * RANKS[S][m]
        else:
            offsets = local[:, None] * width + cols[None, :]
        offsets += tl.cast(tl.program_id(1), tl.int64) * values + bases[m]
        tl.store(diag + offsets, squares, mask=inside)
        if grad is not None:
            tl.store(grad + offsets, sums, mask=inside)


# Sizes that no address depends on are not specialised: a new batch shape compiles nothing.
@triton.jit(do_not_specialize=("bases", "slots", "tokens", "total", "samples", "values"))
def fisher_kernel(
    wides, widths, thins, bases, slots, cu_seqlens, weights, tokens, total, samples, partial, diag, grad, values,
    RANKS: tl.constexpr, STARTS: tl.constexpr, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, THIN_TILES: tl.constexpr,
    FEATURES: tl.constexpr, TOKENS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The programs of all stacks, one stack's tiles after the other's; tuples have one element a stack."""
    tile = tl.program_id(0)
    for s in tl.static_range(len(RANKS)):
        tiles = tl.cdiv(widths[s], FEATURES) * THIN_TILES[s]
        if (tile >= 0) & (tile < tiles):
            _stack_tile(
                wides[s], widths[s], thins[s], bases[s], slots[s], cu_seqlens, weights, tokens, total, samples,
                partial, diag, grad, values, tile, s, RANKS, STARTS, TRANSPOSED[s], ROWS[s], THIN_TILES[s], FEATURES,
                TOKENS, UPCAST,
            )  # fmt: skip
        tile -= tiles


@triton.jit(do_not_specialize=("bounds", "samples", "groups", "values"))
def finish_kernel(
    partial, scores, bounds, samples, diag_parts, diag, grad_parts, grad, groups, values,
    SCORES: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Scores: sums over each matrix's tiles; then, where several groups left parts, diag and grad: sums over groups."""
    program = tl.program_id(0)
    blocks = tl.cdiv(samples, SCORES)
    matrices: tl.constexpr = len(bounds) - 1
    if program < matrices * blocks:
        first = bounds[0]
        last = bounds[1]
        for j in tl.static_range(1, len(bounds) - 1):
            first = tl.where(program // blocks == j, bounds[j], first)
            last = tl.where(program // blocks == j, bounds[j + 1], last)
        n = (program % blocks) * SCORES + tl.arange(0, SCORES)
        score = tl.zeros((SCORES,), tl.float32)
        for slot in range(first, last):
            score += tl.load(partial + tl.cast(slot, tl.int64) * samples + n, mask=n < samples, other=0.0)
        tl.store(scores + (program // blocks) * samples + n, score, mask=n < samples)
    else:
        i = tl.cast(program - matrices * blocks, tl.int64) * VALUES + tl.arange(0, VALUES)
        squares = tl.zeros((VALUES,), tl.float32)
        sums = tl.zeros((VALUES,), tl.float32)
        for g in range(groups):
            squares += tl.load(diag_parts + tl.cast(g, tl.int64) * values + i, mask=i < values, other=0.0)
            if grad is not None:
                sums += tl.load(grad_parts + tl.cast(g, tl.int64) * values + i, mask=i < values, other=0.0)
        tl.store(diag + i, squares, mask=i < values)
        if grad is not None:
            tl.store(grad + i, sums, mask=i < values)
