// CPU bodies of masked_adamw_, masked_sgd_ and masked_grad_norm.
//
// A thread takes a few lines of `layout` at a time and, in each, runs of consecutive values that make the same step. Of
// an inactive row nothing but its mask byte is touched. A value's result does not depend on the run that it is in.
#include "common.h"
#include "simd.h"
#include "update_rows.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <optional>

namespace {

using fibecfed::check_apart;
using fibecfed::for_tasks;
using fibecfed::kLinesPerTask;
using fibecfed::Rows;
using fibecfed::rows_of;
using fibecfed::ScalarType;
using fibecfed::Tensor;
using fibecfed::values;

// What is stepped in one call: runs of `count` consecutive values that have made as many steps, this one included, at
// one learning rate.
struct Runs {
  const int64_t* offsets;
  int64_t n, count;
  int32_t step;
  double lr;
};

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
  double of(int64_t line) const { return scales == nullptr ? lr : lr * scales[line]; }
};

Rates rates_of(double lr, const std::optional<Tensor>& lr_scale, int64_t lines) {
  if (!lr_scale) return {lr, nullptr};
  STD_TORCH_CHECK(
      lr_scale->scalar_type() == ScalarType::Double && lr_scale->dim() == 1 && lr_scale->numel() == lines &&
          lr_scale->is_contiguous(),
      "lr_scale: wanted contiguous float64 (", lines, ",)");
  const double* const scales = lr_scale->const_data_ptr<double>();
  const bool good = std::all_of(scales, scales + lines, [](double one) { return one >= 0 && std::isfinite(one); });
  STD_TORCH_CHECK(good, "lr_scale: wanted finite numbers that are not negative");
  return {lr, scales};
}

// Consecutive rows of the same length and learning rate.
struct Block {
  int64_t offset, first, rows, length;  // of the first value, of the first row
  double lr;
};

// The active ones among at most kRows rows of a block, their steps counted up.
class Active {
 public:
  static constexpr int64_t kRows = 512;

  Active(const Rows& r, const Block& block) : length_(block.length), lr_(block.lr) {
    for (int64_t row = 0; row < block.rows; row += 64) {
      const int64_t rows = std::min<int64_t>(64, block.rows - row), offset = block.offset + row * length_;
      int32_t* const steps = r.steps + block.first + row;
      uint64_t bits = fibecfed::active_bits(r.mask + block.first + row, rows);
      const int64_t active = std::popcount(bits), end = n_ + active;
      if (active == rows) {  // the same without looking for them
        for (int64_t i = 0; i < rows; ++i) offsets_[n_ + i] = offset + i * length_;
        for (int64_t i = 0; i < rows; ++i) steps_[n_ + i] = ++steps[i];
        n_ = end;
      }
      for (; n_ < end; ++n_, bits &= bits - 1) {
        const int64_t i = std::countr_zero(bits);
        offsets_[n_] = offset + i * length_;
        steps_[n_] = ++steps[i];
      }
    }
    for (int64_t i = 1; i < n_; ++i) differ_ |= steps_[i] ^ steps_[0];
    if (n_ == block.rows && differ_ == 0) {  // a single run
      n_ = std::min<int64_t>(n_, 1);
      length_ *= block.rows;
    }
  }

  template <class Step>
  void for_runs(Step& step) const {
    for (int64_t i = 0, n = 0; i < n_; i += n) {
      n = differ_ == 0 ? n_ : 1;
      while (i + n < n_ && steps_[i + n] == steps_[i]) ++n;
      step(Runs{offsets_.data() + i, n, length_, steps_[i], lr_});
    }
  }

 private:
  int64_t length_, n_ = 0;
  double lr_;
  int32_t differ_ = 0;
  std::array<int64_t, kRows> offsets_;
  std::array<int32_t, kRows> steps_;
};

