// CPU bodies of fisher_diag, lora_fisher_diag and weighted_grad.
#include "simd.h"
#include "common.h"
#include "fisher_plan.h"

#include <memory>
#include <optional>
#include <tuple>
#include <vector>

namespace {

using fibecfed::ScalarType;
using fibecfed::Tensor;
using namespace fisher_plan;

struct Scratch {
  float *thin, *wide, *product, *diag, *weight_grad;
};

// The task that a thread does next, taken when it is first asked for.
struct Following {
  const Task* (*take)(const void*);
  const void* from;
  const Task* task = nullptr;
  bool asked = false;
  const Task* ask() {
    if (!asked) task = take(from);
    asked = true;
    return task;
  }
};

#define FIBECFED_KERNEL "fisher_kernel.h"
#include "for_each_isa.h"

Operand operand(const Tensor& tensor) {
  const auto dtype = tensor.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
      "fisher: wanted float32, bfloat16 or float16 tensors");
  return {
      tensor.const_data_ptr(), tensor.size(tensor.dim() - 1),
      dtype == ScalarType::Float      ? Dtype::float32
      : dtype == ScalarType::BFloat16 ? Dtype::bfloat16
                                      : Dtype::float16};
}

std::vector<int64_t> sample_bounds(const Tensor& x, const std::optional<Tensor>& cu_seqlens) {
  std::vector<int64_t> bounds;
  if (!cu_seqlens.has_value()) {
    STD_TORCH_CHECK(x.dim() == 3, "fisher: wanted tensors (N, T, features), or (total, features) with cu_seqlens");
    const int64_t samples = x.size(0), tokens = x.size(1);
    bounds.resize(samples + 1);
    for (int64_t n = 0; n <= samples; ++n) bounds[n] = n * tokens;
    return bounds;
  }
  STD_TORCH_CHECK(x.dim() == 2, "fisher: wanted tensors (total, features) since cu_seqlens is given");
  STD_TORCH_CHECK(
      cu_seqlens->dim() == 1 && cu_seqlens->numel() >= 1 && cu_seqlens->scalar_type() == ScalarType::Int,
      "cu_seqlens: wanted int32 (N+1,)");
  const Tensor offsets = fibecfed::contiguous(*cu_seqlens);
  const int32_t* values = offsets.const_data_ptr<int32_t>();
  bounds.assign(values, values + offsets.numel());
  bool good = bounds.front() == 0 && bounds.back() == x.size(0);
  for (size_t n = 1; n < bounds.size(); ++n) good = good && bounds[n - 1] <= bounds[n];
  STD_TORCH_CHECK(good, "cu_seqlens: values must rise from 0 to the number of tokens, ", x.size(0));
  return bounds;
}

void write_result(const Task& task, const Matrix& matrix, const float* strip, float* result) {
  const int64_t row_stride = matrix.transposed ? 1 : matrix.wide.features;
  const int64_t column_stride = matrix.transposed ? matrix.thin.features : 1;
  float* out = result + task.row * row_stride + task.column * column_stride;
  if (matrix.transposed) {
    for (int64_t j = 0; j < task.columns; ++j) {
      for (int64_t i = 0; i < task.rows; ++i) out[i + j * column_stride] = strip[i * kStrip + j];
    }
  } else {
    for (int64_t i = 0; i < task.rows; ++i) {
      for (int64_t j = 0; j < task.columns; ++j) out[i * row_stride + j] = strip[i * kStrip + j];
    }
  }
}

struct Fisher {
  Tensor scores, diag, weight_grad;
};

