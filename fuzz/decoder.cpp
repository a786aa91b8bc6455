// A libFuzzer target over the wire's C++: every input is read as numbers, and what csrc/wire_convert.h and
// csrc/wire_pass.h make of them is compared with slow code that anyone can check. With clang it needs nothing more:
//
//   clang++ -std=c++20 -fsanitize=fuzzer,address,undefined fuzz/decoder.cpp -o decoder && ./decoder
//
// The first byte chooses the check, the second is its parameter; buffers are as long as what they hold, on the heap, so
// that ASan sees a read or a write past their end.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // wide registers are handed on without their instructions here
#endif
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "../csrc/wire_convert.h"
#include "../csrc/wire_pass.h"

namespace {

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "decoder.cpp: not so: %s\n", what);
  std::abort();
}

bool same(float a, float b) { return wire::bits_of(a) == wire::bits_of(b) || (std::isnan(a) && std::isnan(b)); }

template <class T>
std::vector<T> read_as(const uint8_t* data, size_t size) {
  std::vector<T> values(size / sizeof(T));
  if (!values.empty()) std::memcpy(values.data(), data, values.size() * sizeof(T));
  return values;
}

// CRC32C bit by bit.
uint32_t slow_crc(const uint8_t* p, size_t n) {
  uint32_t crc = 0xFFFFFFFF;
  for (size_t i = 0; i < n; ++i) {
    crc ^= p[i];
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0x82F63B78u : 0u);
  }
  return ~crc;
}

#if defined(__x86_64__) && defined(WIRE_CRC_TARGET)
// Half of the carry-less product of a and b, bit by bit.
uint64_t slow_half(uint64_t a, uint64_t b, bool high) {
  unsigned __int128 product = 0;
  for (int i = 0; i < 64; ++i)
    if (b >> i & 1) product ^= static_cast<unsigned __int128>(a) << i;
  return static_cast<uint64_t>(high ? product >> 64 : product);
}

// In every 128 bits the product of one half of a's and one of b's, chosen as by the instruction.
template <class Vector>
Vector slow_product(Vector a, Vector b, int halves) {
  Vector result;
  for (size_t i = 0; i < sizeof a / 8; i += 2) {
    const uint64_t x = a[i + (halves & 1)], y = b[i + (halves >> 4)];
    result[i] = slow_half(x, y, false);
    result[i + 1] = slow_half(x, y, true);
  }
  return result;
}

}  // namespace

// Folding with products made by hand: both widths, on processors that have the instruction for one of them, or none.
namespace wire::slow256 {
#define WIRE_FOLD_BYTES 32
#define WIRE_FOLD_TARGET
#define WIRE_FOLD_PRODUCT(a, b, halves) slow_product(a, b, halves)
#include "../csrc/wire_fold.h"
}  // namespace wire::slow256

namespace wire::slow512 {
#define WIRE_FOLD_BYTES 64
#define WIRE_FOLD_TARGET
#define WIRE_FOLD_PRODUCT(a, b, halves) slow_product(a, b, halves)
#include "../csrc/wire_fold.h"
}  // namespace wire::slow512

