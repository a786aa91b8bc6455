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

// All messages of a piece before the next piece, whose sums stay in the first cache meanwhile.
void wire_accumulate_(
    Tensor sum, std::vector<Tensor> values, std::vector<Tensor> scales, const Tensor& table,
    std::vector<double> weights) {
  wire::check_flat("sum", sum, ScalarType::Double);
  const size_t messages = values.size();
  STD_TORCH_CHECK(
      scales.size() == messages && weights.size() == messages, "values, scales, weights: wanted one a message");
  if (messages == 0) return;
  const ScalarType dtype = values[0].scalar_type();
  Values of{};
  for (size_t i = 0; i < messages; ++i) {
    STD_TORCH_CHECK(values[i].scalar_type() == dtype, "values: wanted one dtype");
    of = check(table, values[i], scales[i], sum.numel());
  }
  auto* const s = static_cast<double*>(sum.data_ptr());
  wire::visit_codec(dtype, values[0].data_ptr(), scales[0].data_ptr(), [&](const auto first) {
    std::vector codecs{first};
    for (size_t i = 1; i < messages; ++i) codecs.push_back(first.with(values[i].data_ptr(), scales[i].data_ptr()));
    wire::for_lines(of.lines, of.count, static_cast<int64_t>(messages) * of.bytes, [&](const Line& l) {
      wire::for_pieces(first, l, [&](const Line& piece) {
        for (size_t i = 0; i < messages; ++i) codecs[i].add(piece, s + piece.data, weights[i]);
      });
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fibecfed, CPU, m) {
  m.impl("wire_pack_", TORCH_BOX(&wire_pack_));
  m.impl("wire_unpack_", TORCH_BOX(&wire_unpack_));
  m.impl("wire_accumulate_", TORCH_BOX(&wire_accumulate_));
}
