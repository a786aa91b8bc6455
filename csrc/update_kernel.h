// Included by for_each_isa.h once for each instruction set. One step of consecutive values that have the same step
// count.
//
// The operations, their order and where they are fused are those of torch's CPU kernels (addcmul, lerp and add with a
// factor are fused where the processor can; mul, div and addcdiv are not), so that rounding agrees with torch.optim.

#define FIBECFED_INLINE static inline __attribute__((always_inline))

FIBECFED_INLINE float multiply_add(float a, float b, float c) {
#if FIBECFED_FMA
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

struct AdamWStep {
  template <int width>
  FIBECFED_INLINE void at(
      const AdamW& c, float* __restrict p, const float* __restrict g, float* __restrict m, float* __restrict v) {
    for (int i = 0; i < width; ++i) {
      // torch's lerp starts from the nearer end
      const float moment = multiply_add(c.lerp_weight, g[i] - m[i], c.lerp_from_grad ? g[i] : m[i]);
      const float square = multiply_add(c.one_minus_beta2 * g[i], g[i], v[i] * c.beta2);
      const float denominator = __builtin_sqrtf(square) / c.sqrt_correction2 + c.eps;
      p[i] = p[i] * c.decay + (c.minus_step_size * moment) / denominator;
      m[i] = moment;
      v[i] = square;
    }
  }
};

template <bool decay, bool first, bool nesterov>
struct MomentumStep {
  template <int width>
  FIBECFED_INLINE void at(const Sgd& c, float* __restrict p, const float* __restrict g, float* __restrict b) {
    for (int i = 0; i < width; ++i) {
      const float change = decay ? multiply_add(c.weight_decay, p[i], g[i]) : g[i];
      const float buffer = first ? change : multiply_add(c.one_minus_dampening, change, b[i] * c.momentum);
      p[i] = multiply_add(c.minus_lr, nesterov ? multiply_add(c.momentum, buffer, change) : buffer, p[i]);
      b[i] = buffer;
    }
  }
};

template <bool decay>
struct PlainStep {
  template <int width>
  FIBECFED_INLINE void at(const Sgd& c, float* __restrict p, const float* __restrict g) {
    for (int i = 0; i < width; ++i) {
      p[i] = multiply_add(c.minus_lr, decay ? multiply_add(c.weight_decay, p[i], g[i]) : g[i], p[i]);
    }
  }
};

// Rows of a LoRA B are as short as the rank: a run shorter than a wide register must not fall back to single values.
template <class Step, class Constants, class... Buffers>
FIBECFED_INLINE void for_values(int64_t count, const Constants& shared, Buffers... buffers) {
  const Constants c = shared;  // a copy that no store to the buffers can change
  int64_t i = 0;
  for (; i + FIBECFED_LANES <= count; i += FIBECFED_LANES) Step::template at<FIBECFED_LANES>(c, buffers + i...);
#if FIBECFED_LANES > 8
  for (; i + 8 <= count; i += 8) Step::template at<8>(c, buffers + i...);
#endif
#if FIBECFED_LANES > 4
  for (; i + 4 <= count; i += 4) Step::template at<4>(c, buffers + i...);
#endif
  for (; i < count; ++i) Step::template at<1>(c, buffers + i...);
}

static void adamw_values(int64_t count, const AdamW& c, float* p, const float* g, float* m, float* v) {
  for_values<AdamWStep>(count, c, p, g, m, v);
}

template <bool decay>
static void sgd_values_of(int64_t count, const Sgd& c, bool first, float* p, const float* g, float* b) {
  if (!c.has_momentum) return for_values<PlainStep<decay>>(count, c, p, g);
  if (c.nesterov) {
    return first ? for_values<MomentumStep<decay, true, true>>(count, c, p, g, b)
                 : for_values<MomentumStep<decay, false, true>>(count, c, p, g, b);
  }
  return first ? for_values<MomentumStep<decay, true, false>>(count, c, p, g, b)
               : for_values<MomentumStep<decay, false, false>>(count, c, p, g, b);
}

static void sgd_values(int64_t count, const Sgd& c, bool first, float* p, const float* g, float* b) {
  return c.weight_decay != 0.0f ? sgd_values_of<true>(count, c, first, p, g, b)
                                : sgd_values_of<false>(count, c, first, p, g, b);
}

#undef FIBECFED_INLINE
