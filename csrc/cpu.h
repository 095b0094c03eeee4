// What the kernels on the CPU share: numbers in vector registers, and LIM at one token.
#pragma once
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "kernels.h"

// Compiled once per instruction set and chosen when the module is loaded: AVX-512, AVX2, or what every x86-64 has.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VECTORISED
#endif
#define INLINED __attribute__((always_inline))

template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;  // the type that sums are formed in

// L numbers at once: an extension of GCC and Clang, whose operators work on all of them.
template <class A, int L>
struct Vector {
  typedef A type __attribute__((vector_size(sizeof(A) * L)));
};
template <class A, int L>
using Vec = typename Vector<A, L>::type;

template <int L, class T>
INLINED inline Vec<Sum<T>, L> load(const T* p) {
  Vec<Sum<T>, L> v;
  if constexpr (std::is_same_v<T, Sum<T>>) {
    std::memcpy(&v, p, sizeof(v));
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {  // the upper half of a float
    Vec<uint16_t, L> upper;
    std::memcpy(&upper, p, sizeof(upper));
    const auto bits = __builtin_convertvector(upper, Vec<uint32_t, L>) << 16;
    std::memcpy(&v, &bits, sizeof(v));
  } else {
    for (int i = 0; i < L; ++i) v[i] = p[i];
  }
  return v;
}

template <int L, class T>
INLINED inline void store(T* p, Vec<Sum<T>, L> v) {
  if constexpr (std::is_same_v<T, Sum<T>>) {
    std::memcpy(p, &v, sizeof(v));
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {  // to the nearest, ties to even; NaN stays NaN
    Vec<uint32_t, L> bits;
    std::memcpy(&bits, &v, sizeof(v));
    bits = v == v ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : Vec<uint32_t, L>{} + 0x7fc0;
    const auto upper = __builtin_convertvector(bits, Vec<uint16_t, L>);
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
  for (; j < d; ++j) f(std::integral_constant<int, 1>(), j);
}

// F(V) of equation (5) at token (b, y, x), L channels from c on.  v points at V in (B, H, W, 3C), taps is (k², C).
template <int L, class T>
INLINED inline Vec<Sum<T>, L> lim(const Windows& g, int64_t b, int64_t y, int64_t x, int64_t c, int64_t k, const T* v,
                                  const Sum<T>* taps, const Sum<T>* bias) {
  const int64_t C = g.channels(), r = k / 2;
  auto sum = load<L>(bias + c);
  for (int64_t ky = std::max<int64_t>(0, r - y); ky < std::min(k, g.H + r - y); ++ky)
    for (int64_t kx = std::max<int64_t>(0, r - x); kx < std::min(k, g.W + r - x); ++kx)
      sum += load<L>(taps + (ky * k + kx) * C + c) * load<L>(v + g.token(b, y + ky - r, x + kx - r) * 3 * C + c);
  return sum;
}

// V at a token went into the outputs around it, so both of its gradients are sums over the same neighbours: returns
// dV = Σ w dOut and adds V dOut to sums (k² + 1, C), whose last row is the bias.  Tap (ky, kx) leads to the output at
// (y - ky + r, x - kx + r).
template <int L, class T>
INLINED inline Vec<Sum<T>, L> lim_backward(const Windows& g, int64_t b, int64_t y, int64_t x, int64_t c, int64_t k,
                                           const T* grad, const T* v, const Sum<T>* taps, Sum<T>* sums) {
  const int64_t C = g.channels(), r = k / 2, token = g.token(b, y, x), bias = k * k * C + c;
  const auto value = load<L>(v + token * 3 * C + c);
  Vec<Sum<T>, L> dv = {};
  for (int64_t ky = std::max<int64_t>(0, y + r + 1 - g.H); ky < std::min(k, y + r + 1); ++ky)
    for (int64_t kx = std::max<int64_t>(0, x + r + 1 - g.W); kx < std::min(k, x + r + 1); ++kx) {
      const auto output = load<L>(grad + g.token(b, y - ky + r, x - kx + r) * C + c);
      const int64_t tap = (ky * k + kx) * C + c;
      dv += load<L>(taps + tap) * output;
      store<L>(sums + tap, load<L>(sums + tap) + value * output);
    }
  store<L>(sums + bias, load<L>(sums + bias) + load<L>(grad + token * C + c));
  return dv;
}

// Gradients of weight (C, k²) and bias: work(sums, begin, end) adds those of windows begin .. end to sums (k² + 1, C).
// The number of parts follows from the shape alone and they are added up in order: the same bits for any threads.
template <class A, class F>
void sum_in_parts(const Windows& g, int64_t k, A* dweight, A* dbias, F work) {
  const int64_t C = g.channels(), size = (k * k + 1) * C, parts = std::clamp<int64_t>(g.count(), 1, 32);
  std::vector<A> sums(parts * size);
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      work(sums.data() + i * size, g.count() * i / parts, g.count() * (i + 1) / parts);
  });
  for (int64_t j = size; j < parts * size; ++j) sums[j % size] += sums[j];
  for (int64_t j = 0; j < k * k * C; ++j) dweight[j % C * k * k + j / C] = sums[j];
  std::copy_n(sums.data() + k * k * C, C, dbias);
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
