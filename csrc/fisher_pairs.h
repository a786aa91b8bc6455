// Included by fisher_kernel.h where the processor multiplies pairs of bfloat16 values (VDPBF16PS): two tokens a step,
// products and sums in float32, twice as fast as products of converted values. Subnormal values count as zero.
//
// A pair is a 32-bit word: a value of an even token in its lower half, of the next token in its upper half; behind the
// last token of an odd number there is a zero on both sides, which adds nothing.

typedef uint32_t Word __attribute__((may_alias));

static inline __attribute__((always_inline)) __m512i pairs_of(const uint16_t* even, const uint16_t* odd) {
  const __m512i lower = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even)));
  if (odd == nullptr) return lower;
  const __m512i upper = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd)));
  return _mm512_or_si512(lower, _mm512_slli_epi32(upper, 16));
}

// (tokens + 1) / 2 rows of pairs of `count` columns, row stride `width`, the rest of a row zero.
static void load_pairs(
    const Operand& from, int64_t token, int64_t tokens, int64_t column, int64_t count, int64_t width, float* scratch) {
  Word* to = reinterpret_cast<Word*>(scratch);
  const uint16_t* even = static_cast<const uint16_t*>(from.data) + token * from.features + column;
  for (int64_t t = 0; t < tokens; t += 2, even += 2 * from.features, to += width) {
    const uint16_t* odd = t + 1 < tokens ? even + from.features : nullptr;
    int64_t j = 0;
    for (; j + kLanes <= count; j += kLanes) {
      _mm512_storeu_si512(to + j, pairs_of(even + j, odd == nullptr ? nullptr : odd + j));
    }
    for (; j < count; ++j) to[j] = even[j] | (odd == nullptr ? 0u : static_cast<uint32_t>(odd[j]) << 16);
    for (; j < width; ++j) to[j] = 0;
  }
}

// As register_tile, with thin as pairs; wide as pairs (`packed`), or as it lies in memory.
template <bool packed, int rows, int vectors>
static void pair_tile(
    int64_t tokens, const float* thin, int64_t thin_stride, const void* wide, int64_t wide_stride, const Sums& sums,
    Ahead* next) {
  const Word* pairs = reinterpret_cast<const Word*>(thin);
  const Word* words = static_cast<const Word*>(wide);
  const uint16_t* values = static_cast<const uint16_t*>(wide);
  Vector sum[rows][vectors] = {};
  Ahead ahead = *next;
  for (int64_t t = 0; t < tokens; t += 2) {
    __m512i w[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      if constexpr (packed) {
        w[v] = _mm512_loadu_si512(words + v * kLanes);
      } else {
        w[v] = pairs_of(values + v * kLanes, t + 1 < tokens ? values + wide_stride + v * kLanes : nullptr);
      }
    }
    fetch(ahead, 4 * vectors * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const __m512i pair = _mm512_set1_epi32(static_cast<int>(pairs[i]));
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        sum[i][v] = _mm512_dpbf16_ps(sum[i][v], (__m512bh)w[v], (__m512bh)pair);
      }
    }
    pairs += thin_stride;
    words += wide_stride;
    values += 2 * wide_stride;
  }
  *next = ahead;
  finish(sum, sums);
}

template <bool packed>
struct Pairs {
  template <int rows, int vectors>
  static constexpr RegisterTile tile = pair_tile<packed, rows, vectors>;
};
