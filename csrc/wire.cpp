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

// body(piece, add) for every piece; add(to) adds it of all messages, one after the other, to to[0], to[1], … All
// messages of a piece before the next piece, so that its sums stay in the first cache meanwhile.
template <class Body>
void for_pieces_of_all(
    int64_t numel, const std::vector<Tensor>& values, const std::vector<Tensor>& scales, const Tensor& table,
    const std::vector<double>& weights, const Body& body) {
  const size_t messages = values.size();
  STD_TORCH_CHECK(
      scales.size() == messages && weights.size() == messages, "values, scales, weights: wanted one a message");
  if (messages == 0) return;
  const ScalarType dtype = values[0].scalar_type();
  Values of{};
  for (size_t i = 0; i < messages; ++i) {
    STD_TORCH_CHECK(values[i].scalar_type() == dtype, "values: wanted one dtype");
    of = check(table, values[i], scales[i], numel);
  }
  wire::visit_codec(dtype, values[0].data_ptr(), scales[0].data_ptr(), [&](const auto first) {
    std::vector codecs{first};
    for (size_t i = 1; i < messages; ++i) codecs.push_back(first.with(values[i].data_ptr(), scales[i].data_ptr()));
    wire::for_lines(of.lines, of.count, static_cast<int64_t>(messages) * of.bytes, [&](const Line& l) {
      wire::for_pieces(first, l, [&](const Line& piece) {
        body(piece, [&](double* to) {
          for (size_t i = 0; i < messages; ++i) {
            codecs[i].add(piece, to, weights[i], codecs[std::min(i + 1, messages - 1)]);
          }
        });
      });
    });
  });
}

void wire_accumulate_(
    Tensor sum, std::vector<Tensor> values, std::vector<Tensor> scales, const Tensor& table,
    std::vector<double> weights) {
  wire::check_flat("sum", sum, ScalarType::Double);
  auto* const s = static_cast<double*>(sum.data_ptr());
  for_pieces_of_all(sum.numel(), values, scales, table, weights, [=](const Line& piece, const auto& add) {
    add(s + piece.data);
  });
}

// The same sums, which are divided and rounded where they are: they never go to memory.
void wire_mean_(
    Tensor mean, const Tensor& sum, std::vector<Tensor> values, std::vector<Tensor> scales, const Tensor& table,
    std::vector<double> weights, double total) {
  wire::check_flat("mean", mean, ScalarType::Float);
  wire::check_flat("sum", sum, ScalarType::Double);
  STD_TORCH_CHECK(sum.numel() == 0 || sum.numel() == mean.numel(), "sum: wanted none, or one a value of mean");
  const auto* const start = sum.numel() == 0 ? nullptr : static_cast<const double*>(sum.data_ptr());
  auto* const m = static_cast<float*>(mean.data_ptr());
  for_pieces_of_all(mean.numel(), values, scales, table, weights, [=](const Line& piece, const auto& add) {
    static thread_local std::vector<double> sums;  // a piece can be a row of any length
    sums.assign(piece.numel(), 0.0);
    if (start != nullptr) std::copy_n(start + piece.data, piece.numel(), sums.data());
    add(sums.data());
    wire::divide(sums.data(), m + piece.data, piece.numel(), total);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fibecfed, CPU, m) {
  m.impl("wire_pack_", TORCH_BOX(&wire_pack_));
  m.impl("wire_unpack_", TORCH_BOX(&wire_unpack_));
  m.impl("wire_accumulate_", TORCH_BOX(&wire_accumulate_));
  m.impl("wire_mean_", TORCH_BOX(&wire_mean_));
}
