"""The kernels of masked AdamW and SGD on CUDA; their launches are in triton.py."""
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl


@triton.jit
def _line(layout):
    """offset, first row, rows and row length of this program's line."""
    line = layout + tl.program_id(0) * 4
    rows, length = tl.load(line + 2).to(tl.int32), tl.load(line + 3).to(tl.int32)
    return tl.load(line), tl.load(line + 1), rows, length


@triton.jit
def _count_up(steps, mask, first_row, rows, BLOCK: tl.constexpr):
    """steps += 1 on the active rows of a line, after every thread has read them."""
    tl.debug_barrier()
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        active = tl.load(mask + first_row + row, mask=row < rows, other=0) != 0
        step = tl.load(steps + first_row + row, mask=active, other=0)
        tl.store(steps + first_row + row, step + 1, mask=active)


@triton.jit
def _fma(a, b, c, EMULATE: tl.constexpr):
    """a·b + c rounded once; the interpreter's own rounds twice, so there it goes through float64."""
    if EMULATE:
        a, b, c = tl.cast(a, tl.float32), tl.cast(b, tl.float32), tl.cast(c, tl.float32)
        return (tl.cast(a, tl.float64) * tl.cast(b, tl.float64) + tl.cast(c, tl.float64)).to(tl.float32)
    return tl.fma(a, b, c)


@triton.jit
def _complement_of_power(table, step, FINE: tl.constexpr):
    """1 − β**step in float64."""
    return 1.0 - tl.load(table + step % FINE) * tl.load(table + FINE + step // FINE)


# lr is float64: the step size lr / (1 − β1ˢ) is rounded once, as torch rounds it.
@triton.jit
def adamw_kernel(
    data, grad, exp_avg, exp_avg_sq, steps, mask, layout, powers1, powers2, lr: tl.float64, decay, weight1, beta2,
    weight2, eps, FINE: tl.constexpr, BLOCK: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """decay = 1 − lr·λ, weight1 = 1 − β1, weight2 = 1 − β2."""
    offset, first_row, rows, length = _line(layout)
    for start in range(0, rows * length, BLOCK):
        i = start + tl.arange(0, BLOCK)
        row = first_row + i // length
        active = tl.load(mask + row, mask=i < rows * length, other=0) != 0
        if tl.max(active.to(tl.int32), 0) > 0:
            at = offset + i
            step = tl.load(steps + row, mask=active, other=0) + 1
            p = tl.load(data + at, mask=active, other=0.0) * decay
            g = tl.load(grad + at, mask=active, other=0.0)
            m = tl.load(exp_avg + at, mask=active, other=0.0)
            v = tl.load(exp_avg_sq + at, mask=active, other=0.0)
            near = weight1 < 0.5  # torch's lerp_ starts from the nearer end
            m = _fma(tl.where(near, weight1, weight1 - 1.0), g - m, tl.where(near, m, g), EMULATE)
            v = _fma(weight2 * g, g, v * beta2, EMULATE)
            size = (lr / _complement_of_power(powers1, step, FINE)).to(tl.float32)
            root = tl.sqrt_rn(_complement_of_power(powers2, step, FINE).to(tl.float32))
            denom = tl.div_rn(tl.sqrt_rn(v), root) + eps
            tl.store(data + at, p - tl.div_rn(size * m, denom), mask=active)
            tl.store(exp_avg + at, m, mask=active)
            tl.store(exp_avg_sq + at, v, mask=active)
    _count_up(steps, mask, first_row, rows, BLOCK)


@triton.jit
def sgd_kernel(
    data, grad, momentum_buffer, steps, mask, layout, lr, momentum, undamped, weight_decay,
    DECAY: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, BLOCK: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """undamped = 1 − dampening; momentum_buffer is not touched unless MOMENTUM."""
    offset, first_row, rows, length = _line(layout)
    for start in range(0, rows * length, BLOCK):
        i = start + tl.arange(0, BLOCK)
        row = first_row + i // length
        active = tl.load(mask + row, mask=i < rows * length, other=0) != 0
        if tl.max(active.to(tl.int32), 0) > 0:
            at = offset + i
            p = tl.load(data + at, mask=active, other=0.0)
            g = tl.load(grad + at, mask=active, other=0.0)
            if DECAY:
                g = _fma(weight_decay, p, g, EMULATE)
            if MOMENTUM:
                taken = tl.load(steps + row, mask=active, other=0)
                b = tl.load(momentum_buffer + at, mask=active & (taken > 0), other=0.0)
                b = tl.where(taken > 0, _fma(undamped, g, b * momentum, EMULATE), g)  # the first step is not dampened
                tl.store(momentum_buffer + at, b, mask=active)
                if NESTEROV:
                    g = _fma(momentum, b, g, EMULATE)
                else:
                    g = b
            tl.store(data + at, _fma(-lr, g, p, EMULATE), mask=active)
    _count_up(steps, mask, first_row, rows, BLOCK)