namespace {
#endif

// Every version that this processor can run; those made by hand only for what they do in reasonable time.
std::vector<wire::Pass> passes(size_t size) {
  const auto fast = wire::passes();
  std::vector<wire::Pass> found(fast.begin(), fast.end());
#if defined(__x86_64__) && defined(WIRE_CRC_TARGET)
  if (size <= 2048 && __builtin_cpu_supports("sse4.2")) {
    found.push_back(wire::slow256::pass);
    found.push_back(wire::slow512::pass);
  }
#endif
  return found;
}

// The same in one piece and in any pieces, copied on the way or not, by every version.
void check_crc(uint8_t step, const std::vector<uint8_t>& bytes) {
  const uint32_t wanted = slow_crc(bytes.data(), bytes.size());
  for (const wire::Pass pass : passes(bytes.size())) {
    std::vector<uint8_t> copy(bytes.size());
    const wire::Seen whole = pass({}, bytes.data(), copy.data(), bytes.size(), {});
    require(~whole.crc == wanted, "a CRC in one piece is that of its bits");
    require(copy == bytes, "a copy is the bytes");
    wire::Seen seen;
    size_t at = 0, n = step;
    for (; at < bytes.size(); at += n, n = n * 5 + bytes[at - 1] % 7) {
      n = std::min(n, bytes.size() - at);
      if (n == 0) n = 1;
      seen = pass(seen, bytes.data() + at, nullptr, n, {});
    }
    require(~seen.crc == wanted, "a CRC in pieces is that of the whole");
  }
}

// x to the nearest multiple, ties to even, of the last place that `digits` binary digits have at x, which is no smaller
// than the last place at 2^lowest; infinite from half a last place above the largest on.
float slow_round(float x, int digits, int lowest, double largest) {
  if (x == 0 || !std::isfinite(x)) return x;
  const double unit = std::ldexp(1.0, std::max(std::ilogb(x), lowest) - (digits - 1));
  const double rounded = std::nearbyint(double{x} / unit) * unit;
  if (std::abs(rounded) > largest) return std::copysign(std::numeric_limits<float>::infinity(), x);
  return std::copysign(static_cast<float>(rounded), x);
}

// A value of `mantissa` explicit bits below an exponent that is biased by `bias`, from its 16 bits.
float slow_decode(uint16_t w, int mantissa, int bias) {
  const int fraction = w & ((1 << mantissa) - 1), exponent = (w & 0x7FFF) >> mantissa;
  double value = std::ldexp(fraction + (exponent ? 1 << mantissa : 0), std::max(exponent, 1) - bias - mantissa);
  if (exponent == 2 * bias + 1) value = fraction ? std::nan("") : std::numeric_limits<double>::infinity();
  return std::copysign(static_cast<float>(value), w & 0x8000 ? -1.0f : 1.0f);
}

template <class Kind>
void check_half(const std::vector<uint8_t>& bytes, int mantissa, int bias, double largest) {
  const auto x = read_as<float>(bytes.data(), bytes.size());
  std::vector<uint16_t> w(x.size());
  std::vector<float> back(x.size());
  wire::encode(x.data(), w.data(), x.size(), Kind{});
  wire::decode(w.data(), back.data(), w.size(), Kind{});
  for (size_t i = 0; i < x.size(); ++i)
    require(same(back[i], slow_round(x[i], mantissa + 1, 1 - bias, largest)), "a value goes to the nearest one");
  const auto sent = read_as<uint16_t>(bytes.data(), bytes.size());
  std::vector<float> decoded(sent.size());
  std::vector<uint16_t> again(sent.size());
  wire::decode(sent.data(), decoded.data(), sent.size(), Kind{});
  wire::encode(decoded.data(), again.data(), sent.size(), Kind{});
  for (size_t i = 0; i < sent.size(); ++i) {
    require(same(decoded[i], slow_decode(sent[i], mantissa, bias)), "16 bits are decoded as what they are");
    require(again[i] == sent[i] || std::isnan(decoded[i]), "what was decoded is encoded as it was");
  }
}

void check_float32(const std::vector<uint8_t>& bytes) {
  const auto x = read_as<float>(bytes.data(), bytes.size());
  std::vector<float> w(x.size()), back(x.size());
  wire::encode(x.data(), w.data(), x.size(), wire::Float32{});
  wire::decode(w.data(), back.data(), w.size(), wire::Float32{});
  for (size_t i = 0; i < x.size(); ++i) require(same(back[i], x[i]), "float32 stays as it is");
}

// Whether q and scale are what x is sent as, when |q| goes up to `levels`.
void check_line(const float* x, const int8_t* q, float scale, size_t length, int levels) {
  float most = 0;
  bool finite = true;
  for (size_t i = 0; i < length; ++i) {
    finite = finite && std::isfinite(x[i]);
    most = std::max(most, std::abs(x[i]));
  }
  if (!finite) return require(!std::isfinite(scale), "a line that is not finite has a scale that is not");
  const bool zero = most < levels * std::ldexp(1.0, -126);
  require(scale == (zero ? 0.0f : most / static_cast<float>(levels)), "a scale is the line's maximum over the levels");
  for (size_t i = 0; i < length; ++i) {
    require(std::abs(int{q[i]}) <= levels, "a number is within the levels");
    if (zero)
      require(q[i] == 0, "a line of tiny values is all zeros");
    else if (scale < std::ldexp(1.0f, 121))  // or it is not sent
      require(std::abs(double{x[i]} - double{q[i] * scale}) <= scale * (0.5 + 1e-4), "the error is at most s / 2");
  }
}

// Whether `back` and `sum` are what numbers and scales are decoded as, and what 0.75 times that adds to 0.25.
void check_multiples(const std::vector<int8_t>& q, const std::vector<float>& scale, size_t length,
                     const std::vector<float>& back, const std::vector<double>& sum) {
  for (size_t i = 0; i < q.size(); ++i) {
    const float wanted = static_cast<float>(q[i]) * scale[i / length];
    require(same(back[i], wanted), "a number is decoded as its scale's multiple");
    const double added = 0.25 + 0.75 * double{wanted};
    require(sum[i] == added || (std::isnan(sum[i]) && std::isnan(added)), "a sum grows by weight times value");
  }
}

// Rows of `length` values.
void check_int8(size_t length, const std::vector<uint8_t>& bytes) {
  const auto x = read_as<float>(bytes.data(), bytes.size());
  const size_t rows = length ? x.size() / length : std::min(x.size(), size_t{3}), n = rows * length;
  const std::vector<float> lines(x.begin(), x.begin() + n);
  std::vector<int8_t> q(n);
  std::vector<float> scale(rows), back(n);
  wire::quantize_rows(lines.data(), q.data(), scale.data(), rows, length);
  for (size_t r = 0; r < rows; ++r) check_line(lines.data() + r * length, q.data() + r * length, scale[r], length, 127);
  // what a message says, and no sender would: any scales, any numbers
  const auto any = read_as<int8_t>(bytes.data(), n);
  const std::vector<float> scales(x.begin(), x.begin() + rows);
  for (const auto& [numbers, s] : {std::pair{q, scale}, std::pair{any, scales}}) {
    std::vector<double> sum(n, 0.25);
    wire::dequantize_rows(numbers.data(), s.data(), back.data(), rows, length);
    wire::add_rows(numbers.data(), s.data(), sum.data(), rows, length, 0.75);
    check_multiples(numbers, s, length, back, sum);
  }
}

// The numbers in half bytes, line by line, each of which starts a new byte.
std::vector<int8_t> slow_halves(const std::vector<uint8_t>& w, size_t rows, size_t length) {
  std::vector<int8_t> q;
  for (size_t r = 0; r < rows; ++r) {
    for (size_t i = 0; i < length; ++i) {
      const uint8_t byte = w[r * ((length + 1) / 2) + i / 2];
      const int half = i % 2 ? byte / 16 : byte % 16;
      q.push_back(static_cast<int8_t>(half < 8 ? half : half - 16));
    }
  }
  return q;
}

// Blocks of 64 values, as many as there are, or a shorter one alone.
void check_int4(size_t length, const std::vector<uint8_t>& bytes) {
  const auto x = read_as<float>(bytes.data(), bytes.size());
  const size_t rows = length == 64 ? x.size() / length : x.size() >= length, n = rows * length;
  const std::vector<float> lines(x.begin(), x.begin() + n);
  std::vector<uint8_t> w(rows * ((length + 1) / 2), 0xAA);
  std::vector<float> scale(rows), back(n);
  wire::quantize_blocks(lines.data(), w.data(), scale.data(), rows, length);
  const std::vector<int8_t> q = slow_halves(w, rows, length);
  for (size_t r = 0; r < rows; ++r) check_line(lines.data() + r * length, q.data() + r * length, scale[r], length, 7);
  if (rows && length % 2) require(w.back() < 16, "the half byte after the last number is 0");
  const auto any = read_as<uint8_t>(bytes.data(), w.size());  // as above
  const std::vector<float> scales(x.begin(), x.begin() + rows);
  for (const auto& [halves, s] : {std::pair{w, scale}, std::pair{any, scales}}) {
    std::vector<double> sum(n, 0.25);
    wire::dequantize_blocks(halves.data(), s.data(), back.data(), rows, length);
    wire::add_blocks(halves.data(), s.data(), sum.data(), rows, length, 0.75);
    check_multiples(slow_halves(halves, rows, length), s, length, back, sum);
  }
}

// As many floats of a kind as there are, all together, and one of them among zeros.
template <class T>
void check_finite_of(int64_t kind, uint8_t place, const std::vector<uint8_t>& bytes, bool (*finite)(T)) {
  const auto w = read_as<T>(bytes.data(), bytes.size());
  std::vector<T> alone(w.size());
  if (const size_t at = place * (w.size() - 1) / 255; !w.empty()) alone[at] = w[at];
  const wire::Search search = wire::search_of(kind);
  for (const wire::Pass pass : passes(bytes.size())) {
    for (const auto& values : {w, alone}) {
      const auto* const from = reinterpret_cast<const uint8_t*>(values.data());
      const wire::Seen seen = pass({}, from, nullptr, values.size() * sizeof(T), search);
      const bool bad = !std::all_of(values.begin(), values.end(), finite);
      require(((seen.found & search.sign) != 0) == bad, "inf, NaN and scales too large are seen");
    }
  }
}

void check_finite(uint8_t place, const std::vector<uint8_t>& bytes) {
  check_finite_of<uint8_t>(0, place, bytes, [](uint8_t) { return true; });
  check_finite_of<uint32_t>(1, place, bytes, [](uint32_t w) { return std::isfinite(wire::float_of(w)); });
  check_finite_of<uint16_t>(2, place, bytes, [](uint16_t w) { return std::isfinite(slow_decode(w, 7, 127)); });
  check_finite_of<uint16_t>(3, place, bytes, [](uint16_t w) { return std::isfinite(slow_decode(w, 10, 15)); });
  check_finite_of<uint32_t>(4, place, bytes, [](uint32_t w) { return std::abs(wire::float_of(w)) < 0x1p121f; });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 2) return 0;
  const std::vector<uint8_t> bytes(data + 2, data + size);
  switch (data[0] % 7) {
    case 0: check_crc(data[1], bytes); break;
    case 1: check_half<wire::BFloat16>(bytes, 7, 127, std::ldexp(255.0, 120)); break;
    case 2: check_half<wire::Float16>(bytes, 10, 15, 65504.0); break;
    case 3: check_float32(bytes); break;
    case 4: check_int8(data[1] % 40, bytes); break;
    case 5: check_finite(data[1], bytes); break;
    default: check_int4(data[1] % 2 ? 64 : 1 + data[1] / 2 % 63, bytes);
  }
  return 0;
}
