// What the update ops are given beside their values: rows, which of them are active, and the lines that hold them.
#pragma once

#include "common.h"

#include <cstring>
#include <initializer_list>
#include <limits>
#include <optional>

namespace fibecfed {

constexpr int64_t kLinesPerTask = 16;

struct Rows {
  int32_t* steps;  // null where only the mask is read
  const uint8_t* mask;  // torch takes any byte but 0 for true
  int64_t num_rows;
  const int64_t* layout;
  int64_t lines;
};

inline float* values(const char* name, const Tensor& tensor, int64_t numel) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == ScalarType::Float && tensor.dim() == 1 && tensor.numel() == numel &&
          tensor.is_contiguous(),
      name, ": wanted contiguous float32 (", numel, ",)");
  return tensor.mutable_data_ptr<float>();
}

inline Rows rows_of(int64_t numel, const std::optional<Tensor>& steps, const Tensor& mask, const Tensor& layout) {
  STD_TORCH_CHECK(
      mask.scalar_type() == ScalarType::Bool && mask.dim() == 1 && mask.is_contiguous(),
      "mask: wanted contiguous bool (rows,)");
  STD_TORCH_CHECK(
      !steps || (steps->scalar_type() == ScalarType::Int && steps->dim() == 1 && steps->numel() == mask.numel() &&
                 steps->is_contiguous()),
      "steps: wanted contiguous int32 (", mask.numel(), ",)");
  STD_TORCH_CHECK(
      layout.scalar_type() == ScalarType::Long && layout.dim() == 2 && layout.size(1) == 4 && layout.is_contiguous() &&
          layout.size(0) <= std::numeric_limits<int32_t>::max(),
      "layout: wanted contiguous int64 (lines, 4)");
  const Rows rows{
      steps ? steps->mutable_data_ptr<int32_t>() : nullptr, static_cast<const uint8_t*>(mask.data_ptr()), mask.numel(),
      layout.const_data_ptr<int64_t>(), layout.size(0)};
  int64_t value = 0, row = 0;  // of the next line: a wrong layout would write into other people's memory
  bool inside = true;
  for (const int64_t* at = rows.layout; at != rows.layout + 4 * rows.lines; at += 4) {
    int64_t values = 0;
    inside = inside && at[0] == value && at[1] == row && at[2] >= 0 && at[3] >= 0 && at[2] <= rows.num_rows - row &&
             !__builtin_mul_overflow(at[2], at[3], &values) && values <= numel - value;
    if (inside) value += values, row += at[2];
  }
  STD_TORCH_CHECK(
      inside && value == numel && row == rows.num_rows, "layout: its lines do not cover data and mask, or reach beyond");
  return rows;
}

// What an op is given of somebody's memory.
struct Memory {
  Memory(const Tensor& tensor, bool written)
      : start(reinterpret_cast<uintptr_t>(tensor.data_ptr())),
        end(start + tensor.numel() * tensor.element_size()), written(written) {}
  Memory(const std::optional<Tensor>& tensor) : Memory() {
    if (tensor) *this = Memory(*tensor, false);
  }
  Memory() = default;
  uintptr_t start = 0, end = 0;
  bool written = false;
};

inline void check_apart(std::initializer_list<Memory> all) {
  bool apart = true;
  for (const Memory& a : all)
    for (const Memory& b : all)
      apart = apart && (&a == &b || !(a.written || b.written) || a.end <= b.start || b.end <= a.start);
  STD_TORCH_CHECK(apart, "a tensor that is written shares memory with another");
}

// 0 or 1 in each byte: whether that of the mask is true.
inline uint64_t eight_rows(const uint8_t* mask) {
  uint64_t eight;
  std::memcpy(&eight, mask, 8);
  eight |= eight >> 4 & 0x0F0F0F0F0F0F0F0Fu;
  eight |= eight >> 2 & 0x0303030303030303u;
  eight |= eight >> 1;
  return eight & 0x0101010101010101u;
}

inline int64_t count_active(const uint8_t* mask, int64_t rows) {
  int64_t count = 0, row = 0;
  for (; row + 8 <= rows; row += 8)
    count += static_cast<int64_t>(eight_rows(mask + row) * 0x0101010101010101u >> 56);  // their sum
  for (; row < rows; ++row) count += mask[row] != 0;
  return count;
}

// A bit for each of at most 64 rows.
inline uint64_t active_bits(const uint8_t* mask, int64_t rows) {
  uint64_t bits = 0;
  int64_t row = 0;
  for (; row + 8 <= rows; row += 8)
    bits |= (eight_rows(mask + row) * 0x0102040810204080u >> 56) << row;  // byte i ends as bit i of the highest byte
  for (; row < rows; ++row) bits |= uint64_t{mask[row] != 0} << row;
  return bits;
}

// Calls worker(next) on several threads; each takes some of the tasks of kLinesPerTask lines.
template <class Worker>
void for_tasks(const Rows& r, int64_t bytes_per_value, const Worker& worker) {
  int64_t active = 0;
  for (const int64_t* at = r.layout; at != r.layout + 4 * r.lines; at += 4) {
    active += count_active(r.mask + at[1], at[2]) * at[3];
  }
  fibecfed::parallel_tasks((r.lines + kLinesPerTask - 1) / kLinesPerTask, active * bytes_per_value, worker);
}

}  // namespace fibecfed
