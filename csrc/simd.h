// Which instruction set this processor has. for_each_isa.h compiles a kernel file once for each of them.
#pragma once

#include <algorithm>
#include <atomic>

// GCC lowers vector types before target_clones clones a function, so clones of a register tile would all be scalar
// code: a kernel file is included once a target instead. Other compilers and processors get the baseline version alone.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FIBECFED_X86_VERSIONS 1
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own headers
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#define FIBECFED_X86_VERSIONS 0
#endif

namespace fibecfed {

enum class Isa { baseline, avx2, avx512, avx512bf16 };

inline Isa found_isa() {
#if FIBECFED_X86_VERSIONS
  static const Isa found = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx2 && avx512) return __builtin_cpu_supports("avx512bf16") ? Isa::avx512bf16 : Isa::avx512;
    return avx2 ? Isa::avx2 : Isa::baseline;
  }();
  return found;
#else
  return Isa::baseline;
#endif
}

// The richest set that may be used, so that a test can run what poorer processors run.
inline std::atomic<Isa>& isa_limit() {
  static std::atomic<Isa> limit{Isa::avx512bf16};
  return limit;
}

inline Isa isa() { return std::min(found_isa(), isa_limit().load(std::memory_order_relaxed)); }

}  // namespace fibecfed

// The version of FUNCTION that this processor runs; FUNCTION is defined in a file included by for_each_isa.h.
#if FIBECFED_X86_VERSIONS
#define FIBECFED_BEST(FUNCTION)                                            \
  (::fibecfed::isa() == ::fibecfed::Isa::avx512bf16 ? avx512bf16::FUNCTION \
   : ::fibecfed::isa() == ::fibecfed::Isa::avx512   ? avx512::FUNCTION     \
   : ::fibecfed::isa() == ::fibecfed::Isa::avx2     ? avx2::FUNCTION       \
                                                    : baseline::FUNCTION)
#else
#define FIBECFED_BEST(FUNCTION) (baseline::FUNCTION)
#endif
