// CRC32C (Castagnoli, RFC 3720: reflected polynomial 0x82F63B78, start and final XOR 0xFFFFFFFF).
//
// With the processor's instruction (x86: SSE4.2, ARM: CRC) three independent streams hide its latency of three cycles;
// they are joined by the linear operator "followed by L zero bytes", tabled at compile time. Without it: eight tables,
// eight bytes a step. With carry-less products of 512 bits (x86: VPCLMULQDQ) 256 bytes are folded at a time, as in
// Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction" (Intel, 2009).
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpragmas"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own headers
#include <immintrin.h>
#pragma GCC diagnostic pop
#define WIRE_CRC_TARGET __attribute__((target("sse4.2")))
#define WIRE_CRC_8(crc, bytes) static_cast<uint32_t>(_mm_crc32_u64(crc, bytes))
#define WIRE_CRC_1(crc, byte) _mm_crc32_u8(crc, byte)
#elif defined(__aarch64__) && defined(__linux__) && defined(__GNUC__)
#include <arm_acle.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>
#define WIRE_CRC_TARGET __attribute__((target("+crc")))
#define WIRE_CRC_8(crc, bytes) __crc32cd(crc, bytes)
#define WIRE_CRC_1(crc, byte) __crc32cb(crc, byte)
#endif

namespace wire {

static_assert(std::endian::native == std::endian::little, "the wire format is little-endian and so are these loads");

using Operator = std::array<std::array<uint32_t, 256>, 4>;  // a linear map of 32 bits, tabled by byte

constexpr uint32_t mapped(const Operator& map, uint32_t crc) {
  return map[0][crc & 255] ^ map[1][crc >> 8 & 255] ^ map[2][crc >> 16 & 255] ^ map[3][crc >> 24];
}

constexpr std::array<std::array<uint32_t, 256>, 8> make_tables() {
  std::array<std::array<uint32_t, 256>, 8> tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0x82F63B78u : 0u);
    tables[0][byte] = crc;
  }
  for (int k = 1; k < 8; ++k)
    for (uint32_t byte = 0; byte < 256; ++byte)
      tables[k][byte] = tables[k - 1][byte] >> 8 ^ tables[0][tables[k - 1][byte] & 255];
  return tables;
}
inline constexpr auto kTables = make_tables();

// What a CRC register becomes when 2^log2_bytes zero bytes follow.
constexpr Operator make_zeros(int log2_bytes) {
  Operator map{};
  for (uint32_t j = 0; j < 4; ++j)
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const uint32_t crc = byte << 8 * j;
      map[j][byte] = crc >> 8 ^ kTables[0][crc & 255];
    }
  for (int k = 0; k < log2_bytes; ++k) {
    Operator twice{};
    for (uint32_t j = 0; j < 4; ++j)
      for (uint32_t byte = 0; byte < 256; ++byte) twice[j][byte] = mapped(map, map[j][byte]);
    map = twice;
  }
  return map;
}

inline uint64_t load64(const uint8_t* p) {
  uint64_t value;
  std::memcpy(&value, p, 8);
  return value;
}

inline uint32_t update_portable(uint32_t crc, const uint8_t* p, size_t n) {
  for (; n >= 8; p += 8, n -= 8) {
    const uint64_t x = load64(p) ^ crc;
    crc = 0;
    for (int k = 0; k < 8; ++k) crc ^= kTables[7 - k][x >> 8 * k & 255];
  }
  for (; n; ++p, --n) crc = crc >> 8 ^ kTables[0][(crc ^ *p) & 255];
  return crc;
}

#ifdef WIRE_CRC_TARGET
template <int kLog2>
WIRE_CRC_TARGET inline uint32_t update_streams(uint32_t crc, const uint8_t*& p, size_t& n) {
  static constexpr Operator kZeros = make_zeros(kLog2);
  constexpr size_t kBytes = size_t{1} << kLog2;
  for (; n >= 3 * kBytes; p += 3 * kBytes, n -= 3 * kBytes) {
    uint32_t a = crc, b = 0, c = 0;
    for (size_t i = 0; i < kBytes; i += 8) {
      a = WIRE_CRC_8(a, load64(p + i));
      b = WIRE_CRC_8(b, load64(p + kBytes + i));
      c = WIRE_CRC_8(c, load64(p + 2 * kBytes + i));
    }
    crc = mapped(kZeros, mapped(kZeros, a) ^ b) ^ c;
  }
  return crc;
}

