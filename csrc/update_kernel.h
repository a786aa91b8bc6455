// Included by for_each_isa.h once for each instruction set. One step of consecutive values that have the same step count.
//
// The operations, their order and where they are fused are those of torch's CPU kernels (addcmul, lerp and add with a factor
// are fused where the processor can; mul, div and addcdiv are not), so that rounding agrees with torch.optim.

#define FIBECFED_INLINE static inline __attribute__((always_inline))

FIBECFED_INLINE float multiply_add(float a, float b, float c) {
#if FIBECFED_FMA
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

struct AdamWStep {
  const AdamW& c;
  float *p, *m, *v;
  const float* g;

  template <int width>
  __attribute__((always_inline)) void at(int64_t start) const {
    float* __restrict const p_ = p + start;
    float* __restrict const m_ = m + start;
    float* __restrict const v_ = v + start;
    const float* __restrict const g_ = g + start;
    for (int i = 0; i < width; ++i) {
      // torch's lerp starts from the nearer end
      const float moment = multiply_add(c.lerp_weight, g_[i] - m_[i], c.lerp_from_grad ? g_[i] : m_[i]);
      const float square = multiply_add(c.one_minus_beta2 * g_[i], g_[i], v_[i] * c.beta2);
      const float denominator = __builtin_sqrtf(square) / c.sqrt_correction2 + c.eps;
      p_[i] = p_[i] * c.decay + (c.minus_step_size * moment) / denominator;
      m_[i] = moment;
      v_[i] = square;
    }
  }
};

struct SgdStep {
  const Sgd& c;
  bool first;
  float *p, *b;
  const float* g;

  template <int width>
  __attribute__((always_inline)) void at(int64_t start) const {
    float* __restrict const p_ = p + start;
    const float* __restrict const g_ = g + start;
    float change[width];
    for (int i = 0; i < width; ++i) change[i] = c.weight_decay != 0.0f ? multiply_add(c.weight_decay, p_[i], g_[i]) : g_[i];
    if (c.has_momentum) {
      float* __restrict const b_ = b + start;
      for (int i = 0; i < width; ++i) {
        b_[i] = first ? change[i] : multiply_add(c.one_minus_dampening, change[i], b_[i] * c.momentum);
        change[i] = c.nesterov ? multiply_add(c.momentum, b_[i], change[i]) : b_[i];
      }
    }
    for (int i = 0; i < width; ++i) p_[i] = multiply_add(c.minus_lr, change[i], p_[i]);
  }
};

// Rows of a LoRA B are as short as the rank: a run shorter than a wide register must not fall back to single values.
template <class Step>
FIBECFED_INLINE void for_values(int64_t count, const Step& step) {
  int64_t i = 0;
  for (; i + FIBECFED_LANES <= count; i += FIBECFED_LANES) step.template at<FIBECFED_LANES>(i);
#if FIBECFED_LANES > 8
  for (; i + 8 <= count; i += 8) step.template at<8>(i);
#endif
#if FIBECFED_LANES > 4
  for (; i + 4 <= count; i += 4) step.template at<4>(i);
#endif
  for (; i < count; ++i) step.template at<1>(i);
}

static void adamw_values(int64_t count, const AdamW& c, float* p, const float* g, float* m, float* v) {
  const AdamW constants = c;  // a copy that no store to p, m or v can change
  for_values(count, AdamWStep{constants, p, m, v, g});
}

static void sgd_values(int64_t count, const Sgd& c, bool first, float* p, const float* g, float* b) {
  const Sgd constants = c;
  for_values(count, SgdStep{constants, first, p, b, g});
}

#undef FIBECFED_INLINE
