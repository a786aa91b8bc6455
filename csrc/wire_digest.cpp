// CPU body of wire_digest: CRC32C, and the search for inf and NaN, of parts of a message in one pass through memory.
#include <algorithm>
#include <cstdint>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "wire_checks.h"
#include "wire_convert.h"
#include "wire_crc.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using wire::check_flat;
using wire::kBytesPerThread;

constexpr int64_t kDigestChunk = 6 << 10;  // stays in the first cache between the checksum and the search

bool not_finite(const uint8_t* p, int64_t bytes, int64_t kind) {
  switch (kind) {
    case 1: return wire::any_not_finite(reinterpret_cast<const uint32_t*>(p), bytes / 4, 0x7F800000);
    case 2: return wire::any_not_finite(reinterpret_cast<const uint16_t*>(p), bytes / 2, uint16_t{0x7F80});
    case 3: return wire::any_not_finite(reinterpret_cast<const uint16_t*>(p), bytes / 2, uint16_t{0x7C00});
    default: return false;
  }
}

Tensor wire_digest(const Tensor& buffer, const Tensor& ranges) {
  check_flat("buffer", buffer, ScalarType::Byte);
  check_flat("ranges", ranges, ScalarType::Long);
  STD_TORCH_CHECK(ranges.dim() == 2 && ranges.size(1) == 3, "ranges: wanted (n, 3)");
  const int64_t count = ranges.size(0), size = buffer.numel();
  Tensor result = torch::stable::new_empty(ranges, {count, 2});
  const auto* bytes = static_cast<const uint8_t*>(buffer.data_ptr());
  const auto* in = static_cast<const int64_t*>(ranges.data_ptr());
  auto* out = static_cast<int64_t*>(result.data_ptr());
  for (int64_t i = 0; i < count; ++i) {
    const int64_t start = in[3 * i], stop = in[3 * i + 1], kind = in[3 * i + 2];
    const int64_t item = kind == 0 ? 1 : kind == 1 ? 4 : 2;
    STD_TORCH_CHECK(
        0 <= start && start <= stop && stop <= size && 0 <= kind && kind <= 3, "ranges: line ", i, " is wrong");
    STD_TORCH_CHECK(
        reinterpret_cast<uintptr_t>(bytes + start) % item == 0 && (stop - start) % item == 0,
        "ranges: line ", i, " is not aligned");
  }
  const wire::Update update = wire::best_update();
  const auto body = [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t stop = in[3 * i + 1];
      uint32_t crc = 0xFFFFFFFF;
      bool found = false;
      for (int64_t at = in[3 * i]; at < stop; at += kDigestChunk) {
        const int64_t n = std::min(kDigestChunk, stop - at);
        crc = update(crc, bytes + at, n);
        found = found || not_finite(bytes + at, n, in[3 * i + 2]);
      }
      out[2 * i] = static_cast<uint32_t>(~crc);
      out[2 * i + 1] = found;
    }
  };
  if (size < 2 * kBytesPerThread)
    body(0, count);
  else
    torch::stable::parallel_for(0, count, std::max<int64_t>(1, count * kBytesPerThread / size), body);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fibecfed, CPU, m) { m.impl("wire_digest", TORCH_BOX(&wire_digest)); }
