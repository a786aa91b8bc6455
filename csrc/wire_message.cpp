// A whole message in one call, for the CPU: values, checksums and header written, or checked and decoded. The same as
// wire_pack_ or wire_unpack_, wire_digest and the header's text one after the other (kernels/wire/frame.py), which is
// how other bodies do it; here a value is checked while it is in the first cache.
#include <array>
#include <cstring>
#include <tuple>
#include <vector>

#include "wire_lines.h"
#include "wire_payloads.h"

namespace {

using fibecfed::ScalarType;
using fibecfed::Tensor;
using wire::Found;
using wire::Line;
using wire::Range;

constexpr int64_t kDigits = 16;  // of round and num_samples
constexpr std::array kDtypes{
    ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Char, ScalarType::Byte};

// What is the same in every message of a plan; the first fields are `places` as kernels/wire/frame.py fills it.
struct Frame {
  struct Places {
    int64_t dtype, header_bytes, scale_bytes, round, samples, checksums, seal, base;  // base: -1 where there is none
  } at;
  const int64_t* first_lines;  // of the parameters, one more than there are
  int64_t parameters, payloads;
  const uint8_t* header;  // with zeros for digits where a message has its own
  const uint8_t* seal_start;
  int64_t seal_start_bytes;
  const Range* ranges;
  ScalarType dtype() const { return kDtypes[at.dtype]; }
  bool has_scales() const { return at.dtype >= 3; }
  int64_t data_bytes() const { return payloads == 0 ? 0 : ranges[payloads - 1].stop; }
  int64_t bytes() const { return at.header_bytes + data_bytes(); }
};

// Everything that pointers are made of is checked; the rest can at worst give a wrong message.
Frame frame_of(const Tensor& header, const Tensor& places, const Tensor& ranges, const Tensor& message) {
  wire::check_flat("header", header, ScalarType::Byte);
  wire::check_flat("places", places, ScalarType::Long);
  wire::check_flat("message", message, ScalarType::Byte);
  constexpr int64_t kFixed = sizeof(Frame::Places) / sizeof(int64_t);
  STD_TORCH_CHECK(places.numel() > kFixed, "places: too short");
  const auto* p = static_cast<const int64_t*>(places.data_ptr());
  Frame f{};
  std::memcpy(&f.at, p, sizeof f.at);
  f.first_lines = p + kFixed;
  f.parameters = places.numel() - kFixed - 1;
  f.payloads = ranges.size(0);
  f.header = static_cast<const uint8_t*>(header.data_ptr());
  f.seal_start = f.header + f.at.header_bytes;
  f.seal_start_bytes = header.numel() - f.at.header_bytes;
  const auto inside = [&](int64_t start, int64_t bytes) { return start >= 0 && start <= f.at.header_bytes - bytes; };
  STD_TORCH_CHECK(
      0 <= f.at.dtype && f.at.dtype < static_cast<int64_t>(kDtypes.size()) && f.at.header_bytes >= 0 &&
          f.at.header_bytes % 8 == 0 && f.seal_start_bytes >= 0 && f.at.scale_bytes >= 0 &&
          inside(f.at.round, kDigits) && inside(f.at.samples, kDigits) && inside(f.at.checksums, 8 * f.payloads) &&
          inside(f.at.seal, 8) && (f.at.base == -1 || inside(f.at.base, 8)) &&
          f.payloads == (f.has_scales() ? 2 : 1) * f.parameters,
      "places: outside the header, or not one payload a parameter");
  const auto* const start = static_cast<const uint8_t*>(message.data_ptr());
  STD_TORCH_CHECK(
      message.numel() >= f.at.header_bytes && reinterpret_cast<uintptr_t>(start) % 8 == 0,
      "message: shorter than its header, or not aligned");
  f.ranges = wire::check_ranges(ranges, start + f.at.header_bytes, message.numel() - f.at.header_bytes);
  STD_TORCH_CHECK(
      message.numel() == f.bytes() && f.at.scale_bytes <= f.data_bytes() && f.at.scale_bytes % 4 == 0,
      "message: ", message.numel(), " bytes, wanted ", f.bytes());
  return f;
}

const Line* lines_of(const Frame& f, const Tensor& table, int64_t data) {
  const int64_t bytes = f.data_bytes() - f.at.scale_bytes;
  const int64_t half_bytes = std::array{8, 4, 4, 2, 1}[f.at.dtype];  // of a value
  const int64_t values = 2 * bytes / half_bytes;
  const Line* const lines = wire::check_lines(table, f.dtype(), values, f.at.scale_bytes / 4, data);
  bool ascend = f.first_lines[0] == 0 && f.first_lines[f.parameters] == table.size(0);
  for (int64_t i = 0; i < f.parameters; ++i) ascend = ascend && f.first_lines[i] <= f.first_lines[i + 1];
  STD_TORCH_CHECK(ascend, "places: the parameters' first lines are not those of the table");
  return lines;
}

void put_decimal(uint8_t* to, int64_t value) {
  for (int64_t i = kDigits; i-- > 0; value /= 10) to[i] = static_cast<uint8_t>('0' + value % 10);
}

void put_hex(uint8_t* to, uint32_t value) {
  for (int i = 8; i-- > 0; value >>= 4) to[i] = static_cast<uint8_t>("0123456789abcdef"[value & 15]);
}

// -1 where a character is no digit.
int64_t decimal(const uint8_t* from) {
  int64_t value = 0;
  for (int64_t i = 0; i < kDigits; ++i) {
    if (from[i] < '0' || from[i] > '9') return -1;
    value = 10 * value + (from[i] - '0');
  }
  return value;
}

void write_header(
    const Frame& f, uint8_t* to, int64_t round, int64_t samples, const std::vector<Found>& payloads, int64_t base) {
  std::memcpy(to, f.header, f.at.header_bytes);
  put_decimal(to + f.at.round, round);
  put_decimal(to + f.at.samples, samples);
  for (int64_t i = 0; i < f.payloads; ++i) put_hex(to + f.at.checksums + 8 * i, payloads[i].crc);
  wire::Seen seal;
  const auto add = [&](const void* bytes, int64_t count) {
    seal = wire::best_pass()(seal, static_cast<const uint8_t*>(bytes), nullptr, count, {});
  };
  const auto sealed = [&](int64_t at, int64_t bytes, bool first = false) {
    if (!first) add(" ", 1);
    add(to + at, bytes);
  };
  add(f.seal_start, f.seal_start_bytes);
  sealed(f.at.round, kDigits, true);
  sealed(f.at.samples, kDigits);
  sealed(f.at.checksums, 8 * f.payloads);
  if (f.at.base >= 0) {
    put_hex(to + f.at.base, static_cast<uint32_t>(base));
    sealed(f.at.base, 8);
  }
  put_hex(to + f.at.seal, ~seal.crc);
}

// -1, or the first payload that holds a float which is not finite: then the header is not written.
int64_t wire_write_(
    const Tensor& data, const Tensor& table, const Tensor& ranges, const Tensor& header, const Tensor& places,
    int64_t round, int64_t num_samples, int64_t base, Tensor message) {
  wire::check_flat("data", data, ScalarType::Float);
  const Frame f = frame_of(header, places, ranges, message);
  const Line* const lines = lines_of(f, table, data.numel());
  auto* const start = static_cast<uint8_t*>(message.data_ptr());
  uint8_t* const payload = start + f.at.header_bytes;
  uint8_t* const values = payload + f.at.scale_bytes;
  const auto* const x = static_cast<const float*>(data.data_ptr());
  const wire::Pass pass = wire::best_pass();
  std::vector<Found> found(f.payloads);
  wire::visit_codec(f.dtype(), values, payload, [&](auto codec) {
    fibecfed::parallel_tasks(f.parameters, 2 * f.data_bytes(), [&](const auto& next) {
      for (int64_t i = next(); i >= 0; i = next()) {
        const int64_t own = f.has_scales() ? f.parameters + i : i;
        const auto close = [&](wire::Digest& digest, int64_t which) {
          digest.finish(payload + f.ranges[which].stop);
          found[which] = {digest.crc(), digest.found()};
        };
        wire::Digest digest(payload + f.ranges[own].start, f.ranges[own].kind, pass);
        for (const Line* l = lines + f.first_lines[i]; l != lines + f.first_lines[i + 1]; ++l) {
          if constexpr (decltype(codec)::kCopies) {
            const auto* const from = reinterpret_cast<const uint8_t*>(x + l->data);
            digest.copy(from, values + codec.bytes(l->value), codec.bytes(l->numel()));
          } else {
            wire::for_pieces(codec, *l, [&](const Line& piece) {
              codec.encode(x + piece.data, piece);
              digest.advance(values + codec.bytes(piece.value + piece.numel()));
            });
          }
        }
        close(digest, own);
        if (f.has_scales()) {
          wire::Digest of_scales(payload + f.ranges[i].start, f.ranges[i].kind, pass);
          close(of_scales, i);
        }
      }
    });
  });
  int64_t first = -1;
  for (int64_t i = f.payloads; i-- > 0;) first = found[i].not_finite ? i : first;
  if (first < 0) write_header(f, start, round, num_samples, found, base);
  return first;
}

// Whether the message is one of this frame as wire_write_ writes it, of `round` unless that is -1, with every value
// finite; its round; its samples. Only then `target` is written: float32: the values (none where it is
// empty); float64: target += weight · values, where a weight below 0 stands for the samples.
std::tuple<int64_t, int64_t, int64_t> wire_read_(
    const Tensor& message, const Tensor& table, const Tensor& ranges, const Tensor& header, const Tensor& places,
    int64_t round, int64_t base, double weight, Tensor target) {
  const bool adds = target.scalar_type() == ScalarType::Double;
  wire::check_flat("target", target, adds ? ScalarType::Double : ScalarType::Float);
  const Frame f = frame_of(header, places, ranges, message);
  const bool writes = target.numel() > 0;
  const Line* const lines = writes ? lines_of(f, table, target.numel()) : nullptr;
  auto* const start = static_cast<uint8_t*>(message.data_ptr());
  uint8_t* const payload = start + f.at.header_bytes;
  const int64_t found_round = decimal(start + f.at.round), found_samples = decimal(start + f.at.samples);
  using Result = std::tuple<int64_t, int64_t, int64_t>;
  const Result refused{0, found_round, found_samples}, taken{1, found_round, found_samples};
  if (found_round < 0 || found_samples < 0 || (round >= 0 && found_round != round)) return refused;

  const std::vector<Found> found = wire::digests(payload, f.ranges, f.payloads, f.data_bytes());
  const bool bad = std::any_of(found.begin(), found.end(), [](const Found& one) { return one.not_finite; });
  // Kept, since a block of this size makes malloc tidy up first what others have freed: on cold caches, longer than all
  // the checks take.
  static thread_local std::vector<uint8_t> wanted;
  wanted.resize(f.at.header_bytes);
  write_header(f, wanted.data(), found_round, found_samples, found, base);
  if (bad || std::memcmp(wanted.data(), start, wanted.size()) != 0) return refused;
  if (!writes) return taken;
  if (weight < 0) weight = static_cast<double>(found_samples);
  wire::visit_codec(f.dtype(), payload + f.at.scale_bytes, payload, [&](auto codec) {
    if (adds) {
      auto* const sum = static_cast<double*>(target.data_ptr());
      wire::for_lines(lines, table.size(0), 8 * target.numel(), [=](const Line& l) {
        codec.add(l, sum + l.data, weight, codec);
      });
    } else {
      auto* const x = static_cast<float*>(target.data_ptr());
      wire::for_lines(lines, table.size(0), 4 * target.numel(), [=](const Line& l) { codec.decode(l, x + l.data); });
    }
  });
  return taken;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fibecfed, CPU, m) {
  m.impl("wire_write_", TORCH_BOX(&wire_write_));
  m.impl("wire_read_", TORCH_BOX(&wire_read_));
}