WIRE_CRC_TARGET inline uint32_t update_by_instruction(uint32_t crc, const uint8_t* p, size_t n) {
  crc = update_streams<11>(crc, p, n);
  crc = update_streams<8>(crc, p, n);
  for (; n >= 8; p += 8, n -= 8) crc = WIRE_CRC_8(crc, load64(p));
  for (; n; ++p, --n) crc = WIRE_CRC_1(crc, *p);
  return crc;
}
#endif

#if defined(__x86_64__) && defined(WIRE_CRC_TARGET)
#define WIRE_CRC_FOLDING 1

// x^n modulo the polynomial, reflected in 64 bits: bit 63 - d is the coefficient of x^d.
constexpr long long power_of_x(int n) {
  uint32_t power = 0x80000000u;
  for (; n > 0; --n) power = power >> 1 ^ (power & 1 ? 0x82F63B78u : 0u);
  return static_cast<long long>(uint64_t{power} << 32);
}

// The factors that move 128 bits ahead by n bits: of their first and of their second half. A product of reflected
// numbers comes out one place higher, hence the -1.
constexpr long long first_factor(int n) { return power_of_x(n + 64 - 1); }
constexpr long long second_factor(int n) { return power_of_x(n - 1); }

#define WIRE_FOLD_TARGET __attribute__((target("avx512f,avx512vl,avx512dq,pclmul,vpclmulqdq,sse4.2")))

// Each 128 bits of `a` moved ahead, and what lies there added.
WIRE_FOLD_TARGET inline __m512i fold(__m512i a, __m512i factors, __m512i there) {
  const __m512i first = _mm512_clmulepi64_epi128(a, factors, 0x00), second = _mm512_clmulepi64_epi128(a, factors, 0x11);
  return _mm512_ternarylogic_epi64(first, second, there, 0x96);  // the sum of all three
}

WIRE_FOLD_TARGET inline uint32_t update_by_folding(uint32_t crc, const uint8_t* p, size_t n) {
  if (n >= 512) {
    constexpr long long k1 = first_factor(2048), k2 = second_factor(2048);
    const __m512i ahead_256 = _mm512_set_epi64(k2, k1, k2, k1, k2, k1, k2, k1);
    const auto at = [&](size_t i) WIRE_FOLD_TARGET { return _mm512_loadu_si512(p + 64 * i); };
    __m512i a = at(0), b = at(1), c = at(2), d = at(3);
    a = _mm512_xor_si512(a, _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(crc))));
    for (p += 256, n -= 256; n >= 256; p += 256, n -= 256) {
      a = fold(a, ahead_256, at(0));
      b = fold(b, ahead_256, at(1));
      c = fold(c, ahead_256, at(2));
      d = fold(d, ahead_256, at(3));
    }
    constexpr long long h1 = first_factor(512), h2 = second_factor(512);
    const __m512i ahead_64 = _mm512_set_epi64(h2, h1, h2, h1, h2, h1, h2, h1);
    d = fold(fold(fold(a, ahead_64, b), ahead_64, c), ahead_64, d);
    // the quarters of d, each moved up to the last one
    const __m512i up = _mm512_set_epi64(
        0, 0, second_factor(128), first_factor(128), second_factor(256), first_factor(256), second_factor(384),
        first_factor(384));
    const __m512i last = _mm512_maskz_mov_epi64(0xC0, d);
    const __m512i moved = fold(d, up, last);
    const __m256i half = _mm256_xor_si256(_mm512_castsi512_si256(moved), _mm512_extracti64x4_epi64(moved, 1));
    const __m128i whole = _mm_xor_si128(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    crc = WIRE_CRC_8(0, static_cast<uint64_t>(_mm_extract_epi64(whole, 0)));
    crc = WIRE_CRC_8(crc, static_cast<uint64_t>(_mm_extract_epi64(whole, 1)));
  }
  return update_by_instruction(crc, p, n);
}
#endif

using Update = uint32_t (*)(uint32_t, const uint8_t*, size_t);

// The versions that this processor can run, the fastest first. Begin with 0xFFFFFFFF and invert the end.
inline std::array<Update, 3> updates() {
  std::array<Update, 3> found{};
  size_t n = 0;
#if defined(WIRE_CRC_FOLDING)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("vpclmulqdq"))
    found[n++] = update_by_folding;
  if (__builtin_cpu_supports("sse4.2")) found[n++] = update_by_instruction;
#elif defined(WIRE_CRC_TARGET)
  if (getauxval(AT_HWCAP) & HWCAP_CRC32) found[n++] = update_by_instruction;
#endif
  while (n < found.size()) found[n++] = update_portable;
  return found;
}

inline Update best_update() {
  static const Update best = updates()[0];
  return best;
}

}  // namespace wire
