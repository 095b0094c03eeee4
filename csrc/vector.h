// Numbers in vector registers, for the kernels on the CPU.
#pragma once
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "kernels.h"

// Compiled once per instruction set, and chosen when the module is loaded: one binary runs on every x86-64 and uses
// AVX-512 or AVX2 where the machine has it.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define BFLOAT16_PAIRS __attribute__((target("arch=x86-64-v4")))  // for what calls AVX512-BF16's instruction by name
#else
#define VECTORISED
#endif
#define INLINED __attribute__((always_inline))

// ---------------------------------------------------------------- whole cache lines, past the caches
// An ordinary store fetches the line that it will overwrite; one that goes past the caches does not.  That pays where
// what is written does not stay in a core's own cache anyway: a thread's share of it has more than 2 MiB.
constexpr int64_t cache_line = 64;  // bytes

// `bytes` in all, in pieces of `piece` bytes.  Each has to begin and end with a line: `stream_line` needs that.
inline bool stream_pays(const void* to, int64_t bytes, int64_t piece) {
  return (uintptr_t)to % cache_line == 0 && piece % cache_line == 0 && bytes / at::get_num_threads() > (2 << 20);
}

INLINED inline void stream_line(void* to, const void* from) {
#ifdef __SSE2__
  for (int i = 0; i < 4; ++i) _mm_stream_si128((__m128i*)to + i, _mm_loadu_si128((const __m128i*)from + i));
#else
  std::memcpy(to, from, cache_line);
#endif
}

INLINED inline void end_stream() {  // before another thread reads what was written
#ifdef __SSE2__
  _mm_sfence();
#endif
}

template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

// ---------------------------------------------------------------- L channels at once
// An extension of GCC and Clang: operators work on all L numbers, in as many registers as that takes.
template <class A, int L>
struct Vector {
  typedef A type __attribute__((vector_size(sizeof(A) * L)));
};
template <class A, int L>
using Vec = typename Vector<A, L>::type;

// A bfloat16 is the upper half of a float: L of them between zeros.
template <int L, int... I>
INLINED inline Vec<uint16_t, 2 * L> below_zeros(Vec<uint16_t, L> upper, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(upper, Vec<uint16_t, L>{}, (I % 2 ? I / 2 : L)...);
}

template <int L, class T>
INLINED inline Vec<Sum<T>, L> load(const T* p) {
  Vec<Sum<T>, L> v;
  if constexpr (std::is_same_v<T, Sum<T>>) {
    std::memcpy(&v, p, sizeof(v));
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
    Vec<uint16_t, L> upper;
    std::memcpy(&upper, p, sizeof(upper));
    const auto bits = below_zeros<L>(upper, std::make_integer_sequence<int, 2 * L>());
    std::memcpy(&v, &bits, sizeof(v));
  } else {
    for (int i = 0; i < L; ++i) v[i] = p[i];
  }
  return v;
}

template <int L, class T, bool streamed = false>
INLINED inline void store(T* p, Vec<Sum<T>, L> v) {
  if constexpr (streamed && sizeof(v) % cache_line == 0) {
    for (size_t i = 0; i < sizeof(v); i += cache_line) stream_line((char*)p + i, (const char*)&v + i);
  } else if constexpr (std::is_same_v<T, Sum<T>>) {
    std::memcpy(p, &v, sizeof(v));
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {  // to the nearest, ties to even; NaN stays NaN
    Vec<uint32_t, L> bits;
    std::memcpy(&bits, &v, sizeof(v));
    bits = v == v ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : Vec<uint32_t, L>{} + 0x7fc0;
    const Vec<uint16_t, L> upper = __builtin_convertvector(bits, Vec<uint16_t, L>);
    std::memcpy(p, &upper, sizeof(upper));
  } else {
    for (int i = 0; i < L; ++i) p[i] = v[i];
  }
}

// Calls f(L, j) for blocks of channels j .. j + L that make up one head's d; L is known at compile time.
template <class F>
INLINED inline void for_blocks(int64_t d, F f) {
  int64_t j = 0;
  for (; j + 16 <= d; j += 16) f(std::integral_constant<int, 16>(), j);
  for (; j + 8 <= d; j += 8) f(std::integral_constant<int, 8>(), j);
  for (; j < d; ++j) f(std::integral_constant<int, 1>(), j);
}

// Calls f with a T*, null, that says the type.
template <class F>
void with_type(Type type, F f) {
  switch (type) {
    case Type::Float32: return f((float*)nullptr);
    case Type::Float64: return f((double*)nullptr);
    case Type::BFloat16: return f((c10::BFloat16*)nullptr);
    case Type::Float16: return f((c10::Half*)nullptr);
  }
}
