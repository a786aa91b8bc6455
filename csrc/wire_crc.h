// CRC32C (Castagnoli, RFC 3720: reflected polynomial 0x82F63B78, start and final XOR 0xFFFFFFFF).
//
// With the processor's instruction (x86: SSE4.2, ARM: CRC) three independent streams hide its latency of three cycles;
// they are joined by the linear operator "followed by L zero bytes", tabled at compile time. Without it: eight tables,
// eight bytes a step. Which one runs, and a faster way for newer processors: wire_pass.h.
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

}  // namespace wire
