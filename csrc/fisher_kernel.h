// Included by for_each_isa.h once for each instruction set. Products and squares of one task of fisher.cpp.

// Accumulators of a register tile: kRows x kVectors registers, as many as leave room for the operands.
constexpr int kRows = FIBECFED_LANES == 16 ? 8 : 4;
constexpr int kVectors = 3;
constexpr int kLanes = FIBECFED_LANES;

typedef float Vector __attribute__((vector_size(4 * FIBECFED_LANES)));
typedef float Unaligned __attribute__((vector_size(4 * FIBECFED_LANES), aligned(4), may_alias));

static inline __attribute__((always_inline)) Vector multiply_add(float a, Vector b, Vector c) {
#if FIBECFED_LANES == 16
  return _mm512_fmadd_ps(_mm512_set1_ps(a), b, c);
#elif FIBECFED_LANES == 8
  return _mm256_fmadd_ps(_mm256_set1_ps(a), b, c);
#else
  return a * b + c;
#endif
}

// product (kRows x kVectors registers, row stride kStrip) = or += thin[t, row] * wide[t, column] summed over the tokens.
template <int rows, int vectors>
static void register_tile(
    int64_t tokens, const float* thin, int64_t thin_stride, const float* wide, int64_t wide_stride, float* product, bool first) {
  Vector sum[rows][vectors] = {};
  for (int64_t t = 0; t < tokens; ++t) {
    Vector w[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) w[v] = *reinterpret_cast<const Unaligned*>(wide + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[i][v] = multiply_add(thin[i], w[v], sum[i][v]);
    }
    thin += thin_stride;
    wide += wide_stride;
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      Unaligned* out = reinterpret_cast<Unaligned*>(product + i * kStrip + v * kLanes);
      *out = first ? sum[i][v] : *out + sum[i][v];
    }
  }
}

typedef void (*RegisterTile)(int64_t, const float*, int64_t, const float*, int64_t, float*, bool);

template <int vectors>
static inline RegisterTile tile_of_rows(int rows) {
  switch (rows) {
    case 1: return register_tile<1, vectors>;
    case 2: return register_tile<2, vectors>;
    case 3: return register_tile<3, vectors>;
    case 4: return register_tile<4, vectors>;
#if FIBECFED_LANES == 16
    case 5: return register_tile<5, vectors>;
    case 6: return register_tile<6, vectors>;
    case 7: return register_tile<7, vectors>;
    default: return register_tile<8, vectors>;
#else
    default: return register_tile<4, vectors>;
#endif
  }
}

static inline RegisterTile tile_of(int rows, int vectors) {
  return vectors == 1 ? tile_of_rows<1>(rows) : vectors == 2 ? tile_of_rows<2>(rows) : tile_of_rows<3>(rows);
}

static inline float half_to_float(uint16_t half) {
  // Exponent and mantissa moved into place and scaled by 2^112: right for subnormals too. Infinity and NaN keep theirs.
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fff) << 13;
  const float scaled = __builtin_bit_cast(float, magnitude) * 0x1p112f;
  const uint32_t bits = magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : __builtin_bit_cast(uint32_t, scaled);
  return __builtin_bit_cast(float, sign | bits);
}

static void load_row(const Operand& from, int64_t element, int64_t count, float* to) {
  if (from.dtype == Dtype::float32) {
    const float* source = static_cast<const float*>(from.data) + element;
    for (int64_t j = 0; j < count; ++j) to[j] = source[j];
  } else if (from.dtype == Dtype::bfloat16) {
    const uint16_t* source = static_cast<const uint16_t*>(from.data) + element;
    for (int64_t j = 0; j < count; ++j) to[j] = __builtin_bit_cast(float, static_cast<uint32_t>(source[j]) << 16);
  } else {
    const uint16_t* source = static_cast<const uint16_t*>(from.data) + element;
    int64_t j = 0;
#if FIBECFED_FMA
    for (; j + 8 <= count; j += 8) {
      const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + j));
      _mm256_storeu_ps(to + j, _mm256_cvtph_ps(halves));
    }
#endif
    for (; j < count; ++j) to[j] = half_to_float(source[j]);
  }
}

