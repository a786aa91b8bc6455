// A pass by folding, once for each width of register. Included by wire_pass.h with WIRE_FOLD_BYTES of the register,
// WIRE_FOLD_TARGET and WIRE_FOLD_PRODUCT(a, b, halves), the carry-less product of every 128 bits.
using Vector = uint64_t __attribute__((vector_size(WIRE_FOLD_BYTES)));

WIRE_FOLD_TARGET WIRE_INLINE Vector load(const uint8_t* from) {
  Vector value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// In every 128 bits the same pair.
WIRE_FOLD_TARGET WIRE_INLINE Vector pairs(uint64_t first, uint64_t second) {
  Vector value;
  for (size_t i = 0; i < sizeof value / 8; i += 2) value[i] = first, value[i + 1] = second;
  return value;
}

// Each 128 bits of `a` moved ahead, and what lies there added.
WIRE_FOLD_TARGET WIRE_INLINE Vector fold(Vector a, Vector factors, Vector there) {
  return WIRE_FOLD_PRODUCT(a, factors, 0x00) ^ WIRE_FOLD_PRODUCT(a, factors, 0x11) ^ there;
}

template <bool kCopy>
WIRE_FOLD_TARGET inline Seen pass_of(Seen seen, const uint8_t* from, uint8_t* to, size_t n, const Search& search) {
  constexpr size_t kRegisters = 4, kStep = kRegisters * sizeof(Vector);
  if (n >= 2 * kStep) {
    const Vector mask = pairs(search.mask, search.mask), add = pairs(search.add, search.add);
    const Vector a_step = pairs(first_factor(8 * kStep), second_factor(8 * kStep));
    Vector a[kRegisters], bits = {}, start = {};
    for (size_t i = 0; i < kRegisters; ++i) a[i] = Vector{};
    start[0] = seen.crc;
    for (bool first = true; n >= kStep; first = false, from += kStep, n -= kStep) {
      for (size_t i = 0; i < kRegisters; ++i) {
        const Vector x = load(from + i * sizeof x);
        bits |= (x & mask) + add;
        if constexpr (kCopy) std::memcpy(to + i * sizeof x, &x, sizeof x);
        a[i] = fold(a[i], a_step, x);
      }
      if (first) a[0] ^= start;
      if constexpr (kCopy) to += kStep;
    }
    const Vector a_register = pairs(first_factor(8 * sizeof(Vector)), second_factor(8 * sizeof(Vector)));
    for (size_t i = 1; i < kRegisters; ++i) a[0] = fold(a[0], a_register, a[i]);
    uint8_t rest[sizeof(Vector)];  // has the checksum of all that was folded into it
    std::memcpy(rest, &a[0], sizeof rest);
    seen.crc = update_by_instruction(0, rest, sizeof rest);
    for (size_t i = 0; i < sizeof(Vector) / 8; ++i) seen.found |= bits[i];
  }
  return pass_in_chunks<update_by_instruction>(seen, from, kCopy ? to : nullptr, n, search);
}

WIRE_FOLD_TARGET inline Seen pass(Seen seen, const uint8_t* from, uint8_t* to, size_t n, const Search& search) {
  return to == nullptr ? pass_of<false>(seen, from, to, n, search) : pass_of<true>(seen, from, to, n, search);
}

#undef WIRE_FOLD_BYTES
#undef WIRE_FOLD_TARGET
#undef WIRE_FOLD_PRODUCT
