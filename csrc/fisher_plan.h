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
// Columns of a strip, a multiple of every register tile's: so few that P and Σ P² of a LoRA pair's rows stay in the
// first-level cache, and so many that the pages of a row are not visited too often.
constexpr int64_t kStrip = 384;
// Tokens between two additions to P: many, since each costs as much as some tokens; but two chunks of a strip, one
// being read, one on its way, must lie in the second-level cache, where rows 16 KB apart meet in few sets.
constexpr int64_t kChunk = 64;
constexpr int64_t kGroupSamples = 8;  // of a task at least
constexpr int64_t kMatrixTasks = 16;  // of a matrix, if it has the samples: so many threads have work

enum class Dtype { float32, bfloat16, float16 };

struct Operand {
  const void* data;  // (tokens, features), contiguous
  int64_t features;
  Dtype dtype;
};

struct Task {
  Operand thin, wide;
  int64_t row, rows, column, columns;
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

// Samples of a task: strips alone often give tasks enough, and every further group has partial sums of its own, to be
// added to the others'. A matrix with many rows has no groups, as its partial sums would be as large as gradients.
inline int64_t group_of(int64_t samples, int64_t rows, int64_t strips) {
  if (rows > kTaskRows) return samples;
  const int64_t groups = (kMatrixTasks + strips - 1) / strips;
  return std::max(kGroupSamples, (samples + groups - 1) / groups);
}

// The tokens of a sample in chunks of one size, an even one for the kernel that takes tokens in pairs.
inline int64_t chunk_of(int64_t tokens) {
  if (tokens <= kChunk) return tokens;
  const int64_t chunks = (tokens + kChunk - 1) / kChunk;
  return ((tokens + chunks - 1) / chunks + 1) / 2 * 2;
}

inline std::vector<Task> plan(std::vector<Matrix>& matrices, int64_t samples) {
  std::vector<Task> tasks;
  int64_t score_parts = 0;
  for (size_t m = 0; m < matrices.size(); ++m) {
    Matrix& of = matrices[m];
    const int64_t thin = of.thin.features, wide = of.wide.features;
    of.first_score_part = score_parts;
    const int64_t strips = (wide + kStrip - 1) / kStrip;
    const int64_t group = group_of(samples, thin, strips);
    of.score_parts = ((thin + kTaskRows - 1) / kTaskRows) * strips;
    of.groups = std::max<int64_t>(1, group == 0 ? 1 : (samples + group - 1) / group);
    for (int64_t g = 0; g < of.groups; ++g) {
      int64_t part = score_parts;
      for (int64_t row = 0; row < thin; row += kTaskRows) {
        for (int64_t column = 0; column < wide; column += kStrip) {
          tasks.push_back(
              {of.thin, of.wide, row, std::min(kTaskRows, thin - row), column, std::min(kStrip, wide - column),
               g * group, std::min(samples, (g + 1) * group), static_cast<int64_t>(m), g, part++});
        }
      }
    }
    score_parts += of.score_parts;
  }
  return tasks;
}

}  // namespace fisher_plan
