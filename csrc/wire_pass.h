// One pass over bytes: their CRC32C, whether a float among them is infinite or NaN, and a copy of them if it is wanted.
//
// With carry-less products of 512 or 256 bits (x86: VPCLMULQDQ) several registers are folded at a time, as in Gopal et
// al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction" (Intel, 2009), and what is in a
// register is searched and stored meanwhile: all of it takes the time of a copy. Else chunk by chunk.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "wire_convert.h"
#include "wire_crc.h"

namespace wire {

// A float has a magnitude of at least a limit when (bits & mask) + add reaches its sign's place. Several lie side by
// side in 64 bits, and none carries into the next.
struct Search {
  uint64_t mask, add, sign;
};

// kind: 1 float32, 2 bfloat16, 3 float16, 4 scales (float32, below 2^121, so that 128 of them are finite), 0 no floats.
constexpr Search search_of(int64_t kind) {
  constexpr uint64_t k32 = 0x00000001'00000001, k16 = 0x0001'0001'0001'0001;
  switch (kind) {
    case 1: return {0x7FFFFFFF * k32, 0x00800000 * k32, 0x80000000 * k32};
    case 2: return {0x7FFF * k16, 0x0080 * k16, 0x8000 * k16};
    case 3: return {0x7FFF * k16, 0x0400 * k16, 0x8000 * k16};
    case 4: return {0x7FFFFFFF * k32, 0x04000000 * k32, 0x80000000 * k32};
    default: return {};
  }
}

// What passes have seen: the register of the checksum, and the sums of the search, one over the other.
struct Seen {
  uint32_t crc = 0xFFFFFFFF;
  uint64_t found = 0;
};

// Goes on from `seen` over n bytes; to: where the copy goes, or null.
using Pass = Seen (*)(Seen seen, const uint8_t* from, uint8_t* to, size_t n, const Search& search);
using Update = uint32_t (*)(uint32_t crc, const uint8_t* p, size_t n);

WIRE_CLONES inline uint64_t searched(const uint8_t* p, size_t n, const Search& search) {
  uint64_t found = 0;
  size_t i = 0;
  for (; i + 8 <= n; i += 8) found |= (load64(p + i) & search.mask) + search.add;
  uint64_t last = 0;  // zeros are finite
  for (size_t k = 0; i + k < n; ++k) last |= uint64_t{p[i + k]} << 8 * k;
  return found | ((last & search.mask) + search.add);
}

template <Update update>
Seen pass_in_chunks(Seen seen, const uint8_t* from, uint8_t* to, size_t n, const Search& search) {
  constexpr size_t kChunk = 6 << 10;  // stays in the first cache, and is whole streams of update_by_instruction
  for (size_t chunk = 0; n > 0; from += chunk, n -= chunk) {
    chunk = std::min(n, kChunk);
    if (to != nullptr) {
      std::memcpy(to, from, chunk);
      to += chunk;
    }
    seen.crc = update(seen.crc, from, chunk);
    seen.found |= searched(from, chunk, search);
  }
  return seen;
}

#if defined(__x86_64__) && defined(WIRE_CRC_TARGET)
// x^n modulo the polynomial, reflected in 64 bits: bit 63 - d is the coefficient of x^d.
constexpr uint64_t power_of_x(int n) {
  uint32_t power = 0x80000000u;
  for (; n > 0; --n) power = power >> 1 ^ (power & 1 ? 0x82F63B78u : 0u);
  return uint64_t{power} << 32;
}

// The factors that move 128 bits ahead by n bits: of their first and of their second half. A product of reflected
// numbers comes out one place higher, hence the -1.
constexpr uint64_t first_factor(int n) { return power_of_x(n + 64 - 1); }
constexpr uint64_t second_factor(int n) { return power_of_x(n - 1); }

namespace fold256 {
#define WIRE_FOLD_BYTES 32
#define WIRE_FOLD_TARGET __attribute__((target("avx2,pclmul,vpclmulqdq,sse4.2")))
#define WIRE_FOLD_PRODUCT(a, b, halves) (Vector) _mm256_clmulepi64_epi128((__m256i)(a), (__m256i)(b), halves)
#include "wire_fold.h"
}  // namespace fold256

namespace fold512 {
#define WIRE_FOLD_BYTES 64
#define WIRE_FOLD_TARGET __attribute__((target("avx512f,avx512vl,avx512dq,pclmul,vpclmulqdq,sse4.2")))
#define WIRE_FOLD_PRODUCT(a, b, halves) (Vector) _mm512_clmulepi64_epi128((__m512i)(a), (__m512i)(b), halves)
#include "wire_fold.h"
}  // namespace fold512
#endif

// The versions that this processor can run, the fastest first.
inline std::array<Pass, 4> passes() {
  std::array<Pass, 4> found{};
  size_t n = 0;
#if defined(__x86_64__) && defined(WIRE_CRC_TARGET)
  const bool folds = __builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("avx2");
  if (folds && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    found[n++] = fold512::pass;
  if (folds) found[n++] = fold256::pass;
  if (__builtin_cpu_supports("sse4.2")) found[n++] = pass_in_chunks<update_by_instruction>;
#elif defined(WIRE_CRC_TARGET)
  if (getauxval(AT_HWCAP) & HWCAP_CRC32) found[n++] = pass_in_chunks<update_by_instruction>;
#endif
  while (n < found.size()) found[n++] = pass_in_chunks<update_portable>;
  return found;
}

inline Pass best_pass() {
  static const Pass best = passes()[0];
  return best;
}

}  // namespace wire
