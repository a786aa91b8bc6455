// Loops over values: float32 to and from the wire's dtypes, and sums in float64.
//
// Integer arithmetic instead of the conversion instructions: the same bits on every processor (equal to torch's .to()),
// and the compiler vectorises it for each clone.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define WIRE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define WIRE_CLONES
#endif

namespace wire {

inline uint32_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }
inline float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }

struct Float32 {
  using Wire = float;
  static float encode(float x) { return x; }
  static float decode(float w) { return w; }
};

struct BFloat16 {
  using Wire = uint16_t;
  static uint16_t encode(float x) {
    const uint32_t b = bits_of(x);
    const uint32_t rounded = b + 0x7FFF + (b >> 16 & 1);  // to nearest, ties to even
    return static_cast<uint16_t>(((b & 0x7FFFFFFF) > 0x7F800000 ? b | 0x400000 : rounded) >> 16);
  }
  static float decode(uint16_t w) { return float_of(uint32_t{w} << 16); }
};

struct Float16 {
  using Wire = uint16_t;
  static uint16_t encode(float x) {
    const uint32_t b = bits_of(x), a = b & 0x7FFFFFFF;
    const uint32_t normal = (a - (112u << 23) + 0xFFF + (a >> 13 & 1)) >> 13;  // may carry up to infinity, as it must
    const uint32_t subnormal = bits_of(float_of(a) + 0.5f) - 0x3F000000;      // the addition rounds at 2^-24
    const uint32_t huge = a > 0x7F800000 ? 0x7E00 : 0x7C00;
    const uint32_t magnitude = a < 0x38800000 ? subnormal : a >= 0x47800000 ? huge : normal;
    return static_cast<uint16_t>(magnitude | (b >> 16 & 0x8000));
  }
  static float decode(uint16_t w) {
    const uint32_t a = (w & 0x7FFFu) << 13, sign = (w & 0x8000u) << 16;
    const uint32_t subnormal = bits_of(float_of(a + (113u << 23)) - float_of(113u << 23));  // exact
    const uint32_t exponent = a >= 0x0F800000 ? 0x7F800000 | a : a + (112u << 23);
    return float_of((a < 0x00800000 ? subnormal : exponent) | sign);
  }
};

template <class Kind>
constexpr size_t kLine = 64 / sizeof(typename Kind::Wire);  // values

#define WIRE_LOOPS(kind)                                                                             \
  WIRE_CLONES inline void encode(const float* x, kind::Wire* w, size_t n, kind) {                    \
    for (size_t i = 0; i < n; ++i) w[i] = kind::encode(x[i]);                                        \
  }                                                                                                  \
  WIRE_CLONES inline void decode(const kind::Wire* w, float* x, size_t n, kind) {                    \
    for (size_t i = 0; i < n; ++i) x[i] = kind::decode(w[i]);                                        \
  }                                                                                                  \
  WIRE_CLONES inline void add(                                                                       \
      const kind::Wire* w, double* sum, size_t n, double weight, const kind::Wire* ahead, kind) {    \
    size_t i = 0;                                                                                    \
    for (; i + kLine<kind> <= n; i += kLine<kind>) {                                                 \
      __builtin_prefetch(ahead + i);                                                                 \
      for (size_t k = i; k < i + kLine<kind>; ++k)                                                   \
        sum[k] += weight * static_cast<double>(kind::decode(w[k]));                                  \
    }                                                                                                \
    for (; i < n; ++i) sum[i] += weight * static_cast<double>(kind::decode(w[i]));                   \
  }
WIRE_LOOPS(Float32)
WIRE_LOOPS(BFloat16)
WIRE_LOOPS(Float16)
#undef WIRE_LOOPS

WIRE_CLONES inline void divide(const double* sum, float* mean, size_t n, double total) {
  for (size_t i = 0; i < n; ++i) mean[i] = static_cast<float>(sum[i] / total);
}

#define WIRE_INLINE __attribute__((always_inline)) inline

// Integers with one scale a row: levels 127 for int8, 7 for int4. Rows whose largest magnitude is below levels · 2^-126
// (the scale would be subnormal) are sent as zeros, scale 0.
template <int kLevels>
WIRE_INLINE void quantize(const float* x, int8_t* q, float* scale, size_t n) {
  uint32_t largest = 0;  // as integers, NaN is above infinity is above every number
  for (size_t i = 0; i < n; ++i) {
    const uint32_t a = bits_of(x[i]) & 0x7FFFFFFF;
    largest = a > largest ? a : largest;
  }
  const float most = float_of(largest);
  const bool zero = most < kLevels * 0x1p-126f;  // false for NaN, which then shows in the scale
  const float inverse = zero ? 0.0f : kLevels / most;
  *scale = zero ? 0.0f : most / kLevels;
  // q = round(x · inverse), ties to even: 1.5 · 2^23 more has the two's complement of q in the low byte.
  for (size_t i = 0; i < n; ++i) q[i] = static_cast<int8_t>(bits_of(x[i] * inverse + 12582912.0f));
}

