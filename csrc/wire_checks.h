// Checks that the wire's bodies share: they write and read through raw pointers.
#pragma once

#include <cstdint>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace wire {

inline constexpr int64_t kBytesPerThread = 1 << 20;  // less than this is done sooner than a second thread wakes

inline void check_flat(const char* name, const torch::stable::Tensor& t, torch::headeronly::ScalarType dtype) {
  STD_TORCH_CHECK(t.scalar_type() == dtype && t.is_contiguous(), name, ": wrong dtype or not contiguous");
}

// A payload: bytes [start, stop), and what floats they are (not_finite in wire_digest.h).
struct Range {
  int64_t start, stop, kind;
};

inline int64_t item_bytes(int64_t kind) { return kind == 0 ? 1 : kind == 1 || kind == 4 ? 4 : 2; }

inline const Range* check_ranges(const torch::stable::Tensor& ranges, const uint8_t* bytes, int64_t size) {
  check_flat("ranges", ranges, torch::headeronly::ScalarType::Long);
  STD_TORCH_CHECK(ranges.dim() == 2 && ranges.size(1) == 3, "ranges: wanted (n, 3)");
  const auto* in = static_cast<const Range*>(ranges.data_ptr());
  for (int64_t i = 0; i < ranges.size(0); ++i) {
    const auto [start, stop, kind] = in[i];
    STD_TORCH_CHECK(
        0 <= start && start <= stop && stop <= size && 0 <= kind && kind <= 4, "ranges: line ", i, " is wrong");
    const int64_t item = item_bytes(kind);
    STD_TORCH_CHECK(
        reinterpret_cast<uintptr_t>(bytes + start) % item == 0 && (stop - start) % item == 0, "ranges: line ", i,
        " is not aligned");
  }
  return in;
}

}  // namespace wire
