// CPU bodies of the wire family. Meaning: kernels/wire/reference.py; the table's columns: kernels/wire/format.py.
#include <algorithm>
#include <cstdint>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "wire_checks.h"
#include "wire_convert.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using wire::check_flat;
using wire::kBytesPerThread;

struct Line {
  int64_t data, value, row, rows, length;
  int64_t numel() const { return rows * length; }
};

// Every line inside [0, numel) of all buffers: the loops below write through raw pointers.
const Line* check_table(const Tensor& table, const Tensor& values, const Tensor& scales, int64_t data_numel) {
  check_flat("table", table, ScalarType::Long);
  check_flat("scales", scales, ScalarType::Float);
  STD_TORCH_CHECK(values.is_contiguous(), "values: not contiguous");
  STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == 5, "table: wanted (lines, 5)");
  const auto* lines = static_cast<const Line*>(table.data_ptr());
  const int64_t rows = values.scalar_type() == ScalarType::Char ? scales.numel() : INT64_MAX;
  const auto fits = [](int64_t start, int64_t n, int64_t size) {
    return start >= 0 && n >= 0 && start <= size && n <= size - start;
  };
  for (int64_t i = 0; i < table.size(0); ++i) {
    const Line& l = lines[i];
    int64_t n = 0;
    STD_TORCH_CHECK(
        !__builtin_mul_overflow(l.rows, l.length, &n) && fits(l.row, l.rows, rows) && l.length >= 0 &&
            fits(l.value, n, values.numel()) && (data_numel < 0 || fits(l.data, n, data_numel)),
        "table: line ", i, " reaches outside the buffers");
  }
  return lines;
}

// body(line) for every line, in threads that have at least kBytesPerThread of float32 each.
template <class Body>
void for_lines(const Line* lines, const Tensor& table, const Tensor& values, const Body& body) {
  const int64_t count = table.size(0), bytes = 4 * values.numel();
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(lines[i]);
  };
  if (bytes < 2 * kBytesPerThread) return range(0, count);
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, count * kBytesPerThread / bytes), range);
}

// visit(kind) with the float kind of a dtype, false for int8.
template <class Visit>
bool visit_float(ScalarType dtype, const Visit& visit) {
  switch (dtype) {
    case ScalarType::Float: visit(wire::Float32{}); return true;
    case ScalarType::BFloat16: visit(wire::BFloat16{}); return true;
    case ScalarType::Half: visit(wire::Float16{}); return true;
    default:
      STD_TORCH_CHECK(dtype == ScalarType::Char, "values: wanted float32, bfloat16, float16 or int8");
      return false;
  }
}

void wire_pack_(const Tensor& data, const Tensor& table, Tensor values, Tensor scales) {
  check_flat("data", data, ScalarType::Float);
  const Line* lines = check_table(table, values, scales, data.numel());
  const auto* x = static_cast<const float*>(data.data_ptr());
  if (visit_float(values.scalar_type(), [&]<class Kind>(Kind kind) {
        auto* w = static_cast<typename Kind::Wire*>(values.data_ptr());
        for_lines(lines, table, values, [=](const Line& l) { wire::encode(x + l.data, w + l.value, l.numel(), kind); });
      }))
    return;
  auto* q = static_cast<int8_t*>(values.data_ptr());
  auto* scale = static_cast<float*>(scales.data_ptr());
  for_lines(lines, table, values, [=](const Line& l) {
    wire::quantize_rows(x + l.data, q + l.value, scale + l.row, l.rows, l.length);
  });
}

void wire_unpack_(const Tensor& values, const Tensor& scales, const Tensor& table, Tensor data) {
  check_flat("data", data, ScalarType::Float);
  const Line* lines = check_table(table, values, scales, data.numel());
  auto* x = static_cast<float*>(data.data_ptr());
  if (visit_float(values.scalar_type(), [&]<class Kind>(Kind kind) {
        const auto* w = static_cast<const typename Kind::Wire*>(values.data_ptr());
        for_lines(lines, table, values, [=](const Line& l) { wire::decode(w + l.value, x + l.data, l.numel(), kind); });
      }))
    return;
  const auto* q = static_cast<const int8_t*>(values.data_ptr());
  const auto* scale = static_cast<const float*>(scales.data_ptr());
  for_lines(lines, table, values, [=](const Line& l) {
    wire::dequantize_rows(q + l.value, scale + l.row, x + l.data, l.rows, l.length);
  });
}

void wire_accumulate_(Tensor sum, const Tensor& values, const Tensor& scales, const Tensor& table, double weight) {
  check_flat("sum", sum, ScalarType::Double);
  STD_TORCH_CHECK(sum.numel() == values.numel(), "sum: ", sum.numel(), " values, wanted ", values.numel());
  const Line* lines = check_table(table, values, scales, -1);
  auto* s = static_cast<double*>(sum.data_ptr());
  if (visit_float(values.scalar_type(), [&]<class Kind>(Kind kind) {
        const auto* w = static_cast<const typename Kind::Wire*>(values.data_ptr());
        for_lines(
            lines, table, values, [=](const Line& l) { wire::add(w + l.value, s + l.value, l.numel(), weight, kind); });
      }))
    return;
  const auto* q = static_cast<const int8_t*>(values.data_ptr());
  const auto* scale = static_cast<const float*>(scales.data_ptr());
  for_lines(lines, table, values, [=](const Line& l) {
    wire::add_rows(q + l.value, scale + l.row, s + l.value, l.rows, l.length, weight);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fibecfed, CPU, m) {
  m.impl("wire_pack_", TORCH_BOX(&wire_pack_));
  m.impl("wire_unpack_", TORCH_BOX(&wire_unpack_));
  m.impl("wire_accumulate_", TORCH_BOX(&wire_accumulate_));
}
