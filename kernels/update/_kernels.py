"""The kernels of masked AdamW, SGD and the norm on CUDA; their launches are in triton.py."""
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


@triton.jit
def _lr_scale(lr_scale, SCALED: tl.constexpr):
    """What this program's line multiplies lr by, as a float64 tensor: a product with one stays float64 everywhere."""
    scale = tl.full((), 1.0, tl.float64)
    if SCALED:
        scale = tl.load(lr_scale + tl.program_id(0))
    return scale


# lr is float64: the step size lr / (1 − β1ˢ) and the decay 1 − lr·λ are rounded once, as torch rounds them.
@triton.jit
def adamw_kernel(
    data, grad, exp_avg, exp_avg_sq, steps, mask, layout, powers1, powers2, grad_scale, lr_scale, lr: tl.float64,
    weight_decay: tl.float64, weight1, beta2, weight2, eps, SCALED_GRAD: tl.constexpr, SCALED_LR: tl.constexpr,
    FINE: tl.constexpr, BLOCK: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """weight1 = 1 − β1, weight2 = 1 − β2; grad_scale and lr_scale are not read unless SCALED."""
    offset, first_row, rows, length = _line(layout)
    rate = lr * _lr_scale(lr_scale, SCALED_LR)
    decay = (1.0 - rate * weight_decay).to(tl.float32)
    for start in range(0, rows * length, BLOCK):
        i = start + tl.arange(0, BLOCK)
        row = first_row + i // length
        active = tl.load(mask + row, mask=i < rows * length, other=0) != 0
        if tl.max(active.to(tl.int32), 0) > 0:
            at = offset + i
            step = tl.load(steps + row, mask=active, other=0) + 1
            p = tl.load(data + at, mask=active, other=0.0) * decay
            g = tl.load(grad + at, mask=active, other=0.0)
            if SCALED_GRAD:
                g = g * tl.load(grad_scale)
            m = tl.load(exp_avg + at, mask=active, other=0.0)
            v = tl.load(exp_avg_sq + at, mask=active, other=0.0)
            near = weight1 < 0.5  # torch's lerp_ starts from the nearer end
            m = _fma(tl.where(near, weight1, weight1 - 1.0), g - m, tl.where(near, m, g), EMULATE)
            v = _fma(weight2 * g, g, v * beta2, EMULATE)
            size = (rate / _complement_of_power(powers1, step, FINE)).to(tl.float32)
            root = tl.sqrt_rn(_complement_of_power(powers2, step, FINE).to(tl.float32))
            denom = tl.div_rn(tl.sqrt_rn(v), root) + eps
            tl.store(data + at, p - tl.div_rn(size * m, denom), mask=active)
            tl.store(exp_avg + at, m, mask=active)
            tl.store(exp_avg_sq + at, v, mask=active)
    _count_up(steps, mask, first_row, rows, BLOCK)


@triton.jit
def sgd_kernel(
    data, grad, momentum_buffer, steps, mask, layout, grad_scale, lr_scale, lr: tl.float64, momentum, undamped,
    weight_decay, SCALED_GRAD: tl.constexpr, SCALED_LR: tl.constexpr, DECAY: tl.constexpr, MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr, BLOCK: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """undamped = 1 − dampening; momentum_buffer is not touched unless MOMENTUM, nor the scales unless SCALED."""
    offset, first_row, rows, length = _line(layout)
    rate = (lr * _lr_scale(lr_scale, SCALED_LR)).to(tl.float32)
    for start in range(0, rows * length, BLOCK):
        i = start + tl.arange(0, BLOCK)
        row = first_row + i // length
        active = tl.load(mask + row, mask=i < rows * length, other=0) != 0
        if tl.max(active.to(tl.int32), 0) > 0:
            at = offset + i
            p = tl.load(data + at, mask=active, other=0.0)
            g = tl.load(grad + at, mask=active, other=0.0)
            if SCALED_GRAD:
                g = g * tl.load(grad_scale)
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
            tl.store(data + at, _fma(-rate, g, p, EMULATE), mask=active)
    _count_up(steps, mask, first_row, rows, BLOCK)


@triton.jit
def squares_kernel(grad, mask, layout, partial, BLOCK: tl.constexpr):
    """partial[line] = Σ g² over the line's active rows, in float64, where the square of a float32 is exact."""
    offset, first_row, rows, length = _line(layout)
    sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, rows * length, BLOCK):
        i = start + tl.arange(0, BLOCK)
        active = tl.load(mask + first_row + i // length, mask=i < rows * length, other=0) != 0
        g = tl.load(grad + offset + i, mask=active, other=0.0).to(tl.float64)
        sums += g * g
    tl.store(partial + tl.program_id(0), tl.sum(sums, 0))


@triton.jit
def norm_kernel(partial, norm, lines, BLOCK: tl.constexpr):
    """norm = √Σ partial; one program."""
    sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, lines, BLOCK):
        i = start + tl.arange(0, BLOCK)
        sums += tl.load(partial + i, mask=i < lines, other=0.0)
    tl.store(norm, tl.sqrt(tl.sum(sums, 0)).to(tl.float32))
