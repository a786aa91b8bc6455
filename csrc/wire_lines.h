// Where the values of a message lie (the lines of a table) and how they are written there (a codec a wire dtype).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "common.h"
#include "wire_checks.h"
#include "wire_convert.h"

namespace wire {

// `rows` rows of `length` values: from data[offset of the first value] to values[value], scales[row].
struct Line {
  int64_t data, value, row, rows, length;
  int64_t numel() const { return rows * length; }
};

// A codec knows where a line's values are in a message; with(...): the same in another. kRows: a row (or block) has a
// scale, and must not be divided; kCopies: a value stays as it is. In int4 they begin on a byte: lines start at even
// values.
template <class Kind>
struct Floats {
  static constexpr bool kRows = false, kCopies = std::is_same_v<Kind, Float32>;
  typename Kind::Wire* w;
  Floats with(void* values, void*) const { return {static_cast<typename Kind::Wire*>(values)}; }
  void encode(const float* x, const Line& l) const { wire::encode(x, w + l.value, l.numel(), Kind{}); }
  void decode(const Line& l, float* x) const { wire::decode(w + l.value, x, l.numel(), Kind{}); }
  void add(const Line& l, double* sum, double weight, const Floats& ahead) const {
    wire::add(w + l.value, sum, l.numel(), weight, ahead.w + l.value, Kind{});
  }
  int64_t bytes(int64_t values) const { return values * static_cast<int64_t>(sizeof(typename Kind::Wire)); }
};

struct Int8 {
  static constexpr bool kRows = true, kCopies = false;
  int8_t* q;
  float* scale;
  Int8 with(void* values, void* scales) const { return {static_cast<int8_t*>(values), static_cast<float*>(scales)}; }
  void encode(const float* x, const Line& l) const {
    quantize_rows(x, q + l.value, scale + l.row, l.rows, l.length);
  }
  void decode(const Line& l, float* x) const { dequantize_rows(q + l.value, scale + l.row, x, l.rows, l.length); }
  void add(const Line& l, double* sum, double weight, const Int8&) const {
    add_rows(q + l.value, scale + l.row, sum, l.rows, l.length, weight);
  }
  int64_t bytes(int64_t values) const { return values; }
};

struct Int4 {
  static constexpr bool kRows = true, kCopies = false;
  uint8_t* q;
  float* scale;
  Int4 with(void* values, void* scales) const { return {static_cast<uint8_t*>(values), static_cast<float*>(scales)}; }
  void encode(const float* x, const Line& l) const {
    quantize_blocks(x, q + l.value / 2, scale + l.row, l.rows, l.length);
  }
  void decode(const Line& l, float* x) const {
    dequantize_blocks(q + l.value / 2, scale + l.row, x, l.rows, l.length);
  }
  void add(const Line& l, double* sum, double weight, const Int4&) const {
    add_blocks(q + l.value / 2, scale + l.row, sum, l.rows, l.length, weight);
  }
  int64_t bytes(int64_t values) const { return (values + 1) / 2; }
};

// body(piece) for parts of a line that stay in the first cache.
template <class Codec, class Body>
void for_pieces(const Codec&, const Line& l, const Body& body) {
  constexpr int64_t kValues = 1536;
  const int64_t length = Codec::kRows ? l.length : 1, rows = Codec::kRows ? l.rows : l.numel();
  const int64_t step = std::max<int64_t>(1, kValues / std::max<int64_t>(1, length));
  for (int64_t r = 0; r < rows; r += step)
    body(Line{l.data + r * length, l.value + r * length, l.row + r, std::min(step, rows - r), length});
}

// visit(codec) for values of a wire dtype; int4 comes as bytes.
template <class Visit>
void visit_codec(torch::headeronly::ScalarType dtype, void* values, void* scales, const Visit& visit) {
  using torch::headeronly::ScalarType;
  auto* const scale = static_cast<float*>(scales);
  switch (dtype) {
    case ScalarType::Float: return visit(Floats<Float32>{static_cast<float*>(values)});
    case ScalarType::BFloat16: return visit(Floats<BFloat16>{static_cast<uint16_t*>(values)});
    case ScalarType::Half: return visit(Floats<Float16>{static_cast<uint16_t*>(values)});
    case ScalarType::Char: return visit(Int8{static_cast<int8_t*>(values), scale});
    case ScalarType::Byte: return visit(Int4{static_cast<uint8_t*>(values), scale});
    default: STD_TORCH_CHECK(false, "values: wanted float32, bfloat16, float16, int8, or int4 as bytes");
  }
}

// Every line inside the buffers (in values; `rows` of the scales): the loops write through raw pointers.
inline const Line* check_lines(
    const torch::stable::Tensor& table, torch::headeronly::ScalarType dtype, int64_t values, int64_t rows,
    int64_t data) {
  using torch::headeronly::ScalarType;
  check_flat("table", table, ScalarType::Long);
  STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == 5, "table: wanted (lines, 5)");
  const auto* lines = static_cast<const Line*>(table.data_ptr());
  const bool four = dtype == ScalarType::Byte;
  if (dtype != ScalarType::Char && !four) rows = INT64_MAX;
  const auto fits = [](int64_t start, int64_t n, int64_t size) {
    return start >= 0 && n >= 0 && start <= size && n <= size - start;
  };
  for (int64_t i = 0; i < table.size(0); ++i) {
    const Line& l = lines[i];
    int64_t n = 0;
    STD_TORCH_CHECK(
        !__builtin_mul_overflow(l.rows, l.length, &n) && fits(l.row, l.rows, rows) && l.length >= 0 &&
            fits(l.value, n, values) && fits(l.data, n, data),
        "table: line ", i, " reaches outside the buffers");
    STD_TORCH_CHECK(
        !four || (l.value % 2 == 0 && (l.length == kBlock || (l.rows <= 1 && l.length < kBlock))), "table: line ", i,
        " is not of whole bytes in blocks of ", kBlock, " values");
  }
  return lines;
}

// body(line) for every line, in threads that have at least kBytesPerThread each.
template <class Body>
void for_lines(const Line* lines, int64_t count, int64_t bytes, const Body& body) {
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(lines[i]);
  };
  if (bytes < 2 * kBytesPerThread) return range(0, count);
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, count * kBytesPerThread / bytes), range);
}

}  // namespace wire
