// Included by for_each_isa.h once for each instruction set. Products and squares of one task of fisher.cpp.

#include "fisher_tile.h"
#if FIBECFED_BF16
#include "fisher_pairs.h"
#endif

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

// tokens x count values from column on, in scratch: as float32 or as pairs of bfloat16 of two tokens; row stride
// `width`, the rest of a row zero.
static void load(
    bool as_pairs, const Operand& from, int64_t token, int64_t tokens, int64_t column, int64_t count, int64_t width,
    float* scratch) {
#if FIBECFED_BF16
  if (as_pairs) return load_pairs(from, token, tokens, column, count, width, scratch);
#endif
  for (int64_t t = 0; t < tokens; ++t) {
    load_row(from, (token + t) * from.features + column, count, scratch + t * width);
    for (int64_t j = count; j < width; ++j) scratch[t * width + j] = 0.0f;
  }
}

static inline RegisterTile tile_of(bool as_pairs, bool in_place, Dtype dtype, int rows, int64_t vectors) {
#if FIBECFED_BF16
  if (as_pairs) return in_place ? tile_of<Pairs<false>>(rows, vectors) : tile_of<Pairs<true>>(rows, vectors);
#endif
  return tile_of(in_place ? dtype : Dtype::float32, rows, vectors);
}

static const void* address(const Operand& of, int64_t token, int64_t column) {
  const int64_t size = of.dtype == Dtype::float32 ? 4 : 2;
  return static_cast<const char*>(of.data) + (token * of.features + column) * size;
}

// The strip of a task over `tokens` from `token` on, to be fetched while `now` tokens are computed.
static Ahead strip_ahead(const Task& task, int64_t token, int64_t tokens, int64_t now) {
  if (tokens == 0) return {};
  const int64_t size = task.wide.dtype == Dtype::float32 ? 4 : 2, times = (2 * tokens + now) / (2 * now);
  const char* row = static_cast<const char*>(address(task.wide, token, task.column));
  return {row, row, task.columns * size, task.columns * size, task.wide.features * size, tokens, times < 1 ? 1 : times};
}

// The first chunk of a sample.
static Ahead sample_ahead(const Task& task, int64_t sample, const int64_t* bounds, int64_t now) {
  return strip_ahead(task, bounds[sample], chunk_of(bounds[sample + 1] - bounds[sample]), now);
}

// A tile's part of a strip. in_place: read where it lies; else it is converted once into scratch, tile after tile.
struct Column {
  int64_t at, count, vectors, width;
  bool in_place;
};

static inline Column column_of(const Task& task, int64_t at) {
  constexpr int64_t tile_width = kVectors * kLanes;
  const int64_t left = task.columns - at, count = left < tile_width ? left : tile_width;
  const int64_t vectors = (count + kLanes - 1) / kLanes, width = vectors * kLanes;
  const bool readable = FIBECFED_FMA || task.wide.dtype == Dtype::float32;
  return {at, count, vectors, width, count == width && task.rows <= 2 * kRows && readable};
}

// Tokens of the strip for the tiles that do not read it in place, row by row: rows lie pages apart, and going down a
// tile's columns instead costs more than the products.
static void load_strip(bool as_pairs, const Task& task, int64_t token, int64_t tokens, float* scratch) {
  constexpr int64_t tile_width = kVectors * kLanes;
  int64_t first = 0;  // often all are read in place, or all but the last
  while (first < task.columns && column_of(task, first).in_place) first += tile_width;
  const int64_t step = as_pairs ? 2 : 1;
  for (int64_t t = 0; t < tokens && first < task.columns; t += step) {
    for (int64_t at = first; at < task.columns; at += tile_width) {
      const Column c = column_of(task, at);
      float* const to = scratch + at * kChunk + t / step * c.width;
      load(as_pairs, task.wide, token + t, tokens - t < step ? 1 : step, task.column + at, c.count, c.width, to);
    }
  }
}

// Sample n: its gradient P, restricted to the task's rows and columns, chunk by chunk; at the last, diag += P squared
// and weight_grad += weight * P. Returns the sum of the squares, added in an order of its own.
// `following`: the task that comes next, asked for at the last chunk of a task's last sample, unless that is its first:
// nobody should hold two tasks who has hardly begun with one.
static double add_sample(
    const Task& task, int64_t n, const int64_t* bounds, float weight, const Scratch& scratch, Following* following) {
  const int64_t begin = bounds[n], end = bounds[n + 1], chunk = chunk_of(end - begin);
  const bool thin_in_place = task.thin.dtype == Dtype::float32;
  const int64_t thin_stride = thin_in_place ? task.thin.features : task.rows;
  const bool as_pairs = FIBECFED_BF16 && task.wide.dtype == Dtype::bfloat16;
  Doubles squares = {};
  for (int64_t token = begin; token < end; token += chunk) {
    const int64_t left = end - token, tokens = left < chunk ? left : chunk;
    const bool last = tokens == left;
    if (!thin_in_place) load(as_pairs, task.thin, token, tokens, task.row, task.rows, task.rows, scratch.thin);
    const float* thin = thin_in_place ? static_cast<const float*>(address(task.thin, token, task.row)) : scratch.thin;
    Ahead none{}, ahead{};
    if (!last) {
      ahead = strip_ahead(task, token + tokens, left - tokens < chunk ? left - tokens : chunk, tokens);
    } else if (n + 1 < task.last_sample) {
      ahead = sample_ahead(task, n + 1, bounds, tokens);
    } else if (token > bounds[task.first_sample]) {
      const Task* next = following->ask();
      if (next != nullptr) ahead = sample_ahead(*next, next->first_sample, bounds, tokens);
    }
    load_strip(as_pairs, task, token, tokens, scratch.wide);
    for (int64_t at = 0; at < task.columns; at += kVectors * kLanes) {
      const Column c = column_of(task, at);
      const void* wide = c.in_place ? address(task.wide, token, task.column + at) : scratch.wide + at * kChunk;
      for (int64_t row = 0; row < task.rows; row += kRows) {
        const int rows = task.rows - row < kRows ? static_cast<int>(task.rows - row) : kRows;
        const int64_t place = row * kStrip + at;
        const Sums sums{
            scratch.product + place, scratch.diag + place,
            scratch.weight_grad == nullptr ? nullptr : scratch.weight_grad + place,
            kStrip, c.count, weight, &squares, token == begin, last};
        tile_of(as_pairs, c.in_place, task.wide.dtype, rows, c.vectors)(
            tokens, thin + row, thin_stride, wide, c.in_place ? task.wide.features : c.width, sums,
            row == 0 ? &ahead : &none);
      }
    }
  }
  double total = 0.0;
  for (int lane = 0; lane < kLanes; ++lane) total += squares[lane];
  return total;
}

// Every sample of the task: its score's share into scores[n], diag and weight_grad (weights[n] times the sample's, or
// all of it) into the scratch.
static void run_task(
    const Task& task, const int64_t* bounds, const float* weights, double* scores, int64_t scores_stride,
    const Scratch& scratch, Following* following) {
  for (int64_t i = 0; i < task.rows * kStrip; ++i) scratch.diag[i] = 0.0f;
  if (scratch.weight_grad != nullptr) {
    for (int64_t i = 0; i < task.rows * kStrip; ++i) scratch.weight_grad[i] = 0.0f;
  }
  for (int64_t n = task.first_sample; n < task.last_sample; ++n) {
    const float weight = weights == nullptr ? 1.0f : weights[n];
    scores[n * scores_stride] = add_sample(task, n, bounds, weight, scratch, following);
  }
}
