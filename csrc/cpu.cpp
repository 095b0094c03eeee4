// The operators on the CPU: strips (windows.h) in parallel, vectorised over channels.
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "kernels.h"

// Compiled once per instruction set and chosen when the module is loaded: the same binary runs everywhere, and uses
// AVX-512 or AVX2 where the machine has it.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VECTORISED
#endif
#define INLINED __attribute__((always_inline))

namespace {

using c10::BFloat16;
using c10::Half;

// The type that sums are formed in.
template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

// L numbers side by side (an extension of GCC and Clang): operators work lane by lane at any register width.
template <class A, int L>
struct Lanes {
  typedef A type __attribute__((vector_size(sizeof(A) * L)));
};
template <class A, int L>
using Vec = typename Lanes<A, L>::type;

template <int L, class T>
INLINED inline Vec<Sum<T>, L> load(const T* p) {
  Vec<Sum<T>, L> v;
  if constexpr (std::is_same_v<T, Sum<T>>) {
    std::memcpy(&v, p, sizeof(v));
  } else if constexpr (std::is_same_v<T, BFloat16>) {  // the upper half of a float
    Vec<uint16_t, L> upper;
    std::memcpy(&upper, p, sizeof(upper));
    const Vec<uint32_t, L> bits = __builtin_convertvector(upper, Vec<uint32_t, L>) << 16;
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
  } else if constexpr (std::is_same_v<T, BFloat16>) {  // round to nearest, ties to even; NaN stays NaN
    Vec<uint32_t, L> bits;
    std::memcpy(&bits, &v, sizeof(v));
    bits = v == v ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : Vec<uint32_t, L>{} + 0x7fc0;
    const Vec<uint16_t, L> upper = __builtin_convertvector(bits, Vec<uint16_t, L>);
    std::memcpy(p, &upper, sizeof(upper));
  } else {
    for (int i = 0; i < L; ++i) p[i] = v[i];
  }
}

// Calls f(lanes, j) for blocks of channels j .. j + lanes that cover one head's d channels.
template <class F>
INLINED inline void for_blocks(int64_t d, F f) {
  int64_t j = 0;
  for (; j + 16 <= d; j += 16) f(std::integral_constant<int, 16>(), j);
  for (; j + 8 <= d; j += 8) f(std::integral_constant<int, 8>(), j);
  for (; j < d; ++j) f(std::integral_constant<int, 1>(), j);
}

// ------------------------------------------------------------------ window partition, either way
template <class T>
VECTORISED void partition_strips(const Windows& g, const T* __restrict qkv, T* __restrict out, int64_t begin, int64_t end) {
  const int64_t C3 = 3 * g.channels();
  for (int64_t s = begin; s < end; ++s) {
    const Strip t = g.strip(s);
    const T* from = qkv + g.token(t.b, t.y, t.x) * C3;
    for (int64_t third = 0; third < 3; ++third)
      for (int64_t head = 0; head < g.heads; ++head, from += g.d) {
        T* to = out + g.group(third, t.window, head, t.position) * g.d;
        for (int64_t i = 0; i < t.tokens; ++i, to += g.d)
          std::memcpy(to, from + i * C3, g.d * sizeof(T));
        std::memset((void*)to, 0, (g.M - t.tokens) * g.d * sizeof(T));
      }
  }
}

template <class T>
VECTORISED void partition_backward_strips(const Windows& g, const T* __restrict grad, T* __restrict out, int64_t begin, int64_t end) {
  const int64_t C3 = 3 * g.channels();
  for (int64_t s = begin; s < end; ++s) {
    const Strip t = g.strip(s);
    T* to = out + g.token(t.b, t.y, t.x) * C3;
    for (int64_t third = 0; third < 3; ++third)
      for (int64_t head = 0; head < g.heads; ++head, to += g.d) {
        const T* from = grad + g.group(third, t.window, head, t.position) * g.d;
        for (int64_t i = 0; i < t.tokens; ++i)
          std::memcpy(to + i * C3, from + i * g.d, g.d * sizeof(T));
      }
  }
}

// ------------------------------------------------------------------ window merge + LIM
template <class T>
VECTORISED void merge_lim_strips(const Windows& g, int64_t k, const T* __restrict z, Strides zs, const T* __restrict v, const Sum<T>* __restrict weight, const Sum<T>* __restrict bias, T* __restrict out, int64_t begin, int64_t end) {
  const int64_t C = g.channels(), r = k / 2;
  for (int64_t s = begin; s < end; ++s) {
    const Strip t = g.strip(s);
    const int64_t ky0 = std::max<int64_t>(0, r - t.y), ky1 = std::min(k, g.H + r - t.y);
    for (int64_t head = 0; head < g.heads; ++head)
      for_blocks(g.d, [&](auto lanes, int64_t j) INLINED {
        constexpr int L = lanes;
        const int64_t c = head * g.d + j;
        for (int64_t i = 0; i < t.tokens; ++i) {
          const int64_t x = t.x + i;
          const int64_t kx0 = std::max<int64_t>(0, r - x), kx1 = std::min(k, g.W + r - x);
          auto sum = load<L>(bias + c);
          for (int64_t ky = ky0; ky < ky1; ++ky)
            for (int64_t kx = kx0; kx < kx1; ++kx)
              sum += load<L>(weight + (ky * k + kx) * C + c) * load<L>(v + g.token(t.b, t.y + ky - r, x + kx - r) * 3 * C + c);
          sum += load<L>(z + t.window * zs.window + head * zs.head + (t.position + i) * zs.position + j);
          store<L>(out + g.token(t.b, t.y, x) * C + c, sum);
        }
      });
  }
}

template <class T>
VECTORISED void merge_lim_backward_strips(const Windows& g, int64_t k, const T* __restrict grad, const T* __restrict v, const Sum<T>* __restrict weight, T* __restrict dz, T* __restrict dqkv, Sum<T>* __restrict dweight, int64_t begin, int64_t end) {
  const int64_t C = g.channels(), r = k / 2;
  for (int64_t s = begin; s < end; ++s) {
    const Strip t = g.strip(s);
    const int64_t ky0 = std::max<int64_t>(0, t.y + r + 1 - g.H), ky1 = std::min(k, t.y + r + 1);
    for (int64_t i = 0; i < t.tokens; ++i)
      std::memset((void*)(dqkv + g.token(t.b, t.y, t.x + i) * 3 * C), 0, 2 * C * sizeof(T));
    for (int64_t head = 0; head < g.heads; ++head) {
      T* dz_group = dz + g.group(0, t.window, head, t.position) * g.d;
      std::memset((void*)(dz_group + t.tokens * g.d), 0, (g.M - t.tokens) * g.d * sizeof(T));
      for_blocks(g.d, [&](auto lanes, int64_t j) INLINED {
        constexpr int L = lanes;
        const int64_t c = head * g.d + j;
        for (int64_t i = 0; i < t.tokens; ++i) {
          const int64_t x = t.x + i, token = g.token(t.b, t.y, x);
          const int64_t kx0 = std::max<int64_t>(0, x + r + 1 - g.W), kx1 = std::min(k, x + r + 1);
          const auto value = load<L>(v + token * 3 * C + c);
          Vec<Sum<T>, L> dv = {};
          for (int64_t ky = ky0; ky < ky1; ++ky)
            for (int64_t kx = kx0; kx < kx1; ++kx) {
              const auto d_out = load<L>(grad + g.token(t.b, t.y - ky + r, x - kx + r) * C + c);
              const int64_t tap = (ky * k + kx) * C + c;
              dv += load<L>(weight + tap) * d_out;
              store<L>(dweight + tap, load<L>(dweight + tap) + value * d_out);
            }
          const auto d_out = load<L>(grad + token * C + c);
          store<L>(dweight + k * k * C + c, load<L>(dweight + k * k * C + c) + d_out);
          store<L>(dqkv + token * 3 * C + 2 * C + c, dv);
          store<L>(dz_group + i * g.d + j, d_out);
        }
      });
    }
  }
}

// Calls f with a null pointer of the activations' type.
template <class F>
void dispatch(Type type, F f) {
  switch (type) {
    case Type::Float32: return f((float*)nullptr);
    case Type::Float64: return f((double*)nullptr);
    case Type::BFloat16: return f((BFloat16*)nullptr);
    case Type::Float16: return f((Half*)nullptr);
  }
}

}  // namespace

