// What g++ lacks for a libFuzzer target: a main, and coverage that libFuzzer's engine understands. g++ calls
// __sanitizer_cov_trace_pc at each edge; here every place that calls gets one of the engine's 8-bit counters. The
// engine has an empty function of that name, so the linker is told to take ours:
// -Wl,--wrap=__sanitizer_cov_trace_pc. Comparisons (trace-cmp) call the engine as they are. This file must be compiled
// without sanitizers: target_clones are resolved, and call it, before ASan has its shadow memory.
#include <cstddef>
#include <cstdint>

extern "C" {

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
int LLVMFuzzerRunDriver(int* count, char*** arguments, int (*target)(const uint8_t*, size_t));
void __sanitizer_cov_8bit_counters_init(uint8_t* start, uint8_t* stop);

alignas(64) static uint8_t counters[1 << 15];

// Two places of one counter are seen as one, which costs some coverage and nothing else.
void __wrap___sanitizer_cov_trace_pc() {
  const uintptr_t place = reinterpret_cast<uintptr_t>(__builtin_return_address(0)) -
                          reinterpret_cast<uintptr_t>(&LLVMFuzzerTestOneInput);  // the same in every run
  uint8_t& counter = counters[(place ^ place >> 15) % sizeof counters];
  counter += counter != 255;
}

// Floats are not compared by their distance.
void __sanitizer_cov_trace_cmpf(float, float) {}
void __sanitizer_cov_trace_cmpd(double, double) {}

}  // extern "C"

int main(int count, char** arguments) {
  __sanitizer_cov_8bit_counters_init(counters, counters + sizeof counters);
  return LLVMFuzzerRunDriver(&count, &arguments, LLVMFuzzerTestOneInput);
}
