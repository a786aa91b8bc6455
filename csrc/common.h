// What the CPU bodies share: the stable ABI's headers, and one way to spread tasks over threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace fibecfed {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A new float32 tensor on the CPU, past the dispatcher, which would be looked up by the op's name each time.
// (Checked by the macro that torch 2.11 has; the one with STABLE_ before its name is younger.)
inline Tensor empty_floats(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(1, sizes[i]);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), aoti_torch_dtype_float32(),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Through the dispatcher only where it is needed: the call costs as much as a small product.
inline Tensor contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Waking threads costs microseconds on an idle machine and near a millisecond beside a busy neighbour.
constexpr int64_t kSerialBytes = int64_t{1} << 20;

// Calls worker(next) on each thread; a worker takes task next() until it returns -1. The tasks a thread gets differ
// from run to run, so a task must own what it writes. `bytes`: what all tasks move together.
template <class Worker>
void parallel_tasks(int64_t tasks, int64_t bytes, const Worker& worker) {
  std::atomic<int64_t> counter{0};
  const auto next = [&]() -> int64_t {
    const int64_t task = counter.fetch_add(1, std::memory_order_relaxed);
    return task < tasks ? task : -1;
  };
  const int64_t threads = bytes < kSerialBytes ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  if (threads <= 1) {
    worker(next);
  } else {
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { worker(next); });
  }
}

}  // namespace fibecfed