// step(runs) for all active rows, on several threads.
template <class Step>
void for_active_runs(const Rows& r, const Rates& rates, int64_t bytes_per_value, const Step& step) {
  for_tasks(r, bytes_per_value, [&](const auto& next) {
    auto own = step;  // a copy for this thread: it remembers the constants of the steps it met
    for (int64_t task = next(); task >= 0; task = next()) {
      const int64_t last = std::min(r.lines, (task + 1) * kLinesPerTask);
      for (int64_t line = task * kLinesPerTask; line < last;) {
        const int64_t* at = r.layout + 4 * line;
        Block block{at[0], at[1], at[2], at[3], rates.of(line)};
        for (++line, at += 4; line < last && at[3] == block.length && at[1] == block.first + block.rows &&
             at[0] == block.offset + block.rows * block.length && rates.of(line) == block.lr; ++line, at += 4)
          block.rows += at[2];
        for (const int64_t end = block.first + block.rows; block.first < end;) {
          block.rows = std::min(Active::kRows, end - block.first);
          Active(r, block).for_runs(own);
          block.first += block.rows;
          block.offset += block.rows * block.length;
        }
      }
    }
  });
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
  check_apart(
      {{data, true}, {grad, false}, {exp_avg, true}, {exp_avg_sq, true}, {steps, true}, {mask, false}, {layout, false},
       grad_scale, lr_scale});
  const auto kernel = FIBECFED_BEST(adamw_runs);

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
    int32_t step = std::numeric_limits<int32_t>::min();
    float sqrt_correction2 = 0.0f, minus_step_size = 0.0f, decay = 0.0f;
    double correction1 = 0.0, lr = 0.0;
  };
  for_active_runs(rows, rates, 28, [=, met = std::array<Correction, 16>{}](const Runs& runs) mutable {
    Correction& of = met[runs.step & 15];
    const bool counted = of.step == runs.step;
    if (!counted) {
      of.step = runs.step;
      of.sqrt_correction2 = static_cast<float>(std::pow(1 - std::pow(beta2, of.step), 0.5));
      of.correction1 = 1 - std::pow(beta1, of.step);
    }
    if (!counted || of.lr != runs.lr) {
      of.lr = runs.lr;
      of.minus_step_size = static_cast<float>(-(of.lr / of.correction1));
      of.decay = static_cast<float>(1 - of.lr * weight_decay);
    }
    constants.sqrt_correction2 = of.sqrt_correction2;
    constants.minus_step_size = of.minus_step_size;
    constants.decay = of.decay;
    kernel(runs, constants, p, g, m, v);
  });
}

void masked_sgd_(
    Tensor data, Tensor grad, Tensor momentum_buffer, Tensor steps, Tensor mask, Tensor layout, double lr,
    double momentum, double dampening, double weight_decay, bool nesterov, std::optional<Tensor> grad_scale,
    std::optional<Tensor> lr_scale) {
  const int64_t numel = data.numel();
  float* const p = values("data", data, numel);
  const float* const g = values("grad", grad, numel);
  const bool has_buffer = momentum != 0 || momentum_buffer.numel() != 0;
  float* const given = has_buffer ? values("momentum_buffer", momentum_buffer, numel) : nullptr;
  float* const b = momentum == 0 ? nullptr : given;
  const Rows rows = rows_of(numel, steps, mask, layout);
  const Rates rates = rates_of(lr, lr_scale, rows.lines);
  check_apart(
      {{data, true}, {grad, false}, {momentum_buffer, true}, {steps, true}, {mask, false}, {layout, false}, grad_scale,
       lr_scale});
  const auto kernel = FIBECFED_BEST(sgd_runs);
  Sgd constants{};
  constants.momentum = static_cast<float>(momentum);
  constants.one_minus_dampening = static_cast<float>(1 - dampening);
  constants.weight_decay = static_cast<float>(weight_decay);
  constants.nesterov = nesterov;
  constants.has_momentum = momentum != 0;
  constants.grad_scale = factor(grad_scale, constants.scaled);
  for_active_runs(rows, rates, b == nullptr ? 12 : 20, [=](const Runs& runs) mutable {
    constants.minus_lr = static_cast<float>(-runs.lr);
    kernel(runs, constants, p, g, b);
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
