// Included by for_each_isa.h once for each instruction set. One step of consecutive values that have the same step
// count and learning rate, and the sum of their gradients' squares.
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

// The gradient as the step sees it.
template <bool scaled, class Constants>
FIBECFED_INLINE float scale(const Constants& c, float g) {
  return scaled ? g * c.grad_scale : g;
}

template <bool scaled>
struct AdamWStep {
  template <int width>
  FIBECFED_INLINE void at(
      const AdamW& c, float* __restrict p, const float* __restrict g, float* __restrict m, float* __restrict v) {
    for (int i = 0; i < width; ++i) {
      const float slope = scale<scaled>(c, g[i]);
      // torch's lerp starts from the nearer end
      const float moment = multiply_add(c.lerp_weight, slope - m[i], c.lerp_from_grad ? slope : m[i]);
      const float square = multiply_add(c.one_minus_beta2 * slope, slope, v[i] * c.beta2);
      const float denominator = __builtin_sqrtf(square) / c.sqrt_correction2 + c.eps;
      p[i] = p[i] * c.decay + (c.minus_step_size * moment) / denominator;
      m[i] = moment;
      v[i] = square;
    }
  }
};

template <bool decay, bool scaled, bool first, bool nesterov>
struct MomentumStep {
  template <int width>
  FIBECFED_INLINE void at(const Sgd& c, float* __restrict p, const float* __restrict g, float* __restrict b) {
    for (int i = 0; i < width; ++i) {
      const float slope = scale<scaled>(c, g[i]);
      const float change = decay ? multiply_add(c.weight_decay, p[i], slope) : slope;
      const float buffer = first ? change : multiply_add(c.one_minus_dampening, change, b[i] * c.momentum);
      p[i] = multiply_add(c.minus_lr, nesterov ? multiply_add(c.momentum, buffer, change) : buffer, p[i]);
      b[i] = buffer;
    }
  }
};

template <bool decay, bool scaled>
struct PlainStep {
  template <int width>
  FIBECFED_INLINE void at(const Sgd& c, float* __restrict p, const float* __restrict g) {
    for (int i = 0; i < width; ++i) {
      const float slope = scale<scaled>(c, g[i]);
      p[i] = multiply_add(c.minus_lr, decay ? multiply_add(c.weight_decay, p[i], slope) : slope, p[i]);
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
  return c.scaled ? for_values<AdamWStep<true>>(count, c, p, g, m, v)
                  : for_values<AdamWStep<false>>(count, c, p, g, m, v);
}

template <bool decay, bool scaled>
static void sgd_values_of(int64_t count, const Sgd& c, bool first, float* p, const float* g, float* b) {
  if (!c.has_momentum) return for_values<PlainStep<decay, scaled>>(count, c, p, g);
  if (c.nesterov) {
    return first ? for_values<MomentumStep<decay, scaled, true, true>>(count, c, p, g, b)
                 : for_values<MomentumStep<decay, scaled, false, true>>(count, c, p, g, b);
  }
  return first ? for_values<MomentumStep<decay, scaled, true, false>>(count, c, p, g, b)
               : for_values<MomentumStep<decay, scaled, false, false>>(count, c, p, g, b);
}

static void sgd_values(int64_t count, const Sgd& c, bool first, float* p, const float* g, float* b) {
  if (c.weight_decay != 0.0f) {
    return c.scaled ? sgd_values_of<true, true>(count, c, first, p, g, b)
                    : sgd_values_of<true, false>(count, c, first, p, g, b);
  }
  return c.scaled ? sgd_values_of<false, true>(count, c, first, p, g, b)
                  : sgd_values_of<false, false>(count, c, first, p, g, b);
}

typedef float Floats __attribute__((vector_size(32), aligned(4), may_alias));
typedef double Doubles __attribute__((vector_size(64)));

FIBECFED_INLINE void add_eight(Doubles& sums, const float* g) {
  const Doubles values = __builtin_convertvector(*reinterpret_cast<const Floats*>(g), Doubles);
  sums += values * values;
}

// Adds the squares of consecutive values to 16 sums. The square of a float32 is exact in float64, so that it does not
// matter where it is fused into the sum: every instruction set makes the same bits.
static void add_squares(int64_t count, const float* g, double* sums) {
  Doubles low, high;
  __builtin_memcpy(&low, sums, sizeof low);
  __builtin_memcpy(&high, sums + 8, sizeof high);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    add_eight(low, g + i);
    add_eight(high, g + i + 8);
  }
  if (i + 8 <= count) {
    add_eight(low, g + i);
    i += 8;
  }
  for (int lane = 0; i < count; ++i, ++lane) high[lane] += static_cast<double>(g[i]) * static_cast<double>(g[i]);
  __builtin_memcpy(sums, &low, sizeof low);
  __builtin_memcpy(sums + 8, &high, sizeof high);
}

#undef FIBECFED_INLINE
