// The digest of one payload, taken piece by piece: its CRC32C, and whether a float in it is infinite, NaN, or a scale
// so large that its multiples could be infinite.
#pragma once

#include <cstdint>

#include "wire_pass.h"

namespace wire {

inline int64_t item_bytes(int64_t kind) { return kind == 0 ? 1 : kind == 1 || kind == 4 ? 4 : 2; }

class Digest {
 public:
  // kind: of search_of.
  Digest(const uint8_t* start, int64_t kind, Pass pass) : at_(start), search_(search_of(kind)), pass_(pass) {}

  // What lies before `end`, if it is enough to be worth a pass; more of the payload is to come.
  void advance(const uint8_t* end) {
    if (end - at_ >= kWorthwhile) finish(end);
  }
  // Bytes that are the next of the payload once they are copied to `to`.
  void copy(const uint8_t* from, uint8_t* to, int64_t bytes) {
    seen_ = pass_(seen_, from, to, static_cast<size_t>(bytes), search_);
    at_ = to + bytes;
  }
  void finish(const uint8_t* end) {
    if (end > at_) seen_ = pass_(seen_, at_, nullptr, static_cast<size_t>(end - at_), search_);
    at_ = end;
  }
  uint32_t crc() const { return ~seen_.crc; }
  bool found() const { return (seen_.found & search_.sign) != 0; }

 private:
  static constexpr int64_t kWorthwhile = 6 << 10;

  const uint8_t* at_;
  Search search_;
  Pass pass_;
  Seen seen_;
};

}  // namespace wire
