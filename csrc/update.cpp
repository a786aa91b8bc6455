// CPU bodies of masked_adamw_ and masked_sgd_.
//
// A thread takes a few lines of `layout` at a time and, in each, runs of consecutive values that make the same step. Of
// an inactive row nothing but its mask byte is touched. A value's result does not depend on the run that it is in.
#include "common.h"
#include "simd.h"

#include <array>
#include <cmath>
#include <cstring>

namespace {

using fibecfed::ScalarType;
using fibecfed::Tensor;

constexpr int64_t kLinesPerTask = 16;
constexpr int64_t kRows = 64;  // looked at together
constexpr int64_t kAhead = 8;

struct AdamW {
  float decay, lerp_weight, beta2, one_minus_beta2, sqrt_correction2, eps, minus_step_size;
  bool lerp_from_grad;
};

struct Sgd {
  float minus_lr, momentum, one_minus_dampening, weight_decay;
  bool nesterov, has_momentum;
};

#define FIBECFED_KERNEL "update_kernel.h"
#include "for_each_isa.h"

struct Rows {
  int32_t* steps;
  const bool* mask;
  int64_t num_rows;
  const int64_t* layout;
  int64_t lines;
};

float* values(const char* name, const Tensor& tensor, int64_t numel) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == ScalarType::Float && tensor.numel() == numel && tensor.is_contiguous(), name,
      ": wanted contiguous float32 (", numel, ",)");
  return tensor.mutable_data_ptr<float>();
}

Rows rows_of(const Tensor& data, const Tensor& steps, const Tensor& mask, const Tensor& layout) {
  STD_TORCH_CHECK(
      mask.scalar_type() == ScalarType::Bool && mask.dim() == 1 && mask.is_contiguous(),
      "mask: wanted contiguous bool (rows,)");
  STD_TORCH_CHECK(
      steps.scalar_type() == ScalarType::Int && steps.numel() == mask.numel() && steps.is_contiguous(),
      "steps: wanted contiguous int32 (", mask.numel(), ",)");
  STD_TORCH_CHECK(
      layout.scalar_type() == ScalarType::Long && layout.dim() == 2 && layout.size(1) == 4 && layout.is_contiguous(),
      "layout: wanted contiguous int64 (lines, 4)");
  const Rows rows{
      steps.mutable_data_ptr<int32_t>(), mask.const_data_ptr<bool>(), mask.numel(), layout.const_data_ptr<int64_t>(),
      layout.size(0)};
  bool inside = true;  // a wrong layout would write into other people's memory
  for (const int64_t* at = rows.layout; at != rows.layout + 4 * rows.lines; at += 4) {
    inside = inside && at[0] >= 0 && at[1] >= 0 && at[2] >= 0 && at[3] >= 0 && at[1] + at[2] <= rows.num_rows &&
             at[0] + at[2] * at[3] <= data.numel();
  }
  STD_TORCH_CHECK(inside, "layout: a line reaches beyond data or mask");
  return rows;
}

struct Run {
  int64_t offset, count;  // values
  int32_t step;
};

int64_t count_active(const bool* mask, int64_t rows) {
  int64_t count = 0, row = 0;
  for (; row + 8 <= rows; row += 8) {
    uint64_t eight;
    std::memcpy(&eight, mask + row, 8);
    count += static_cast<int64_t>(eight * 0x0101010101010101u >> 56);  // the sum of the bytes, each 0 or 1
  }
  for (; row < rows; ++row) count += mask[row];
  return count;
}

// Counts up the steps of the active rows among [first, first + rows), at most kRows, and appends what to update. A mask
// is hard to foresee, so there is no branch on a single row.
int64_t find_runs(
    const Rows& r, int64_t first, int64_t rows, int64_t offset, int64_t length, Run* runs, int64_t found) {
  const bool* const mask = r.mask + first;
  int32_t* const steps = r.steps + first;
  const int64_t active = count_active(mask, rows);
  if (active == 0) return found;
  if (active == rows) {
    bool same = true;
    for (int64_t i = 0; i < rows; ++i) same &= steps[i] == steps[0];
    if (same) {
      for (int64_t i = 0; i < rows; ++i) ++steps[i];
      runs[found++] = {offset, rows * length, steps[0]};
      return found;
    }
  }
  const int64_t end = found + active;
  for (int64_t i = 0, at = found; i < rows; ++i) {
    runs[at] = {offset + i * length, length, static_cast<int32_t>(i)};
    at += mask[i];
  }
  for (; found < end; ++found) runs[found].step = ++steps[runs[found].step];
  return end;
}

