// How the work of fisher.cpp is cut into tasks.
//
// A matrix's gradient of a sample is P = thinᵀ wide, summed over the sample's tokens: thin is the operand with fewer
// features (the rank, in a LoRA pair), wide the other. A task is (matrix, rows of thin, strip of wide, group of
// samples); it keeps P, Σ P² and Σ P of its rows and strip near the core. All sizes below are fixed, so the order of
// every sum, and with it every bit, depends on the shapes alone, and a score on its own sample alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fisher_plan {

constexpr int64_t kTaskRows = 64;
constexpr int64_t kMostChunk = 64;
constexpr int64_t kGroupSamples = 8;
constexpr int64_t kMostGroups = 32;

enum class Dtype { float32, bfloat16, float16 };

struct Operand {
  const void* data;  // (tokens, features), contiguous
  int64_t features;
  Dtype dtype;
};

struct Task {
  Operand thin, wide;
  int64_t row, rows, column, columns;
  int64_t strip;  // columns of a whole task, the row stride of P
  int64_t chunk;  // tokens between two additions to P
  int64_t first_sample, last_sample;
  int64_t matrix, group, score_part;
};

struct Matrix {
  Operand thin, wide;
  bool transposed;  // the result is (wide, thin)
  int64_t offset;   // of the result in diag and weight_grad
  int64_t groups, score_parts, first_score_part;
};

// Σ ∂yᵀ x: (grad.features, x.features).
inline Matrix matrix(const Operand& x, const Operand& grad, int64_t offset) {
  const bool transposed = x.features < grad.features;
  return {transposed ? x : grad, transposed ? grad : x, transposed, offset, 1, 0, 0};
}

struct Shape {
  int64_t strip, chunk;
};

// A thin operand of few rows is bound by memory: the strip is wide, so that what is fetched ahead lies in long pieces,
// and the chunk such that two of them fit into the second-level cache. With many rows both operands should stay in the
// first. Found by measuring.
inline Shape shape_of(int64_t rows) {
  if (rows <= 8) return {1024, 32};
  if (rows <= 16) return {512, 32};
  return {192, kMostChunk};
}

// Samples of a task. A matrix with many rows has tasks enough without groups, and its partial sums would be as large as
// gradients; a narrow one has few strips, and a small batch of it wants more groups for its cores.
inline int64_t group_of(int64_t samples, int64_t rows, int64_t strips) {
  if (rows > kTaskRows) return samples;
  const int64_t least = strips < 4 && samples <= 2 * kGroupSamples ? kGroupSamples / 2 : kGroupSamples;
  return std::max(least, (samples + kMostGroups - 1) / kMostGroups);
}

inline std::vector<Task> plan(std::vector<Matrix>& matrices, int64_t samples) {
  std::vector<Task> tasks;
  int64_t score_parts = 0;
  for (size_t m = 0; m < matrices.size(); ++m) {
    Matrix& of = matrices[m];
    const int64_t thin = of.thin.features, wide = of.wide.features;
    of.first_score_part = score_parts;
    const auto [strip, chunk] = shape_of(thin);
    const int64_t strips = (wide + strip - 1) / strip;
    const int64_t group = group_of(samples, thin, strips);
    of.score_parts = ((thin + kTaskRows - 1) / kTaskRows) * strips;
    of.groups = std::max<int64_t>(1, group == 0 ? 1 : (samples + group - 1) / group);
    for (int64_t g = 0; g < of.groups; ++g) {
      int64_t part = score_parts;
      for (int64_t row = 0; row < thin; row += kTaskRows) {
        for (int64_t column = 0; column < wide; column += strip) {
          tasks.push_back(
              {of.thin, of.wide, row, std::min(kTaskRows, thin - row), column, std::min(strip, wide - column), strip,
               chunk, g * group, std::min(samples, (g + 1) * group), static_cast<int64_t>(m), g, part++});
        }
      }
    }
    score_parts += of.score_parts;
  }
  return tasks;
}

}  // namespace fisher_plan
