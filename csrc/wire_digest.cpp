// CPU body of wire_digest: CRC32C, and the search for inf and NaN, of parts of a message in one pass through memory.
#include <algorithm>
#include <cstdint>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "wire_checks.h"
#include "wire_digest.h"
#include "wire_digest.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using wire::kBytesPerThread;

Tensor wire_digest(const Tensor& buffer, const Tensor& ranges) {
  wire::check_flat("buffer", buffer, ScalarType::Byte);
  const auto* bytes = static_cast<const uint8_t*>(buffer.data_ptr());
  const int64_t size = buffer.numel();
  const wire::Range* const in = wire::check_ranges(ranges, bytes, size);
  const int64_t count = ranges.size(0);
  Tensor result = torch::stable::new_empty(ranges, {count, 2});
  auto* out = static_cast<int64_t*>(result.data_ptr());
  const wire::Update update = wire::best_update();
  const auto body = [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      wire::Digest digest(bytes + in[i].start, in[i].kind, update);
      digest.finish(bytes + in[i].stop);
      out[2 * i] = digest.crc();
      out[2 * i + 1] = digest.found();
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