// Calls update(runs, number of runs) for all active rows, on several threads.
template <class Update>
void for_active_runs(const Rows& r, int64_t bytes_per_value, const Update& update) {
  int64_t active = 0;
  for (const int64_t* at = r.layout; at != r.layout + 4 * r.lines; at += 4) {
    active += count_active(r.mask + at[1], at[2]) * at[3];
  }
  const int64_t tasks = (r.lines + kLinesPerTask - 1) / kLinesPerTask;
  fibecfed::parallel_tasks(tasks, active * bytes_per_value, [&](const auto& next) {
    auto own = update;                    // a copy for this thread: it remembers the constants of the steps it met
    std::array<Run, 2 * kRows + 1> runs;  // one more: find_runs writes before it knows whether a row is active
    for (int64_t task = next(); task >= 0; task = next()) {
      int64_t found = 0;
      const int64_t last_line = std::min(r.lines, (task + 1) * kLinesPerTask);
      for (int64_t line = task * kLinesPerTask; line < last_line; ++line) {
        const int64_t* const at = r.layout + 4 * line;
        for (int64_t row = 0; row < at[2]; row += kRows) {
          found =
              find_runs(r, at[1] + row, std::min(kRows, at[2] - row), at[0] + row * at[3], at[3], runs.data(), found);
          if (found > kRows) {
            own(runs.data(), found);
            found = 0;
          }
        }
      }
      own(runs.data(), found);
    }
  });
}

// A run's first values, asked for while earlier runs are updated; long runs are foreseen by the processor itself.
template <class... Buffers>
inline void prefetch(int64_t offset, const Buffers*... buffers) {
  (__builtin_prefetch(buffers + offset, 1), ...);
}

void masked_adamw_(
    Tensor data, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, Tensor steps, Tensor mask, Tensor layout, double lr,
    double beta1, double beta2, double eps, double weight_decay) {
  const int64_t numel = data.numel();
  float* const p = values("data", data, numel);
  const float* const g = values("grad", grad, numel);
  float* const m = values("exp_avg", exp_avg, numel);
  float* const v = values("exp_avg_sq", exp_avg_sq, numel);
  const Rows rows = rows_of(data, steps, mask, layout);
  const auto kernel = FIBECFED_BEST(adamw_values);

  AdamW constants{};
  constants.decay = static_cast<float>(1 - lr * weight_decay);
  const float weight = static_cast<float>(1 - beta1);
  constants.lerp_from_grad = weight >= 0.5f;
  constants.lerp_weight = constants.lerp_from_grad ? weight - 1.0f : weight;
  constants.beta2 = static_cast<float>(beta2);
  constants.one_minus_beta2 = static_cast<float>(1 - beta2);
  constants.eps = static_cast<float>(eps);

  // Bias corrections are two powers a distinct step count; rows awake for different times come in turns.
  struct Correction {
    int32_t step = 0;
    float sqrt_correction2 = 0.0f, minus_step_size = 0.0f;
  };
  for_active_runs(rows, 28, [=, met = std::array<Correction, 16>{}](const Run* runs, int64_t found) mutable {
    for (int64_t i = 0; i < found; ++i) {
      if (i + kAhead < found) prefetch(runs[i + kAhead].offset, p, g, m, v);
      const int32_t step = runs[i].step;
      Correction& of = met[step & 15];
      if (of.step != step) {
        of.step = step;
        of.sqrt_correction2 = static_cast<float>(std::pow(1 - std::pow(beta2, step), 0.5));
        of.minus_step_size = static_cast<float>(-(lr / (1 - std::pow(beta1, step))));
      }
      constants.sqrt_correction2 = of.sqrt_correction2;
      constants.minus_step_size = of.minus_step_size;
      const int64_t offset = runs[i].offset;
      kernel(runs[i].count, constants, p + offset, g + offset, m + offset, v + offset);
    }
  });
}

void masked_sgd_(
    Tensor data, Tensor grad, Tensor momentum_buffer, Tensor steps, Tensor mask, Tensor layout, double lr,
    double momentum, double dampening, double weight_decay, bool nesterov) {
  const int64_t numel = data.numel();
  float* const p = values("data", data, numel);
  const float* const g = values("grad", grad, numel);
  float* const b = momentum == 0 ? nullptr : values("momentum_buffer", momentum_buffer, numel);
  const Rows rows = rows_of(data, steps, mask, layout);
  const auto kernel = FIBECFED_BEST(sgd_values);
  const Sgd constants{
      static_cast<float>(-lr),
      static_cast<float>(momentum),
      static_cast<float>(1 - dampening),
      static_cast<float>(weight_decay),
      nesterov,
      momentum != 0};
  for_active_runs(rows, b == nullptr ? 12 : 20, [=](const Run* runs, int64_t found) {
    for (int64_t i = 0; i < found; ++i) {
      if (i + kAhead < found) prefetch(runs[i + kAhead].offset, p, g);
      const int64_t offset = runs[i].offset;
      kernel(runs[i].count, constants, runs[i].step == 1, p + offset, g + offset, b == nullptr ? b : b + offset);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fibecfed, CPU, m) {
  m.impl("masked_adamw_", TORCH_BOX(&masked_adamw_));
  m.impl("masked_sgd_", TORCH_BOX(&masked_sgd_));
}