Fisher fisher(
    std::vector<Matrix>& matrices, const std::vector<int64_t>& bounds, bool weight_grad,
    const float* weights, std::vector<int64_t> scores_shape, std::vector<int64_t> shape) {
  const int64_t samples = static_cast<int64_t>(bounds.size()) - 1, tokens = bounds.back();
  const std::vector<Task> tasks = plan(matrices, samples);
  int64_t numel = 0, bytes = 0, groups = 1, rows = 1, score_parts = 0;
  for (const Matrix& of : matrices) {
    const int64_t thin = of.thin.features, wide = of.wide.features;
    numel += thin * wide;
    bytes += tokens * (thin + wide) * 4 + tokens * thin * wide / 4;  // a core multiplies 8 values while it moves one
    groups = std::max(groups, of.groups);
    rows = std::max(rows, std::min(thin, kTaskRows));
    score_parts += of.score_parts;
  }
  const int64_t product_numel = rows * kStrip;
  using fibecfed::empty_floats;
  const std::vector<int64_t> none{0};
  Fisher result{empty_floats(scores_shape), empty_floats(shape), empty_floats(weight_grad ? shape : none)};
  float* diag = result.diag.mutable_data_ptr<float>();
  float* grad = weight_grad ? result.weight_grad.mutable_data_ptr<float>() : nullptr;

  // Group 0 writes to the result, the others to their own copy, which is added in order below.
  Tensor copies = empty_floats({(groups - 1) * numel * (weight_grad ? 2 : 1)});
  float* const copy = copies.mutable_data_ptr<float>();
  const auto group_diag = [&](int64_t g) { return g == 0 ? diag : copy + (g - 1) * numel; };
  const auto group_grad = [&](int64_t g) { return g == 0 ? grad : copy + (groups - 1 + g - 1) * numel; };
  const std::unique_ptr<double[]> parts(new double[samples * score_parts]);

  const auto run = FIBECFED_BEST(run_task);
  fibecfed::parallel_tasks(static_cast<int64_t>(tasks.size()), bytes, [&](const auto& next) {
    const std::unique_ptr<float[]> buffer(
        new float[kChunk * (rows + kStrip) + (weight_grad ? 3 : 2) * product_numel]);
    float* const product = buffer.get() + kChunk * (rows + kStrip);
    const Scratch scratch{
        buffer.get(), buffer.get() + kChunk * rows, product, product + product_numel,
        weight_grad ? product + 2 * product_numel : nullptr};
    const auto take = [&]() -> const Task* {
      const int64_t i = next();
      return i < 0 ? nullptr : &tasks[i];
    };
    const auto call = [](const void* take_) { return (*static_cast<const decltype(take)*>(take_))(); };
    const Task* following = take();
    while (following != nullptr) {
      const Task& task = *following;
      const Matrix& of = matrices[task.matrix];
      Following after{call, &take};
      run(task, bounds.data(), weights, parts.get() + task.score_part, score_parts, scratch, &after);
      write_result(task, of, scratch.diag, group_diag(task.group) + of.offset);
      if (weight_grad) write_result(task, of, scratch.weight_grad, group_grad(task.group) + of.offset);
      following = after.ask();
    }
  });

  float* scores = result.scores.mutable_data_ptr<float>();
  for (const Matrix& of : matrices) {
    for (int64_t n = 0; n < samples; ++n) {
      const double* part = parts.get() + n * score_parts + of.first_score_part;
      double score = 0.0;
      for (int64_t i = 0; i < of.score_parts; ++i) score += part[i];
      *scores++ = static_cast<float>(score);
    }
    const int64_t count = of.thin.features * of.wide.features;
    for (int64_t g = 1; g < of.groups; ++g) {
      for (int64_t i = of.offset; i < of.offset + count; ++i) diag[i] += group_diag(g)[i];
      for (int64_t i = of.offset; weight_grad && i < of.offset + count; ++i) grad[i] += group_grad(g)[i];
    }
  }
  return result;
}

void check_tokens(const char* name, const Tensor& tensor, const Tensor& x) {
  bool good = tensor.dim() == x.dim() && tensor.scalar_type() == x.scalar_type();
  for (int64_t i = 0; good && i + 1 < x.dim(); ++i) good = tensor.size(i) == x.size(i);
  STD_TORCH_CHECK(good, name, ": wanted the dtype, samples and tokens of x");
}