namespace cpu {

// Fewer strips than this are not worth a thread of their own.
int64_t grain(const Windows& g) { return 1 + 16384 / (g.M * g.channels()); }

void partition(const Windows& g, Type type, const void* qkv, void* windows) {
  dispatch(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    at::parallel_for(0, g.strips(), grain(g), [&](int64_t begin, int64_t end) {
      partition_strips<T>(g, (const T*)qkv, (T*)windows, begin, end);
    });
  });
}

void partition_backward(const Windows& g, Type type, const void* grad, void* dqkv) {
  dispatch(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    at::parallel_for(0, g.strips(), grain(g), [&](int64_t begin, int64_t end) {
      partition_backward_strips<T>(g, (const T*)grad, (T*)dqkv, begin, end);
    });
  });
}

void merge_lim(const Windows& g, Type type, int64_t k, const void* z, Strides zs, const void* qkv, const void* weight, const void* bias, void* out) {
  dispatch(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    at::parallel_for(0, g.strips(), grain(g), [&](int64_t begin, int64_t end) {
      merge_lim_strips<T>(g, k, (const T*)z, zs, (const T*)qkv + 2 * g.channels(), (const Sum<T>*)weight,
                          (const Sum<T>*)bias, (T*)out, begin, end);
    });
  });
}

void merge_lim_backward(const Windows& g, Type type, int64_t k, const void* grad, const void* qkv, const void* weight, void* dz, void* dqkv, int64_t chunks, void* partials) {
  dispatch(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const int64_t size = (k * k + 1) * g.channels(), strips = (g.strips() + chunks - 1) / chunks;
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Sum<T>* partial = (Sum<T>*)partials + i * size;
        std::fill(partial, partial + size, Sum<T>(0));
        merge_lim_backward_strips<T>(g, k, (const T*)grad, (const T*)qkv + 2 * g.channels(), (const Sum<T>*)weight, (T*)dz, (T*)dqkv, partial,
           std::min(i * strips, g.strips()), std::min((i + 1) * strips, g.strips()));
      }
    });
  });
}

}  // namespace cpu
