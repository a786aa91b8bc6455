// The payloads of a message: where they are, and their digests, many at a time.
#pragma once

#include <cstdint>
#include <vector>

#include "common.h"
#include "wire_checks.h"
#include "wire_digest.h"

namespace wire {

// Bytes [start, stop), and what floats they are (search_of in wire_pass.h).
struct Range {
  int64_t start, stop, kind;
};

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

struct Found {
  uint32_t crc;
  bool not_finite;
};

// Of each range, on several threads; `size`: bytes of all.
inline std::vector<Found> digests(const uint8_t* bytes, const Range* ranges, int64_t count, int64_t size) {
  std::vector<Found> found(count);
  const Pass pass = best_pass();
  fibecfed::parallel_tasks(count, size, [&](const auto& next) {
    for (int64_t i = next(); i >= 0; i = next()) {
      Digest digest(bytes + ranges[i].start, ranges[i].kind, pass);
      digest.finish(bytes + ranges[i].stop);
      found[i] = {digest.crc(), digest.found()};
    }
  });
  return found;
}

}  // namespace wire
