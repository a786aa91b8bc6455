// Included by for_each_isa.h once for each instruction set. One step of consecutive values that have the same step count.
//
// The operations, their order and where they are fused are those of torch's CPU kernels (addcmul, lerp and add with a factor
// are fused where the processor can, mul, div and addcdiv are not), so that rounding agrees with torch.optim.

static inline float multiply_add(float a, float b, float c) {
#if FIBECFED_FMA
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

static void adamw_values(
    int64_t count, const AdamW& c, float* __restrict p, const float* __restrict g, float* __restrict m, float* __restrict v) {
  for (int64_t i = 0; i < count; ++i) {
    const float decayed = p[i] * c.decay;
    // torch's lerp starts from the nearer end
    const float moment = multiply_add(c.lerp_weight, g[i] - m[i], c.lerp_from_grad ? g[i] : m[i]);
    const float square = multiply_add(c.one_minus_beta2 * g[i], g[i], v[i] * c.beta2);
    const float denominator = __builtin_sqrtf(square) / c.sqrt_correction2 + c.eps;
    p[i] = decayed + (c.minus_step_size * moment) / denominator;
    m[i] = moment;
    v[i] = square;
  }
}

static void sgd_values(
    int64_t count, const Sgd& c, bool first, float* __restrict p, const float* __restrict g, float* __restrict b) {
  for (int64_t i = 0; i < count; ++i) {
    const float decayed = c.weight_decay != 0.0f ? multiply_add(c.weight_decay, p[i], g[i]) : g[i];
    if (!c.has_momentum) {
      p[i] = multiply_add(c.minus_lr, decayed, p[i]);
      continue;
    }
    const float buffer = first ? decayed : multiply_add(c.one_minus_dampening, decayed, b[i] * c.momentum);
    p[i] = multiply_add(c.minus_lr, c.nesterov ? multiply_add(c.momentum, buffer, decayed) : buffer, p[i]);
    b[i] = buffer;
  }
}