// tokens x count values from column on, as float32, copied into scratch (row stride `width`, rest zero) unless they can
// be read in place.
static const float* load(
    const Operand& from, int64_t token, int64_t tokens, int64_t column, int64_t count, int64_t width, bool in_place,
    float* scratch, int64_t* stride) {
  const int64_t element = token * from.features + column;
  if (in_place && from.dtype == Dtype::float32) {
    *stride = from.features;
    return static_cast<const float*>(from.data) + element;
  }
  for (int64_t t = 0; t < tokens; ++t) {
    load_row(from, element + t * from.features, count, scratch + t * width);
    for (int64_t j = count; j < width; ++j) scratch[t * width + j] = 0.0f;
  }
  *stride = width;
  return scratch;
}

// product (rows, kStrip) = the gradient of the sample of tokens [begin, end), restricted to the task's rows and columns.
static void sample_product(const Task& task, int64_t begin, int64_t end, const Scratch& scratch) {
  constexpr int64_t tile_width = kVectors * kLanes;
  for (int64_t token = begin; token < end; token += kChunk) {
    const int64_t tokens = end - token < kChunk ? end - token : kChunk;
    int64_t thin_stride = 0;
    const float* thin = load(task.thin, token, tokens, task.row, task.rows, task.rows, true, scratch.thin, &thin_stride);
    for (int64_t column = 0; column < task.columns; column += tile_width) {
      const int64_t left = task.columns - column;
      const int64_t count = left < tile_width ? left : tile_width;
      const int64_t width = (count + kLanes - 1) / kLanes * kLanes;
      const bool in_place = width == count && task.rows <= kRows;
      int64_t wide_stride = 0;
      const float* wide =
          load(task.wide, token, tokens, task.column + column, count, width, in_place, scratch.wide, &wide_stride);
      for (int64_t row = 0; row < task.rows; row += kRows) {
        const int rows = task.rows - row < kRows ? static_cast<int>(task.rows - row) : kRows;
        tile_of(rows, static_cast<int>(width / kLanes))(
            tokens, thin + row, thin_stride, wide, wide_stride, scratch.product + row * kStrip + column, token == begin);
      }
    }
  }
}

// diag += product squared, weight_grad += product; returns the sum of the squares, added in an order of its own.
static double add_squares(int64_t rows, int64_t columns, const float* product, float* diag, float* weight_grad) {
  double total = 0.0;
  for (int64_t i = 0; i < rows; ++i) {
    const float* p = product + i * kStrip;
    float* d = diag + i * kStrip;
    float lanes[16] = {};
    int64_t j = 0;
    for (; j + 16 <= columns; j += 16) {
      for (int l = 0; l < 16; ++l) {
        const float square = p[j + l] * p[j + l];
        lanes[l] += square;
        d[j + l] += square;
      }
    }
    for (; j < columns; ++j) {
      const float square = p[j] * p[j];
      lanes[0] += square;
      d[j] += square;
    }
    for (int l = 0; l < 16; ++l) total += lanes[l];
    if (weight_grad != nullptr) {
      for (j = 0; j < columns; ++j) weight_grad[i * kStrip + j] += p[j];
    }
  }
  return total;
}

// Every sample of the task: its score's share into scores[n], diag and weight_grad into the scratch.
static void run_task(const Task& task, const int64_t* bounds, double* scores, int64_t scores_stride, const Scratch& scratch) {
  for (int64_t i = 0; i < task.rows * kStrip; ++i) scratch.diag[i] = 0.0f;
  if (scratch.weight_grad != nullptr) {
    for (int64_t i = 0; i < task.rows * kStrip; ++i) scratch.weight_grad[i] = 0.0f;
  }
  for (int64_t n = task.first_sample; n < task.last_sample; ++n) {
    double score = 0.0;
    if (bounds[n] < bounds[n + 1]) {
      sample_product(task, bounds[n], bounds[n + 1], scratch);
      score = add_squares(task.rows, task.columns, scratch.product, scratch.diag, scratch.weight_grad);
    }
    scores[n * scores_stride] = score;
  }
}
