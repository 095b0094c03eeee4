// Shared by the CPU kernels: SIMD vectors, and LIM.
#pragma once
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "kernels.h"

// Compiled once per instruction set and selected when the module is loaded: AVX-512, AVX2 or baseline x86-64.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define VECTORIZED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VECTORIZED
#endif
#define INLINED __attribute__((always_inline))

// The accumulation type.
template <class T> using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

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
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {  // round to nearest, ties to even; NaN stays NaN
    Vec<uint32_t, L> bits;
    std::memcpy(&bits, &v, sizeof(v));
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

// Calls f(i, neighbor) for each token i of a strip whose neighbor at offset (dy, dx) is inside the map.
template <class F>
INLINED inline void for_neighbors(const Windows& g, const Strip& t, int64_t dy, int64_t dx, F f) {
  if (t.y + dy < 0 || t.y + dy >= g.H) return;
  const int64_t begin = std::max<int64_t>(0, -dx - t.x), end = std::min(t.tokens, g.W - dx - t.x);
  for (int64_t i = begin; i < end; ++i) f(i, g.token(t.b, t.y + dy, t.x + dx + i));
}

// Adds F(V) of equation (5) to a strip, for the d channels from `channel` on.  `row`: stride of `to`.  v: V in qkv.
template <class T>
static VECTORIZED void add_lim(const Windows& g, const Strip& t, int64_t channel, int64_t k, const T* v,
                               const Sum<T>* weight, const Sum<T>* bias, Sum<T>* to, int64_t row) {
  for_blocks(g.d, [&](auto L, int64_t j) INLINED {
    const int64_t C = g.channels(), c = channel + j;
    const auto add = [&](Sum<T>* sum, auto more) INLINED { store<L>(sum, load<L>(sum) + more); };
    for (int64_t i = 0; i < t.tokens; ++i) add(to + i * row + j, load<L>(bias + c));
    for (int64_t tap = 0; tap < k * k; ++tap) {
      const auto w = load<L>(weight + tap * C + c);
      for_neighbors(g, t, tap / k - k / 2, tap % k - k / 2, [&](int64_t i, int64_t neighbor) INLINED {
        add(to + i * row + j, w * load<L>(v + neighbor * 3 * C + c));
      });
    }
  });
}

// V at a token contributes to the outputs around it, so both gradients are sums over the same neighbors: Σ w dOut is
// added to dv, and V dOut to sums (k² + 1, C), whose last row belongs to the bias.
template <class T>
static VECTORIZED void add_lim_backward(const Windows& g, const Strip& t, int64_t channel, int64_t k, const T* grad,
                                        const T* v, const Sum<T>* weight, Sum<T>* sums, Sum<T>* dv, int64_t row) {
  for_blocks(g.d, [&](auto L, int64_t j) INLINED {
    const int64_t C = g.channels(), c = channel + j, first = g.token(t.b, t.y, t.x);
    for (int64_t tap = 0; tap <= k * k; ++tap) {
      auto sum = load<L>(sums + tap * C + c);
      if (tap == k * k) {
        for (int64_t i = 0; i < t.tokens; ++i) sum += load<L>(grad + (first + i) * C + c);
      } else {
        const auto w = load<L>(weight + tap * C + c);
        for_neighbors(g, t, k / 2 - tap / k, k / 2 - tap % k, [&](int64_t i, int64_t neighbor) INLINED {
          const auto dout = load<L>(grad + neighbor * C + c);
          store<L>(dv + i * row + j, load<L>(dv + i * row + j) + w * dout);
          sum += load<L>(v + (first + i) * 3 * C + c) * dout;
        });
      }
      store<L>(sums + tap * C + c, sum);
    }
  });
}

// Gradients of weight and bias.  work(sums, begin, end) adds those of pieces begin .. end to sums (k² + 1, C).
template <class A, class F>
void sum_in_parts(int64_t pieces, int64_t C, int64_t k, A* parts, A* dweight, A* dbias, F work) {
  const int64_t size = (k * k + 1) * C, n = std::clamp<int64_t>(pieces, 1, 32);
  std::fill_n(parts, n * size, A(0));
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(parts + i * size, pieces * i / n, pieces * (i + 1) / n);
  });
  for (int64_t j = size; j < n * size; ++j) parts[j % size] += parts[j];
  for (int64_t j = 0; j < size; ++j) (j < k * k * C ? dweight[j % C * k * k + j / C] : dbias[j % C]) = parts[j];
}

// Calls f with a null T*, which carries the type.
template <class F>
void with_type(Type type, F f) {
  switch (type) {
    case Type::Float32: return f((float*)nullptr);
    case Type::Float64: return f((double*)nullptr);
    case Type::BFloat16: return f((c10::BFloat16*)nullptr);
    case Type::Float16: return f((c10::Half*)nullptr);
  }
}
