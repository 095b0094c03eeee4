// The kernels on the CPU: strips (windows.h) in parallel, vectorised over channels.
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels.h"

// Compiled once per instruction set, and chosen when the module is loaded: one binary runs on every x86-64 and uses
// AVX-512 or AVX2 where the machine has it.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VECTORISED
#endif
#define INLINED __attribute__((always_inline))

namespace {

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

template <int L, class T>
INLINED inline void store(T* p, Vec<Sum<T>, L> v) {
  if constexpr (std::is_same_v<T, Sum<T>>) {
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

// ---------------------------------------------------------------- window partition and its backward
// A call to memcpy would cost more than the few dozen bytes that it copies.
template <class Size>
INLINED inline void copy_bytes(char* __restrict to, const char* __restrict from, Size bytes) {
  int64_t size = bytes;
  for (; size >= 64; size -= 64, to += 64, from += 64) std::memcpy(to, from, 64);
  for (; size >= 16; size -= 16, to += 16, from += 16) std::memcpy(to, from, 16);
  for (; size > 0; size -= 2, to += 2, from += 2) std::memcpy(to, from, 2);
}

// Bytes are moved and no numbers computed: one function for all types.  Token by token, so that the map is one stream.
// `size` is that of a head's d channels: int64_t, or a constant, with which `copy_bytes` is a few instructions.
template <bool backward, class Size>
INLINED inline void partition_strip(const Windows& g, const Strip& t, Size size, char* map, char* windows) {
  const int64_t next_head = g.M * g.M * size, next_third = g.count() * g.heads * next_head;
  char* token = map + g.token(t.b, t.y, t.x) * 3 * g.heads * size;
  char* first = windows + g.group(0, t.window, 0, t.position) * size;
  for (int64_t i = 0; i < (backward ? t.tokens : g.M); ++i, first += size)
    for (int64_t third = 0; third < 3; ++third) {
      char* group = first + third * next_third;
      for (int64_t head = 0; head < g.heads; ++head, token += size, group += next_head) {
        if (backward) copy_bytes(token, group, size);
        else if (i < t.tokens) copy_bytes(group, token, size);
        else std::memset(group, 0, size);
      }
    }
}

template <bool backward>
VECTORISED void partition_strips(const Windows& g, int64_t itemsize, char* map, char* windows, int64_t begin,
                                 int64_t end) {
  const int64_t size = g.d * itemsize;
  for (int64_t s = begin; s < end; ++s)
    if (size == 64)
      partition_strip<backward>(g, g.strip(s), std::integral_constant<int64_t, 64>(), map, windows);
    else if (size == 128)
      partition_strip<backward>(g, g.strip(s), std::integral_constant<int64_t, 128>(), map, windows);
    else
      partition_strip<backward>(g, g.strip(s), size, map, windows);
}

// ---------------------------------------------------------------- window merge + LIM and its backward
constexpr int tile = 4;  // tokens that are computed together, so that a weight and a neighbour are loaded once for all

template <class T>
alignas(64) constexpr T zeros[16] = {};  // what the convolution sees left and right of the map

// K is int64_t, or a constant, with which the compiler unrolls the loops and keeps neighbours in registers.
template <class T, class K>
INLINED inline void merge_lim_strip(const Windows& g, const Strip& t, K k, const T* __restrict z, Strides z_strides,
                                    const T* __restrict v, const Sum<T>* __restrict weight,
                                    const Sum<T>* __restrict bias, T* __restrict out) {
  const int64_t C = g.channels(), r = k / 2;
  const int64_t ky_begin = std::max<int64_t>(0, r - t.y), ky_end = std::min<int64_t>(k, g.H + r - t.y);
  for (int64_t i = 0; i < t.tokens; i += tile) {
    const int64_t x = t.x + i, tokens = std::min<int64_t>(tile, t.tokens - i);
    const bool inside = x >= r && x + tile + r <= g.W;
    for (int64_t head = 0; head < g.heads; ++head)
      for_blocks(g.d, [&](auto lanes, int64_t j) INLINED {
        constexpr int L = lanes;
        const int64_t c = head * g.d + j;
        Vec<Sum<T>, L> sum[tile];
        for (int u = 0; u < tile; ++u) sum[u] = load<L>(bias + c);
        // The next strip is the one below: ask for the row that is new to it.
        if (ky_end == k && t.y + r + 1 < g.H)
          for (int u = 0; u < tile; ++u) __builtin_prefetch(v + g.token(t.b, t.y + r + 1, x + u) * 3 * C + c);
        const auto convolve = [&](auto inside) INLINED {
          for (int64_t ky = ky_begin; ky < ky_end; ++ky) {
            const int64_t row = g.token(t.b, t.y + ky - r, x - r) * 3 * C + c;
            for (int64_t kx = 0; kx < k; ++kx) {
              const auto w = load<L>(weight + (ky * k + kx) * C + c);
              for (int u = 0; u < tile; ++u) {
                const int64_t column = x - r + u + kx;
                sum[u] += w * load<L>(inside || (column >= 0 && column < g.W) ? v + row + (u + kx) * 3 * C : zeros<T>);
              }
            }
          }
        };
        if (inside) convolve(std::true_type());
        else convolve(std::false_type());
        const T* from =
            z + t.window * z_strides.window + head * z_strides.head + (t.position + i) * z_strides.position + j;
        T* to = out + g.token(t.b, t.y, x) * C + c;
        for (int u = 0; u < tile; ++u)
          if (u < tokens) store<L>(to + u * C, sum[u] + load<L>(from + u * z_strides.position));
      });
  }
}

template <class T>
VECTORISED void merge_lim_strips(const Windows& g, int64_t k, const T* z, Strides z_strides, const T* v,
                                 const Sum<T>* weight, const Sum<T>* bias, T* out, int64_t begin, int64_t end) {
  for (int64_t s = begin; s < end; ++s)
    if (k == 3)
      merge_lim_strip(g, g.strip(s), std::integral_constant<int64_t, 3>(), z, z_strides, v, weight, bias, out);
    else
      merge_lim_strip(g, g.strip(s), k, z, z_strides, v, weight, bias, out);
}

// V at a token went into the outputs around it, so both of its gradients are sums over the same neighbours:
// dV = Σ w dOut and dw = Σ V dOut, where tap (ky, kx) leads to the output at (y - ky + r, x - kx + r).
template <class T, class K>
INLINED inline void merge_lim_backward_strip(const Windows& g, const Strip& t, K k, const T* __restrict grad,
                                             const T* __restrict v, const Sum<T>* __restrict weight, T* __restrict dz,
                                             T* __restrict dqkv, Sum<T>* __restrict dweight) {
  const int64_t C = g.channels(), r = k / 2;
  const int64_t ky_begin = std::max<int64_t>(0, t.y + r + 1 - g.H), ky_end = std::min<int64_t>(k, t.y + r + 1);
  for (int64_t head = 0; head < g.heads; ++head)
    std::fill_n(dz + (g.group(0, t.window, head, t.position) + t.tokens) * g.d, (g.M - t.tokens) * g.d, T(0));
  for (int64_t i = 0; i < t.tokens; i += tile) {
    const int64_t x = t.x + i, tokens = std::min<int64_t>(tile, t.tokens - i), token = g.token(t.b, t.y, x);
    const bool inside = x >= r && x + tile + r <= g.W;
    for (int64_t u = 0; u < tokens; ++u) std::fill_n(dqkv + (token + u) * 3 * C, 2 * C, T(0));
    for (int64_t head = 0; head < g.heads; ++head)
      for_blocks(g.d, [&](auto lanes, int64_t j) INLINED {
        constexpr int L = lanes;
        const int64_t c = head * g.d + j;
        Vec<Sum<T>, L> value[tile], dv[tile] = {};
        for (int u = 0; u < tile; ++u) value[u] = load<L>(u < tokens ? v + (token + u) * 3 * C + c : zeros<T>);
        const auto convolve = [&](auto inside) INLINED {
          for (int64_t ky = ky_begin; ky < ky_end; ++ky) {
            const int64_t row = g.token(t.b, t.y - ky + r, x + r) * C + c;
            for (int64_t kx = 0; kx < k; ++kx) {
              const int64_t tap = (ky * k + kx) * C + c;
              const auto w = load<L>(weight + tap);
              auto dw = load<L>(dweight + tap);
              for (int u = 0; u < tile; ++u) {
                const int64_t column = x + r + u - kx;
                const auto neighbour =
                    load<L>(inside || (column >= 0 && column < g.W) ? grad + row + (u - kx) * C : zeros<T>);
                dv[u] += w * neighbour;
                dw += value[u] * neighbour;
              }
              store<L>(dweight + tap, dw);
            }
          }
        };
        if (inside) convolve(std::true_type());
        else convolve(std::false_type());
        T* dz_group = dz + g.group(0, t.window, head, t.position + i) * g.d + j;
        auto dbias = load<L>(dweight + k * k * C + c);
        for (int u = 0; u < tile; ++u)
          if (u < tokens) {
            const auto own = load<L>(grad + (token + u) * C + c);
            dbias += own;
            store<L>(dz_group + u * g.d, own);
            store<L>(dqkv + ((token + u) * 3 + 2) * C + c, dv[u]);
          }
        store<L>(dweight + k * k * C + c, dbias);
      });
  }
}

template <class T>
VECTORISED void merge_lim_backward_strips(const Windows& g, int64_t k, const T* grad, const T* v, const Sum<T>* weight,
                                          T* dz, T* dqkv, Sum<T>* dweight, int64_t begin, int64_t end) {
  for (int64_t s = begin; s < end; ++s)
    if (k == 3)
      merge_lim_backward_strip(g, g.strip(s), std::integral_constant<int64_t, 3>(), grad, v, weight, dz, dqkv, dweight);
    else
      merge_lim_backward_strip(g, g.strip(s), k, grad, v, weight, dz, dqkv, dweight);
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

// As many strips as are worth a thread of their own.
int64_t grain(const Windows& g) { return 1 + 16384 / (g.M * g.channels()); }

}  // namespace

void cpu::partition(const Windows& g, int64_t itemsize, void* map, void* windows, bool backward) {
  at::parallel_for(0, g.strips(), grain(g), [&](int64_t begin, int64_t end) {
    (backward ? partition_strips<true> : partition_strips<false>)(g, itemsize, (char*)map, (char*)windows, begin, end);
  });
}

void cpu::merge_lim(const Windows& g, Type type, int64_t k, const void* z, Strides z_strides, const void* qkv,
                    const void* weight, const void* bias, void* out) {
  with_type(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    at::parallel_for(0, g.strips(), grain(g), [&](int64_t begin, int64_t end) {
      merge_lim_strips(g, k, (const T*)z, z_strides, (const T*)qkv + 2 * g.channels(), (const Sum<T>*)weight,
                       (const Sum<T>*)bias, (T*)out, begin, end);
    });
  });
}

void cpu::merge_lim_backward(const Windows& g, Type type, int64_t k, const void* grad, const void* qkv,
                             const void* weight, void* dz, void* dqkv, void* dweight, void* dbias, void* parts) {
  with_type(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const int64_t C = g.channels(), taps = k * k, size = (taps + 1) * C;
    const auto first_strip = [&](int64_t part) { return g.strips() * part / cpu_parts; };
    at::parallel_for(0, cpu_parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Sum<T>* part = (Sum<T>*)parts + i * size;
        std::fill_n(part, size, Sum<T>(0));
        merge_lim_backward_strips(g, k, (const T*)grad, (const T*)qkv + 2 * C, (const Sum<T>*)weight, (T*)dz, (T*)dqkv,
                                  part, first_strip(i), first_strip(i + 1));
      }
    });
    Sum<T>* total = (Sum<T>*)parts;
    for (int64_t i = 1; i < cpu_parts; ++i)
      for (int64_t j = 0; j < size; ++j) total[j] += total[i * size + j];
    for (int64_t c = 0; c < C; ++c)
      for (int64_t tap = 0; tap < taps; ++tap) ((Sum<T>*)dweight)[c * taps + tap] = total[tap * C + c];
    std::copy_n(total + taps * C, C, (Sum<T>*)dbias);
  });
}
