// Checks that the wire's bodies share: they write and read through raw pointers.
#pragma once

#include <cstdint>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace wire {

inline constexpr int64_t kBytesPerThread = 1 << 20;  // less than this is done sooner than a second thread wakes

inline void check_flat(const char* name, const torch::stable::Tensor& t, torch::headeronly::ScalarType dtype) {
  STD_TORCH_CHECK(t.scalar_type() == dtype && t.is_contiguous(), name, ": wrong dtype or not contiguous");
}

}  // namespace wire
