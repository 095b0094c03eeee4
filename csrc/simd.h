// Shared by the CPU kernels: numbers in SIMD vectors.
#pragma once
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstring>

#include "kernels.h"

// Compiled once per instruction set and selected when the module is loaded: AVX-512, AVX2 or baseline x86-64.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define VECTORIZED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VECTORIZED
#endif
#define INLINED __attribute__((always_inline))

// A SIMD vector of L numbers with elementwise operators (an extension of GCC and Clang).
template <class A, int L> struct Vector {
  typedef A type __attribute__((vector_size(sizeof(A) * L)));
};
template <class A, int L> using Vec = typename Vector<A, L>::type;

template <int L, class T>
INLINED inline Vec<Sum<T>, L> load(const T* p) {
  Vec<Sum<T>, L> v;
  if constexpr (std::is_same_v<T, Sum<T>>) {
    std::memcpy(&v, p, sizeof(v));
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {  // the upper 16 bits of a float
    Vec<uint16_t, L> upper;
    std::memcpy(&upper, p, sizeof(upper));
    v = (Vec<float, L>)(__builtin_convertvector(upper, Vec<uint32_t, L>) << 16);
  } else {
    for (int i = 0; i < L; ++i) v[i] = p[i];
  }
  return v;
}

template <int L, class T>
INLINED inline void store(T* p, Vec<Sum<T>, L> v) {
  if constexpr (std::is_same_v<T, Sum<T>>) {
    std::memcpy(p, &v, sizeof(v));
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {  // round to nearest, ties to even; NaN stays NaN
    auto bits = (Vec<uint32_t, L>)v;
    bits = v == v ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : Vec<uint32_t, L>{} + 0x7fc0;
    const auto upper = __builtin_convertvector(bits, Vec<uint16_t, L>);
    std::memcpy(p, &upper, sizeof(upper));
  } else {
    for (int i = 0; i < L; ++i) p[i] = v[i];
  }
}

// Calls f(L, j) for each block of channels j .. j + L of a head's d channels; L is a compile-time constant.
template <class F>
INLINED inline void for_blocks(int64_t d, F f) {
  int64_t j = 0;
  for (; j + 16 <= d; j += 16) f(std::integral_constant<int, 16>(), j);
  for (; j < d; ++j) f(std::integral_constant<int, 1>(), j);
}

// Copies d channels of n tokens, multiplied by scale; from_row and to_row are the strides between tokens.
template <class From, class To>
static VECTORIZED void copy_tokens(int64_t n, int64_t d, const From* from, int64_t from_row, To* to, int64_t to_row,
                                   Sum<To> scale = 1) {
  for (int64_t i = 0; i < n; ++i, from += from_row, to += to_row)
    for_blocks(d, [&](auto L, int64_t j) INLINED { store<L>(to + j, load<L>(from + j) * scale); });
}
