// CPU bodies of masked_adamw_, masked_sgd_ and masked_grad_norm.
//
// A thread takes a few lines of `layout` at a time and, in each, runs of consecutive values that make the same step. Of
// an inactive row nothing but its mask byte is touched. A value's result does not depend on the run that it is in.
#include "common.h"
#include "simd.h"
#include "update_rows.h"

#include <array>
#include <cmath>
#include <optional>

namespace {

using fibecfed::count_active;
using fibecfed::for_tasks;
using fibecfed::kLinesPerTask;
using fibecfed::Rows;
using fibecfed::rows_of;
using fibecfed::ScalarType;
using fibecfed::Tensor;
using fibecfed::values;

constexpr int64_t kRows = 64;  // looked at together
constexpr int64_t kAhead = 8;
constexpr int64_t kShort = 64;  // values of a run that is not foreseen

struct AdamW {
  float decay, lerp_weight, beta2, one_minus_beta2, sqrt_correction2, eps, minus_step_size, grad_scale;
  bool lerp_from_grad, scaled;
};

struct Sgd {
  float minus_lr, momentum, one_minus_dampening, weight_decay, grad_scale;
  bool nesterov, has_momentum, scaled;
};

#define FIBECFED_KERNEL "update_kernel.h"
#include "for_each_isa.h"

// The factor of all gradients; none: 1, and `scaled` stays false, so that nothing is multiplied.
float factor(const std::optional<Tensor>& grad_scale, bool& scaled) {
  scaled = grad_scale.has_value();
  if (!scaled) return 1.0f;
  STD_TORCH_CHECK(
      grad_scale->scalar_type() == ScalarType::Float && grad_scale->dim() == 0, "grad_scale: wanted float32 ()");
  return *grad_scale->const_data_ptr<float>();
}

// The learning rates of the lines: lr, or lr times their own factors.
struct Rates {
  double lr;
  const double* scales;
  double of(int32_t line) const { return scales == nullptr ? lr : lr * scales[line]; }
};

Rates rates_of(double lr, const std::optional<Tensor>& lr_scale, int64_t lines) {
  if (!lr_scale) return {lr, nullptr};
  STD_TORCH_CHECK(
      lr_scale->scalar_type() == ScalarType::Double && lr_scale->dim() == 1 && lr_scale->numel() == lines &&
          lr_scale->is_contiguous(),
      "lr_scale: wanted contiguous float64 (", lines, ",)");
  return {lr, lr_scale->const_data_ptr<double>()};
}

struct Run {
  int64_t offset, count;  // values
  int32_t step, line;
};

// Counts up the steps of the active rows among [first, first + rows), at most kRows, and appends what to update. A mask
// is hard to foresee, so there is no branch on a single row.
int64_t find_runs(
    const Rows& r, int32_t line, int64_t first, int64_t rows, int64_t offset, int64_t length, Run* runs,
    int64_t found) {
  const uint8_t* const mask = r.mask + first;
  int32_t* const steps = r.steps + first;
  const int64_t active = count_active(mask, rows);
  if (active == 0) return found;
  if (active == rows) {
    bool same = true;
    for (int64_t i = 0; i < rows; ++i) same &= steps[i] == steps[0];
    if (same) {
      for (int64_t i = 0; i < rows; ++i) ++steps[i];
      runs[found++] = {offset, rows * length, steps[0], line};
      return found;
    }
  }
  const int64_t end = found + active;
  for (int64_t i = 0, at = found; i < rows; ++i) {
    runs[at] = {offset + i * length, length, static_cast<int32_t>(i), line};
    at += mask[i] != 0;
  }
  for (; found < end; ++found) runs[found].step = ++steps[runs[found].step];
  return end;
}

// Runs that are updated together; there is room for one more than there can be, since find_runs writes before it knows
// whether a row is active.
struct Batch {
  std::array<Run, 2 * kRows + 1> runs;
  int64_t found = 0;
};

// Calls update(batch, the batch after it) for all active rows, on several threads.
template <class Update>
void for_active_runs(const Rows& r, int64_t bytes_per_value, const Update& update) {
  for_tasks(r, bytes_per_value, [&](const auto& next) {
    auto own = update;  // a copy for this thread: it remembers the constants of the steps it met
    std::array<Batch, 2> batches;
    int now = 0;
    const auto turn = [&] {
      own(batches[1 - now], batches[now]);
      now = 1 - now;
      batches[now].found = 0;
    };
    for (int64_t task = next(); task >= 0; task = next()) {
      const int64_t last_line = std::min(r.lines, (task + 1) * kLinesPerTask);
      for (int64_t line = task * kLinesPerTask; line < last_line; ++line) {
        const int64_t* const at = r.layout + 4 * line;
        for (int64_t row = 0; row < at[2]; row += kRows) {
          Batch& batch = batches[now];
          batch.found = find_runs(
              r, static_cast<int32_t>(line), at[1] + row, std::min(kRows, at[2] - row), at[0] + row * at[3], at[3],
              batch.runs.data(), batch.found);
          if (batch.found > kRows) turn();
        }
      }
    }
    turn();
    turn();
  });
}

// one(run) for the runs of a batch. Rows are as scattered as the mask has them, so that the processor does not foresee
// them: what the next batch needs is asked for into the second-level cache, as many runs a time as are updated, and what
// a few runs on need into the first. Long runs are foreseen.
template <class One, class... Buffers>
inline void for_runs(const Batch& batch, const Batch& next, const One& one, const Buffers*... buffers) {
  // (inlined by force: GCC takes a function that only prefetches for one that does nothing, and drops the call)
  const auto ask = [&](const Run& run) __attribute__((always_inline)) {
    if (run.count > kShort) return;
    for (int64_t i = 0; i < run.count; i += 16) (__builtin_prefetch(buffers + run.offset + i, 0, 2), ...);
  };
  const Run *const runs = batch.runs.data(), *const later = next.runs.data();
  for (int64_t i = batch.found; i < next.found; ++i) ask(later[i]);
  for (int64_t i = 0; i < batch.found; ++i) {
    if (i < next.found) ask(later[i]);
    if (i + kAhead < batch.found) (__builtin_prefetch(buffers + runs[i + kAhead].offset, 1), ...);
    one(runs[i]);
  }
}

void masked_adamw_(
    Tensor data, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, Tensor steps, Tensor mask, Tensor layout, double lr,
    double beta1, double beta2, double eps, double weight_decay, std::optional<Tensor> grad_scale,
    std::optional<Tensor> lr_scale) {
  const int64_t numel = data.numel();
  float* const p = values("data", data, numel);
  const float* const g = values("grad", grad, numel);
  float* const m = values("exp_avg", exp_avg, numel);
  float* const v = values("exp_avg_sq", exp_avg_sq, numel);
  const Rows rows = rows_of(numel, steps, mask, layout);
  const Rates rates = rates_of(lr, lr_scale, rows.lines);
  const auto kernel = FIBECFED_BEST(adamw_values);

  AdamW constants{};
  const float weight = static_cast<float>(1 - beta1);
  constants.lerp_from_grad = weight >= 0.5f;
  constants.lerp_weight = constants.lerp_from_grad ? weight - 1.0f : weight;
  constants.beta2 = static_cast<float>(beta2);
  constants.one_minus_beta2 = static_cast<float>(1 - beta2);
  constants.eps = static_cast<float>(eps);
  constants.grad_scale = factor(grad_scale, constants.scaled);

  // Bias corrections are two powers a distinct step count; rows awake for different times come in turns. A line with
  // another learning rate costs a division more.
  struct Correction {
    int32_t step = 0;
    float sqrt_correction2 = 0.0f, minus_step_size = 0.0f, decay = 0.0f;
    double correction1 = 0.0, lr = 0.0;
  };
  for_active_runs(rows, 28, [=, met = std::array<Correction, 16>{}](const Batch& batch, const Batch& next) mutable {
    const auto one = [&](const Run& run) {
      const double rate = rates.of(run.line);
      Correction& of = met[run.step & 15];
      const bool counted = of.step == run.step;
      if (!counted) {
        of.step = run.step;
        of.sqrt_correction2 = static_cast<float>(std::pow(1 - std::pow(beta2, run.step), 0.5));
        of.correction1 = 1 - std::pow(beta1, run.step);
      }
      if (!counted || of.lr != rate) {
        of.lr = rate;
        of.minus_step_size = static_cast<float>(-(rate / of.correction1));
        of.decay = static_cast<float>(1 - rate * weight_decay);
      }
      constants.sqrt_correction2 = of.sqrt_correction2;
      constants.minus_step_size = of.minus_step_size;
      constants.decay = of.decay;
      const int64_t offset = run.offset;
      kernel(run.count, constants, p + offset, g + offset, m + offset, v + offset);
    };
    for_runs(batch, next, one, p, g, m, v);
  });
}

void masked_sgd_(
    Tensor data, Tensor grad, Tensor momentum_buffer, Tensor steps, Tensor mask, Tensor layout, double lr,
    double momentum, double dampening, double weight_decay, bool nesterov, std::optional<Tensor> grad_scale,
    std::optional<Tensor> lr_scale) {
  const int64_t numel = data.numel();
  float* const p = values("data", data, numel);
  const float* const g = values("grad", grad, numel);
  float* const b = momentum == 0 ? nullptr : values("momentum_buffer", momentum_buffer, numel);
  const Rows rows = rows_of(numel, steps, mask, layout);
  const Rates rates = rates_of(lr, lr_scale, rows.lines);
  const auto kernel = FIBECFED_BEST(sgd_values);
  Sgd constants{};
  constants.momentum = static_cast<float>(momentum);
  constants.one_minus_dampening = static_cast<float>(1 - dampening);
  constants.weight_decay = static_cast<float>(weight_decay);
  constants.nesterov = nesterov;
  constants.has_momentum = momentum != 0;
  constants.grad_scale = factor(grad_scale, constants.scaled);
  for_active_runs(rows, b == nullptr ? 12 : 20, [=](const Batch& batch, const Batch& next) mutable {
    const auto one = [&](const Run& run) {
      constants.minus_lr = static_cast<float>(-rates.of(run.line));
      const int64_t offset = run.offset;
      kernel(run.count, constants, run.step == 1, p + offset, g + offset, b == nullptr ? b : b + offset);
    };
    for_runs(batch, next, one, p, g);
  });
}

// A line's sum has one thread, and the lines' sums are added in order: the bits do not depend on the threads.
Tensor masked_grad_norm(Tensor grad, Tensor mask, Tensor layout) {
  const float* const g = values("grad", grad, grad.numel());
  const Rows rows = rows_of(grad.numel(), std::nullopt, mask, layout);
  const auto add = FIBECFED_BEST(add_squares);
  std::vector<double> partial(rows.lines);
  for_tasks(rows, 4, [&](const auto& next) {
    for (int64_t task = next(); task >= 0; task = next()) {
      const int64_t last_line = std::min(rows.lines, (task + 1) * kLinesPerTask);
      for (int64_t line = task * kLinesPerTask; line < last_line; ++line) {
        const int64_t* const at = rows.layout + 4 * line;
        const uint8_t* const mask_of = rows.mask + at[1];
        std::array<double, 16> sums{};
        for (int64_t row = 0; row < at[2]; ++row) {
          const int64_t first = row;
          while (row < at[2] && mask_of[row]) ++row;
          if (row > first) add((row - first) * at[3], g + at[0] + first * at[3], sums.data());
        }
        for (const double sum : sums) partial[line] += sum;
      }
    }
  });
  double total = 0.0;
  for (const double sum : partial) total += sum;
  Tensor norm = fibecfed::empty_floats({});
  *norm.mutable_data_ptr<float>() = static_cast<float>(std::sqrt(total));
  return norm;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fibecfed, CPU, m) {
  m.impl("masked_adamw_", TORCH_BOX(&masked_adamw_));
  m.impl("masked_sgd_", TORCH_BOX(&masked_sgd_));
  m.impl("masked_grad_norm", TORCH_BOX(&masked_grad_norm));
}
