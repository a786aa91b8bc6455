// CPU body of wire_digest: CRC32C, and the search for inf and NaN, of parts of a message in one pass through memory.
#include "wire_payloads.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor wire_digest(const Tensor& buffer, const Tensor& ranges) {
  wire::check_flat("buffer", buffer, ScalarType::Byte);
  const auto* bytes = static_cast<const uint8_t*>(buffer.data_ptr());
  const int64_t count = ranges.size(0);
  const wire::Range* const in = wire::check_ranges(ranges, bytes, buffer.numel());
  Tensor result = torch::stable::new_empty(ranges, {count, 2});
  auto* out = static_cast<int64_t*>(result.data_ptr());
  for (const auto& [crc, not_finite] : wire::digests(bytes, in, count, buffer.numel())) {
    *out++ = crc;
    *out++ = not_finite;
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fibecfed, CPU, m) { m.impl("wire_digest", TORCH_BOX(&wire_digest)); }
