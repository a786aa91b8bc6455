// Included by fisher_kernel.h, once for each instruction set. A product kept in registers while the tokens pass by.

// Accumulators of a register tile: kRows x kVectors registers, as many as leave room for the operands.
constexpr int kRows = FIBECFED_LANES == 16 ? 8 : 4;
constexpr int kVectors = FIBECFED_LANES == 16 ? 2 : 3;
constexpr int kLanes = FIBECFED_LANES;

// The part of the wide operand that the next chunk of tokens will read, fetched into the second-level cache, in the
// order in which it lies in memory, while this chunk is computed. Rows of a strip lie too far apart for the processor
// to foresee, and fetching into the first level can only keep a few lines on their way.
struct Ahead {
  const char *at, *row;
  int64_t left, row_bytes, stride, rows;
  int64_t times;  // as many bytes for each one read, since the next chunk may be longer; 0: nothing is to be fetched
};

static inline __attribute__((always_inline)) void fetch(Ahead& ahead, int bytes) {
  for (int64_t k = ahead.times; k > 0; --k) {
#pragma GCC unroll 8
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(ahead.at + i, 0, 2);
    ahead.at += bytes;
    ahead.left -= bytes;
    if (ahead.left > 0) continue;
    ahead.row += ahead.stride;
    ahead.at = ahead.row;
    ahead.left = ahead.row_bytes;
    if (--ahead.rows == 0) {
      ahead.times = 0;
      break;
    }
  }
}

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

static inline __attribute__((always_inline)) Vector read(const float* from) {
  return *reinterpret_cast<const Unaligned*>(from);
}

#if FIBECFED_FMA
struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

#if FIBECFED_LANES == 16
static inline __attribute__((always_inline)) Vector read(const Bfloat16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

static inline __attribute__((always_inline)) Vector read(const Float16* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
#else
static inline __attribute__((always_inline)) Vector read(const Bfloat16* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

static inline __attribute__((always_inline)) Vector read(const Float16* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
#endif
#endif

typedef double Doubles __attribute__((vector_size(8 * FIBECFED_LANES)));
typedef int32_t Lanes __attribute__((vector_size(4 * FIBECFED_LANES)));

// The first `count` lanes, zero in the others.
static inline __attribute__((always_inline)) Vector lanes_below(int64_t count, Vector value) {
  Lanes lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < static_cast<int32_t>(count) ? value : Vector{};
}

// What becomes of a tile's sums over a chunk of a sample's tokens: they are added up in `product`; at the last chunk,
// diag += product squared, weight_grad (if it is there) += weight * product, squares += the squares.
struct Sums {
  float *product, *diag, *weight_grad;  // of the tile's first row and column
  int64_t stride;                       // of their rows
  int64_t columns;                      // of the tile: behind them all is zero, or NaN where thin is infinite
  float weight;
  Doubles* squares;
  bool first, last;
};

template <int rows, int vectors>
static inline __attribute__((always_inline)) void finish(const Vector (&sum)[rows][vectors], const Sums& sums) {
  const Sums to = sums;  // of its own, so that what is written cannot change it
  Vector squares = {};
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      const int64_t at = i * to.stride + v * kLanes;
      const auto place = [at](float* of) -> Unaligned& { return *reinterpret_cast<Unaligned*>(of + at); };
      const Vector value = to.first ? sum[i][v] : place(to.product) + sum[i][v];
      if (to.last) {
        const Vector square = value * value;
        squares += v + 1 < vectors ? square : lanes_below(to.columns - v * kLanes, square);
        place(to.diag) += square;
        if (to.weight_grad != nullptr) place(to.weight_grad) += to.weight * value;
      } else {
        place(to.product) = value;
      }
    }
  }
  if (to.last) *to.squares += __builtin_convertvector(squares, Doubles);
}

// sums (kRows x kVectors registers) of thin[t, row] * wide[t, column] over the tokens.
template <class Element, int rows, int vectors>
static void register_tile(
    int64_t tokens, const float* thin, int64_t thin_stride, const void* first_wide, int64_t wide_stride,
    const Sums& sums, Ahead* next) {
  const Element* wide = static_cast<const Element*>(first_wide);
  Vector sum[rows][vectors] = {};
  Ahead ahead = *next;
  for (int64_t t = 0; t < tokens; ++t) {
    Vector w[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) w[v] = read(wide + v * kLanes);
    fetch(ahead, vectors * kLanes * static_cast<int>(sizeof(Element)));
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[i][v] = multiply_add(thin[i], w[v], sum[i][v]);
    }
    thin += thin_stride;
    wide += wide_stride;
  }
  *next = ahead;
  finish(sum, sums);
}

typedef void (*RegisterTile)(int64_t, const float*, int64_t, const void*, int64_t, const Sums&, Ahead*);

template <class Element>
struct Values {
  template <int rows, int vectors>
  static constexpr RegisterTile tile = register_tile<Element, rows, vectors>;
};

// Tile::tile<rows, vectors> for numbers that are known when running.
template <class Tile, int vectors>
static inline RegisterTile tile_of_rows(int rows) {
  switch (rows) {
    case 1: return Tile::template tile<1, vectors>;
    case 2: return Tile::template tile<2, vectors>;
    case 3: return Tile::template tile<3, vectors>;
#if FIBECFED_LANES == 16
    case 4: return Tile::template tile<4, vectors>;
    case 5: return Tile::template tile<5, vectors>;
    case 6: return Tile::template tile<6, vectors>;
    case 7: return Tile::template tile<7, vectors>;
#endif
    default: return Tile::template tile<kRows, vectors>;
  }
}

template <class Tile>
static inline RegisterTile tile_of(int rows, int64_t vectors) {
  return vectors == 1   ? tile_of_rows<Tile, 1>(rows)
         : vectors == 2 ? tile_of_rows<Tile, 2>(rows)
                        : tile_of_rows<Tile, kVectors>(rows);
}

static inline RegisterTile tile_of(Dtype dtype, int rows, int64_t vectors) {
#if FIBECFED_FMA
  if (dtype == Dtype::bfloat16) return tile_of<Values<Bfloat16>>(rows, vectors);
  if (dtype == Dtype::float16) return tile_of<Values<Float16>>(rows, vectors);
#endif
  return tile_of<Values<float>>(rows, vectors);
}
