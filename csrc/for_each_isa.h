// Includes FIBECFED_KERNEL once for each instruction set, in namespaces baseline, avx2, avx512 and avx512bf16, with
// FIBECFED_LANES floats in a register. That file must include and call nothing but what is made for this: an inline
// function of a library, compiled here with AVX-512, could be the copy that the linker keeps for everybody.
#define FIBECFED_LANES 4
#define FIBECFED_FMA 0
#define FIBECFED_BF16 0
namespace baseline {
#include FIBECFED_KERNEL
}
#undef FIBECFED_LANES
#undef FIBECFED_FMA

#if FIBECFED_X86_VERSIONS
#define FIBECFED_FMA 1

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define FIBECFED_LANES 8
namespace avx2 {
#include FIBECFED_KERNEL
}
#undef FIBECFED_LANES
#pragma GCC pop_options

#define FIBECFED_LANES 16
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
namespace avx512 {
#include FIBECFED_KERNEL
}
#pragma GCC pop_options

#undef FIBECFED_BF16
#define FIBECFED_BF16 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")
namespace avx512bf16 {
#include FIBECFED_KERNEL
}
#pragma GCC pop_options
#undef FIBECFED_LANES

#undef FIBECFED_FMA
#endif

#undef FIBECFED_BF16
#undef FIBECFED_KERNEL
