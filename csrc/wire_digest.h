// The digest of one payload, taken piece by piece: its CRC32C, and whether a float in it is infinite, NaN, or a scale
// so large that its multiples could be infinite.
#pragma once

#include <algorithm>
#include <cstdint>

#include "wire_convert.h"
#include "wire_crc.h"

namespace wire {

inline constexpr int64_t kDigestChunk = 6 << 10;  // stays in the first cache between the checksum and the search

inline int64_t item_bytes(int64_t kind) { return kind == 0 ? 1 : kind == 1 || kind == 4 ? 4 : 2; }

// kind: 1 float32, 2 bfloat16, 3 float16, 4 scales (float32, below 2^121, so that 128 of them are finite), 0 no floats.
inline bool not_finite(const uint8_t* p, int64_t bytes, int64_t kind) {
  switch (kind) {
    case 1: return any_at_least(reinterpret_cast<const uint32_t*>(p), bytes / 4, 0x7F800000);
    case 2: return any_at_least(reinterpret_cast<const uint16_t*>(p), bytes / 2, uint16_t{0x7F80});
    case 3: return any_at_least(reinterpret_cast<const uint16_t*>(p), bytes / 2, uint16_t{0x7C00});
    case 4: return any_at_least(reinterpret_cast<const uint32_t*>(p), bytes / 4, 0x7C000000);
    default: return false;
  }
}

class Digest {
 public:
  Digest(const uint8_t* start, int64_t kind, Update update) : at_(start), kind_(kind), update_(update) {}

  // Whole chunks of what lies before `end`; more of the payload is to come.
  void advance(const uint8_t* end) {
    while (end - at_ >= kDigestChunk) take(kDigestChunk);
  }
  void finish(const uint8_t* end) {
    advance(end);
    if (at_ < end) take(end - at_);
  }
  uint32_t crc() const { return ~crc_; }
  bool found() const { return found_; }

 private:
  void take(int64_t bytes) {
    crc_ = update_(crc_, at_, static_cast<size_t>(bytes));
    found_ = found_ || not_finite(at_, bytes, kind_);
    at_ += bytes;
  }

  const uint8_t* at_;
  int64_t kind_;
  Update update_;
  uint32_t crc_ = 0xFFFFFFFF;
  bool found_ = false;
};

}  // namespace wire