std::tuple<Tensor, Tensor, Tensor> fisher_diag(
    Tensor x, Tensor grad_y, std::optional<Tensor> cu_seqlens, bool weight_grad) {
  const std::vector<int64_t> bounds = sample_bounds(x, cu_seqlens);
  const int64_t samples = static_cast<int64_t>(bounds.size()) - 1;
  check_tokens("grad_y", grad_y, x);
  x = fibecfed::contiguous(x);
  grad_y = fibecfed::contiguous(grad_y);
  const Operand in = operand(x), out = operand(grad_y);
  std::vector<Matrix> matrices{matrix(in, out, 0)};
  Fisher result =
      fisher(matrices, bounds, weight_grad, nullptr, {samples}, {out.features, in.features});
  return {result.scores, result.diag, result.weight_grad};
}

Tensor weighted_grad(Tensor x, Tensor grad_y, Tensor weights, std::optional<Tensor> cu_seqlens) {
  const std::vector<int64_t> bounds = sample_bounds(x, cu_seqlens);
  const int64_t samples = static_cast<int64_t>(bounds.size()) - 1;
  check_tokens("grad_y", grad_y, x);
  STD_TORCH_CHECK(
      weights.dim() == 1 && weights.numel() == samples && weights.scalar_type() == ScalarType::Float,
      "weights: wanted float32 (", samples, ",)");
  x = fibecfed::contiguous(x);
  grad_y = fibecfed::contiguous(grad_y);
  weights = fibecfed::contiguous(weights);
  const Operand in = operand(x), out = operand(grad_y);
  std::vector<Matrix> matrices{matrix(in, out, 0)};
  return fisher(matrices, bounds, true, weights.const_data_ptr<float>(), {samples}, {out.features, in.features})
      .weight_grad;
}

std::tuple<Tensor, Tensor, Tensor> lora_fisher_diag(
    Tensor x, std::vector<Tensor> h, std::vector<Tensor> grad_h, std::vector<Tensor> grad_y,
    std::optional<Tensor> cu_seqlens, bool weight_grad) {
  const std::vector<int64_t> bounds = sample_bounds(x, cu_seqlens);
  STD_TORCH_CHECK(
      h.size() == grad_h.size() && h.size() == grad_y.size(), "h, grad_h, grad_y: wanted lists of equal length");
  x = fibecfed::contiguous(x);
  std::vector<Matrix> matrices;
  int64_t offset = 0;
  for (size_t m = 0; m < h.size(); ++m) {
    check_tokens("h", h[m], x);
    check_tokens("grad_h", grad_h[m], x);
    check_tokens("grad_y", grad_y[m], x);
    h[m] = fibecfed::contiguous(h[m]);
    grad_h[m] = fibecfed::contiguous(grad_h[m]);
    grad_y[m] = fibecfed::contiguous(grad_y[m]);
    const Operand in = operand(x), low = operand(h[m]), low_grad = operand(grad_h[m]), out = operand(grad_y[m]);
    STD_TORCH_CHECK(low.features == low_grad.features, "h: wanted the shape of grad_h");
    matrices.push_back(matrix(in, low_grad, offset));
    offset += in.features * low.features;
    matrices.push_back(matrix(low, out, offset));
    offset += low.features * out.features;
  }
  Fisher result = fisher(
      matrices, bounds, weight_grad, nullptr,
      {static_cast<int64_t>(matrices.size()), static_cast<int64_t>(bounds.size()) - 1}, {offset});
  return {result.scores, result.diag, result.weight_grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fibecfed, CPU, m) {
  m.impl("fisher_diag", TORCH_BOX(&fisher_diag));
  m.impl("lora_fisher_diag", TORCH_BOX(&lora_fisher_diag));
  m.impl("weighted_grad", TORCH_BOX(&weighted_grad));
}
