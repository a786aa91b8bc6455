// CPU bodies of the wire family. Meaning: kernels/wire/reference.py; the table's columns: kernels/wire/frame.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "wire_lines.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using wire::Line;

struct Values {
  const Line* lines;
  int64_t count, bytes;  // of lines; of the values as float32
};

Values check(const Tensor& table, const Tensor& values, const Tensor& scales, int64_t data) {
  wire::check_flat("scales", scales, ScalarType::Float);
  STD_TORCH_CHECK(values.is_contiguous(), "values: not contiguous");
  const ScalarType dtype = values.scalar_type();
  const int64_t numel = dtype == ScalarType::Byte ? 2 * values.numel() : values.numel();
  return {wire::check_lines(table, dtype, numel, scales.numel(), data), table.size(0), 4 * numel};
}

void wire_pack_(const Tensor& data, const Tensor& table, Tensor values, Tensor scales) {
  wire::check_flat("data", data, ScalarType::Float);
  const auto [lines, count, bytes] = check(table, values, scales, data.numel());
  const auto* x = static_cast<const float*>(data.data_ptr());
  wire::visit_codec(values.scalar_type(), values.data_ptr(), scales.data_ptr(), [&](auto codec) {
    wire::for_lines(lines, count, bytes, [=](const Line& l) { codec.encode(x + l.data, l); });
  });
}

void wire_unpack_(const Tensor& values, const Tensor& scales, const Tensor& table, Tensor data) {
  wire::check_flat("data", data, ScalarType::Float);
  const auto [lines, count, bytes] = check(table, values, scales, data.numel());
  auto* x = static_cast<float*>(data.data_ptr());
  wire::visit_codec(values.scalar_type(), values.data_ptr(), scales.data_ptr(), [&](auto codec) {
    wire::for_lines(lines, count, bytes, [=](const Line& l) { codec.decode(l, x + l.data); });
  });
}

void wire_accumulate_(Tensor sum, const Tensor& values, const Tensor& scales, const Tensor& table, double weight) {
  wire::check_flat("sum", sum, ScalarType::Double);
  const auto [lines, count, bytes] = check(table, values, scales, sum.numel());
  auto* s = static_cast<double*>(sum.data_ptr());
  wire::visit_codec(values.scalar_type(), values.data_ptr(), scales.data_ptr(), [&](auto codec) {
    wire::for_lines(lines, count, bytes, [=](const Line& l) { codec.add(l, s + l.data, weight); });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fibecfed, CPU, m) {
  m.impl("wire_pack_", TORCH_BOX(&wire_pack_));
  m.impl("wire_unpack_", TORCH_BOX(&wire_unpack_));
  m.impl("wire_accumulate_", TORCH_BOX(&wire_accumulate_));
}
