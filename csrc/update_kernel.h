// Included by for_each_isa.h once for each instruction set. One step of runs of values that have the same step count and
// learning rate, and the sum of their gradients' squares.
//
// The operations, their order and where they are fused are those of torch's CPU kernels (addcmul, lerp and add with a
// factor are fused where the processor can; mul, div and addcdiv are not), so that rounding agrees with torch.optim.

#define FIBECFED_INLINE static inline __attribute__((always_inline))

// Registers by name: left to the compiler, the few values of a short row were not put into one.
template <int width>
struct Register {
  typedef float Type __attribute__((vector_size(4 * width), aligned(4), may_alias));
};

template <int width>
FIBECFED_INLINE typename Register<width>::Type& at(float* values) {
  return *reinterpret_cast<typename Register<width>::Type*>(values);
}

template <int width>
FIBECFED_INLINE typename Register<width>::Type at(const float* values) {
  return *reinterpret_cast<const typename Register<width>::Type*>(values);
}

// a b + c; a: a register, or the same for all.
FIBECFED_INLINE float lane(float a, int) { return a; }

template <class Values>
FIBECFED_INLINE float lane(Values a, int i) {
  return a[i];
}

template <class Factor, class Values>
FIBECFED_INLINE Values multiply_add(Factor a, Values b, Values c) {
#if FIBECFED_FMA
  Values sum;
  for (size_t i = 0; i < sizeof sum / 4; ++i) sum[i] = __builtin_fmaf(lane(a, i), b[i], c[i]);
  return sum;
#else
  return a * b + c;
#endif
}

template <class Values>
FIBECFED_INLINE Values root(Values x) {
  Values roots;
  for (size_t i = 0; i < sizeof roots / 4; ++i) roots[i] = __builtin_sqrtf(x[i]);
  return roots;
}

// The gradient as the step sees it.
template <bool scaled, class Constants, class Values>
FIBECFED_INLINE Values scale(const Constants& c, Values g) {
  if constexpr (scaled) return g * c.grad_scale;
  return g;
}

template <bool scaled>
struct AdamWStep {
  template <int width>
  FIBECFED_INLINE void take(const AdamW& c, float* p, const float* g, float* m, float* v) {
    const auto slope = scale<scaled>(c, at<width>(g)), before = at<width>(m);
    // torch's lerp starts from the nearer end
    const auto moment = multiply_add(c.lerp_weight, slope - before, c.lerp_from_grad ? slope : before);
    const auto square = multiply_add(c.one_minus_beta2 * slope, slope, at<width>(v) * c.beta2);
    const auto denominator = root(square) / c.sqrt_correction2 + c.eps;
    at<width>(p) = at<width>(p) * c.decay + (c.minus_step_size * moment) / denominator;
    at<width>(m) = moment;
    at<width>(v) = square;
  }
};

template <bool decay, bool scaled, bool first, bool nesterov>
struct MomentumStep {
  template <int width>
  FIBECFED_INLINE void take(const Sgd& c, float* p, const float* g, float* b) {
    const auto value = at<width>(p), slope = scale<scaled>(c, at<width>(g));
    const auto change = decay ? multiply_add(c.weight_decay, value, slope) : slope;
    const auto buffer = first ? change : multiply_add(c.one_minus_dampening, change, at<width>(b) * c.momentum);
    at<width>(p) = multiply_add(c.minus_lr, nesterov ? multiply_add(c.momentum, buffer, change) : buffer, value);
    at<width>(b) = buffer;
  }
};

template <bool decay, bool scaled>
struct PlainStep {
  template <int width>
  FIBECFED_INLINE void take(const Sgd& c, float* p, const float* g) {
    const auto value = at<width>(p), slope = scale<scaled>(c, at<width>(g));
    at<width>(p) = multiply_add(c.minus_lr, decay ? multiply_add(c.weight_decay, value, slope) : slope, value);
  }
};

// Rows of a LoRA B are as short as the rank: a run shorter than a wide register must not fall back to single values.
template <class Step, class Constants, class... Buffers>
FIBECFED_INLINE void for_values(int64_t count, const Constants& c, Buffers... buffers) {
  int64_t i = 0;
  for (; i + FIBECFED_LANES <= count; i += FIBECFED_LANES) Step::template take<FIBECFED_LANES>(c, buffers + i...);
#if FIBECFED_LANES > 8
  for (; i + 8 <= count; i += 8) Step::template take<8>(c, buffers + i...);
#endif
#if FIBECFED_LANES > 4
  for (; i + 4 <= count; i += 4) Step::template take<4>(c, buffers + i...);
#endif
  for (; i < count; ++i) Step::template take<1>(c, buffers + i...);
}

// kCount: the values of each of the runs, where the compiler may know it; 0: any.
template <class Step, int kCount, class Constants, class... Buffers>
FIBECFED_INLINE void for_runs(const Runs& runs, const Constants& shared, Buffers... buffers) {
  const Constants c = shared;  // a copy that no store to the buffers can change
  constexpr int64_t kAhead = 12;
  for (int64_t i = 0; i < runs.n; ++i) {
    if (kCount && i + kAhead < runs.n) (__builtin_prefetch(buffers + runs.offsets[i + kAhead]), ...);
    for_values<Step>(kCount ? kCount : runs.count, c, buffers + runs.offsets[i]...);
  }
}

template <bool scaled>
static void adamw_runs_of(const Runs& runs, const AdamW& c, float* p, const float* g, float* m, float* v) {
  using Step = AdamWStep<scaled>;
  switch (runs.count) {
    case 4: return for_runs<Step, 4>(runs, c, p, g, m, v);
    case 8: return for_runs<Step, 8>(runs, c, p, g, m, v);
    case 16: return for_runs<Step, 16>(runs, c, p, g, m, v);
    default: return for_runs<Step, 0>(runs, c, p, g, m, v);
  }
}

static void adamw_runs(const Runs& runs, const AdamW& c, float* p, const float* g, float* m, float* v) {
  return c.scaled ? adamw_runs_of<true>(runs, c, p, g, m, v) : adamw_runs_of<false>(runs, c, p, g, m, v);
}

template <bool decay, bool scaled>
static void sgd_runs_of(const Runs& runs, const Sgd& c, float* p, const float* g, float* b) {
  if (!c.has_momentum) return for_runs<PlainStep<decay, scaled>, 0>(runs, c, p, g);
  const bool first = runs.step == 1;
  if (c.nesterov) {
    return first ? for_runs<MomentumStep<decay, scaled, true, true>, 0>(runs, c, p, g, b)
                 : for_runs<MomentumStep<decay, scaled, false, true>, 0>(runs, c, p, g, b);
  }
  return first ? for_runs<MomentumStep<decay, scaled, true, false>, 0>(runs, c, p, g, b)
               : for_runs<MomentumStep<decay, scaled, false, false>, 0>(runs, c, p, g, b);
}

static void sgd_runs(const Runs& runs, const Sgd& c, float* p, const float* g, float* b) {
  if (c.weight_decay != 0.0f) {
    return c.scaled ? sgd_runs_of<true, true>(runs, c, p, g, b) : sgd_runs_of<true, false>(runs, c, p, g, b);
  }
  return c.scaled ? sgd_runs_of<false, true>(runs, c, p, g, b) : sgd_runs_of<false, false>(runs, c, p, g, b);
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