// int8, row by row. kLength is the row length where the compiler may unroll it, 0 for any other: rows of a LoRA B are as
// short as its rank, and a loop over 8 values costs more than the values.
template <size_t kLength>
WIRE_INLINE void quantize_rows_of(const float* x, int8_t* q, float* scale, size_t rows, size_t length) {
  const size_t n = kLength ? kLength : length;
  for (size_t r = 0; r < rows; ++r, x += n, q += n) quantize<127>(x, q, scale + r, n);
}

template <size_t kLength>
WIRE_INLINE void dequantize_rows_of(const int8_t* q, const float* scale, float* x, size_t rows, size_t length) {
  const size_t n = kLength ? kLength : length;
  for (size_t r = 0; r < rows; ++r, x += n, q += n)
    for (size_t i = 0; i < n; ++i) x[i] = static_cast<float>(q[i]) * scale[r];
}

template <size_t kLength>
WIRE_INLINE void add_rows_of(
    const int8_t* q, const float* scale, double* sum, size_t rows, size_t length, double weight) {
  const size_t n = kLength ? kLength : length;
  for (size_t r = 0; r < rows; ++r, sum += n, q += n)
    for (size_t i = 0; i < n; ++i) sum[i] += weight * static_cast<double>(static_cast<float>(q[i]) * scale[r]);
}

#define WIRE_BY_LENGTH(call, ...)                   \
  switch (length) {                                 \
    case 4: return call<4>(__VA_ARGS__);            \
    case 8: return call<8>(__VA_ARGS__);            \
    case 16: return call<16>(__VA_ARGS__);          \
    default: return call<0>(__VA_ARGS__);           \
  }

WIRE_CLONES inline void quantize_rows(const float* x, int8_t* q, float* scale, size_t rows, size_t length) {
  WIRE_BY_LENGTH(quantize_rows_of, x, q, scale, rows, length)
}

WIRE_CLONES inline void dequantize_rows(const int8_t* q, const float* scale, float* x, size_t rows, size_t length) {
  WIRE_BY_LENGTH(dequantize_rows_of, q, scale, x, rows, length)
}

WIRE_CLONES inline void add_rows(
    const int8_t* q, const float* scale, double* sum, size_t rows, size_t length, double weight) {
  WIRE_BY_LENGTH(add_rows_of, q, scale, sum, rows, length, weight)
}
#undef WIRE_BY_LENGTH

// int4: blocks of 64 values with one scale each, two values a byte, the first in the low half. The last block of a
// tensor may be shorter, and is then alone in its line; where its length is odd the last half byte is 0.
inline constexpr int64_t kBlock = 64;

template <size_t kLength>
WIRE_INLINE void quantize_block(const float* x, uint8_t* w, float* scale, size_t length) {
  const size_t n = kLength ? kLength : length;
  int8_t q[kBlock + 1] = {};
  quantize<7>(x, q, scale, n);
  for (size_t i = 0; i < (n + 1) / 2; ++i) w[i] = static_cast<uint8_t>((q[2 * i] & 15) | q[2 * i + 1] << 4);
}

WIRE_INLINE float low_half(uint8_t w) { return static_cast<float>(static_cast<int8_t>(w << 4) >> 4); }
WIRE_INLINE float high_half(uint8_t w) { return static_cast<float>(static_cast<int8_t>(w) >> 4); }

WIRE_INLINE void dequantize_block(const uint8_t* w, float scale, float* x, size_t n) {
  for (size_t i = 0; i < n / 2; ++i) {
    x[2 * i] = low_half(w[i]) * scale;
    x[2 * i + 1] = high_half(w[i]) * scale;
  }
  if (n % 2) x[n - 1] = low_half(w[n / 2]) * scale;
}

WIRE_CLONES inline void quantize_blocks(const float* x, uint8_t* w, float* scale, int64_t rows, int64_t length) {
  if (length != kBlock) {
    if (rows) quantize_block<0>(x, w, scale, length);
    return;
  }
  for (int64_t r = 0; r < rows; ++r, x += kBlock, w += kBlock / 2) quantize_block<kBlock>(x, w, scale + r, kBlock);
}

WIRE_CLONES inline void dequantize_blocks(
    const uint8_t* w, const float* scale, float* x, int64_t rows, int64_t length) {
  if (length != kBlock) {
    if (rows) dequantize_block(w, *scale, x, length);
    return;
  }
  for (int64_t r = 0; r < rows; ++r, x += kBlock, w += kBlock / 2) dequantize_block(w, scale[r], x, kBlock);
}

WIRE_CLONES inline void add_blocks(
    const uint8_t* w, const float* scale, double* sum, int64_t rows, int64_t length, double weight) {
  float x[kBlock];
  for (int64_t r = 0; r < rows; ++r, sum += length, w += kBlock / 2) {
    if (length == kBlock)
      dequantize_block(w, scale[r], x, kBlock);
    else
      dequantize_block(w, scale[r], x, length);
    for (int64_t i = 0; i < length; ++i) sum[i] += weight * static_cast<double>(x[i]);
  }
}

}  // namespace wire
