// The kernels on the CPU: strips (windows.h) in parallel, vectorised over channels.
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

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
template <class T>
alignas(64) constexpr T zeros[16] = {};  // what lies beyond the map's border

// n rows of a map from row y on, at column x and channel 0; `stride` numbers from token to token.
template <class T, int n>
struct Rows {
  const T* at[n];
  int64_t stride[n];  // 0 where the row is beyond the border

  INLINED Rows(const Windows& g, int64_t b, int64_t y, int64_t x, const T* map, int64_t stride_) {
    for (int i = 0; i < n; ++i) {
      const bool inside = y + i >= 0 && y + i < g.H;
      at[i] = inside ? map + g.token(b, y + i, x) * stride_ : zeros<T>;
      stride[i] = inside ? stride_ : 0;
    }
  }
};

// L channels, from c on, of a token's neighbours: columns x - 1, x and x + 1 of n rows.  They move along the map, and a
// step loads the one column that is new: the convolution loads a token once per row, not three times.
template <class T, int L, int n>
struct Neighbours {
  Vec<Sum<T>, L> at[n][3];
  const T* next[n];  // column x + 1

  INLINED Neighbours(const Rows<T, n>& rows, int64_t c, bool left_inside) {  // one step before the rows' column
    for (int i = 0; i < n; ++i) {
      next[i] = rows.stride[i] ? rows.at[i] + c : zeros<T>;
      at[i][1] = load<L>(left_inside ? next[i] - rows.stride[i] : zeros<T>);
      at[i][2] = load<L>(next[i]);
    }
  }

  INLINED void move(const Rows<T, n>& rows, bool right_inside) {
    for (int i = 0; i < n; ++i) {
      next[i] += rows.stride[i];
      at[i][0] = at[i][1];
      at[i][1] = at[i][2];
      at[i][2] = load<L>(right_inside ? next[i] : zeros<T>);
    }
  }
};

// k = 3: two rows of the map at a time, since they share half of their neighbours.  taps (9, C).
template <class T>
INLINED inline void merge_lim_3x3(const Windows& g, int64_t strip, const T* z, Strides z_strides, const T* v,
                                  const Sum<T>* taps, const Sum<T>* bias, T* out) {
  const Strip t = g.strip(strip), below = g.strip(strip + g.w);
  const bool two = t.y + 1 < g.H;
  const int64_t C = g.channels();
  const Rows<T, 4> rows(g, t.b, t.y - 1, t.x, v, 3 * C);
  const T* upper_z = z + t.window * z_strides.window + t.position * z_strides.position;
  const T* lower_z = z + below.window * z_strides.window + below.position * z_strides.position;
  T* first = out + g.token(t.b, t.y, t.x) * C;
  // What will be needed soon, on its way from memory meanwhile: V in the next two rows, Z in the next windows.
  const T* ahead = v + g.token(t.b, std::min(t.y + 3, g.H - 1), t.x) * 3 * C;
  const int64_t ahead_below = t.y + 4 < g.H ? g.W * 3 * C : 0;
  for (int64_t head = 0; head < g.heads; ++head)
    for_blocks(g.d, [&](auto lanes, int64_t j) INLINED {
      constexpr int L = lanes;
      const int64_t c = head * g.d + j, z_offset = head * z_strides.head + j;
      Vec<Sum<T>, L> weight[9];
      for (int tap = 0; tap < 9; ++tap) weight[tap] = load<L>(taps + tap * C + c);
      const auto b = load<L>(bias + c);
      Neighbours<T, L, 4> near(rows, c, t.x > 0);
      for (int64_t i = 0; i < t.tokens; ++i) {
        near.move(rows, t.x + i + 1 < g.W);
        __builtin_prefetch(ahead + i * 3 * C + c);
        __builtin_prefetch(ahead + i * 3 * C + c + ahead_below);
        __builtin_prefetch(upper_z + i * z_strides.position + z_offset + z_strides.window);
        __builtin_prefetch(lower_z + i * z_strides.position + z_offset + z_strides.window);
        Vec<Sum<T>, L> upper = b, lower = b;
        for (int ky = 0; ky < 3; ++ky)
          for (int kx = 0; kx < 3; ++kx) {
            upper += weight[ky * 3 + kx] * near.at[ky][kx];
            lower += weight[ky * 3 + kx] * near.at[ky + 1][kx];
          }
        store<L>(first + i * C + c, upper + load<L>(upper_z + i * z_strides.position + z_offset));
        if (two) store<L>(first + (g.W + i) * C + c, lower + load<L>(lower_z + i * z_strides.position + z_offset));
      }
    });
}

// Any k: the sum as it is written, one token at a time.
template <class T>
INLINED inline void merge_lim_strip(const Windows& g, const Strip& t, int64_t k, const T* z, Strides z_strides,
                                    const T* v, const Sum<T>* taps, const Sum<T>* bias, T* out) {
  const int64_t C = g.channels(), r = k / 2;
  for (int64_t i = 0, x = t.x; i < t.tokens; ++i, ++x)
    for (int64_t head = 0; head < g.heads; ++head)
      for_blocks(g.d, [&](auto lanes, int64_t j) INLINED {
        constexpr int L = lanes;
        const int64_t c = head * g.d + j;
        auto sum = load<L>(bias + c);
        for (int64_t ky = std::max<int64_t>(0, r - t.y); ky < std::min(k, g.H + r - t.y); ++ky)
          for (int64_t kx = std::max<int64_t>(0, r - x); kx < std::min(k, g.W + r - x); ++kx)
            sum += load<L>(taps + (ky * k + kx) * C + c) *
                   load<L>(v + g.token(t.b, t.y + ky - r, x + kx - r) * 3 * C + c);
        const T* own =
            z + t.window * z_strides.window + head * z_strides.head + (t.position + i) * z_strides.position + j;
        store<L>(out + g.token(t.b, t.y, x) * C + c, sum + load<L>(own));
      });
}

// Pairs of rows begin .. end: the strips of the upper row, each with the strip below.
template <class T>
VECTORISED void merge_lim_pairs(const Windows& g, int64_t k, const T* z, Strides z_strides, const T* v,
                                const Sum<T>* taps, const Sum<T>* bias, T* out, int64_t begin, int64_t end) {
  const int64_t pairs = (g.H + 1) / 2;
  for (int64_t pair = begin; pair < end; ++pair) {
    const int64_t first = (pair / pairs * g.h * g.M + pair % pairs * 2) * g.w;
    for (int64_t s = first; s < first + g.w; ++s)
      if (k == 3) {
        merge_lim_3x3(g, s, z, z_strides, v, taps, bias, out);
      } else {
        merge_lim_strip(g, g.strip(s), k, z, z_strides, v, taps, bias, out);
        if (g.strip(s).y + 1 < g.H) merge_lim_strip(g, g.strip(s + g.w), k, z, z_strides, v, taps, bias, out);
      }
  }
}

// V at a token went into the outputs around it, so both of its gradients are sums over the same neighbours:
// dV = Σ w dOut and dw = Σ V dOut, where tap (ky, kx) leads to the output at (y - ky + r, x - kx + r).
// sums (k² + 1, C) collects dw and, as its last row, the gradient of the bias.
template <class T>
INLINED inline void merge_lim_3x3_backward(const Windows& g, const Strip& t, const T* grad, const T* v,
                                           const Sum<T>* taps, T* dz, T* dqkv, Sum<T>* sums) {
  const int64_t C = g.channels(), token = g.token(t.b, t.y, t.x);
  const Rows<T, 3> rows(g, t.b, t.y - 1, t.x, grad, C);
  const T* value = v + token * 3 * C;
  T* dv = dqkv + (token * 3 + 2) * C;
  const T* ahead = grad + g.token(t.b, std::min(t.y + 2, g.H - 1), t.x) * C;
  for (int64_t head = 0; head < g.heads; ++head) {
    T* dz_group = dz + g.group(0, t.window, head, t.position) * g.d;
    for_blocks(g.d, [&](auto lanes, int64_t j) INLINED {
      constexpr int L = lanes;
      const int64_t c = head * g.d + j;
      Vec<Sum<T>, L> weight[9], dweight[9], dbias = load<L>(sums + 9 * C + c);
      for (int tap = 0; tap < 9; ++tap) {
        weight[tap] = load<L>(taps + tap * C + c);
        dweight[tap] = load<L>(sums + tap * C + c);
      }
      Neighbours<T, L, 3> near(rows, c, t.x > 0);
      for (int64_t i = 0; i < t.tokens; ++i) {
        near.move(rows, t.x + i + 1 < g.W);
        __builtin_prefetch(ahead + i * C + c);
        __builtin_prefetch(value + (i + t.tokens) * 3 * C + c);
        const auto own = load<L>(value + i * 3 * C + c);
        Vec<Sum<T>, L> sum = {};
        for (int ky = 0; ky < 3; ++ky)
          for (int kx = 0; kx < 3; ++kx) {
            sum += weight[ky * 3 + kx] * near.at[2 - ky][2 - kx];
            dweight[ky * 3 + kx] += own * near.at[2 - ky][2 - kx];
          }
        dbias += near.at[1][1];
        store<L>(dv + i * 3 * C + c, sum);
        std::memcpy(dz_group + i * g.d + j, rows.at[1] + i * C + c, L * sizeof(T));
      }
      for (int tap = 0; tap < 9; ++tap) store<L>(sums + tap * C + c, dweight[tap]);
      store<L>(sums + 9 * C + c, dbias);
    });
  }
}

template <class T>
INLINED inline void merge_lim_strip_backward(const Windows& g, const Strip& t, int64_t k, const T* grad, const T* v,
                                             const Sum<T>* taps, T* dz, T* dqkv, Sum<T>* sums) {
  const int64_t C = g.channels(), r = k / 2;
  for (int64_t i = 0, x = t.x; i < t.tokens; ++i, ++x)
    for (int64_t head = 0; head < g.heads; ++head)
      for_blocks(g.d, [&](auto lanes, int64_t j) INLINED {
        constexpr int L = lanes;
        const int64_t c = head * g.d + j, token = g.token(t.b, t.y, x);
        const auto value = load<L>(v + token * 3 * C + c), own = load<L>(grad + token * C + c);
        Vec<Sum<T>, L> sum = {};
        for (int64_t ky = std::max<int64_t>(0, t.y + r + 1 - g.H); ky < std::min(k, t.y + r + 1); ++ky)
          for (int64_t kx = std::max<int64_t>(0, x + r + 1 - g.W); kx < std::min(k, x + r + 1); ++kx) {
            const auto neighbour = load<L>(grad + g.token(t.b, t.y - ky + r, x - kx + r) * C + c);
            const int64_t tap = (ky * k + kx) * C + c;
            sum += load<L>(taps + tap) * neighbour;
            store<L>(sums + tap, load<L>(sums + tap) + value * neighbour);
          }
        store<L>(sums + k * k * C + c, load<L>(sums + k * k * C + c) + own);
        store<L>(dqkv + (token * 3 + 2) * C + c, sum);
        store<L>(dz + g.group(0, t.window, head, t.position + i) * g.d + j, own);
      });
}

template <class T>
VECTORISED void merge_lim_backward_strips(const Windows& g, int64_t k, const T* grad, const T* v, const Sum<T>* taps,
                                          T* dz, T* dqkv, Sum<T>* sums, int64_t begin, int64_t end) {
  for (int64_t s = begin; s < end; ++s) {
    const Strip t = g.strip(s);
    for (int64_t i = 0; i < t.tokens; ++i)  // LIM has no part in the gradients of Q and K
      std::fill_n(dqkv + (g.token(t.b, t.y, t.x) + i) * 3 * g.channels(), 2 * g.channels(), T(0));
    for (int64_t head = 0; t.tokens < g.M && head < g.heads; ++head)
      std::fill_n(dz + (g.group(0, t.window, head, t.position) + t.tokens) * g.d, (g.M - t.tokens) * g.d, T(0));
    if (k == 3) merge_lim_3x3_backward(g, t, grad, v, taps, dz, dqkv, sums);
    else merge_lim_strip_backward(g, t, k, grad, v, taps, dz, dqkv, sums);
  }
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

// How many pieces of work are worth a thread of their own, where each is `numbers` numbers long.
int64_t grain(int64_t numbers) { return 1 + 16384 / numbers; }

// The convolution's weight (C, k²) as (k², C): neighbouring channels side by side.
template <class A>
std::vector<A> transposed(const A* weight, int64_t C, int64_t taps) {
  std::vector<A> result(taps * C);
  for (int64_t c = 0; c < C; ++c)
    for (int64_t tap = 0; tap < taps; ++tap) result[tap * C + c] = weight[c * taps + tap];
  return result;
}

}  // namespace

void cpu::partition(const Windows& g, int64_t itemsize, void* map, void* windows, bool backward) {
  at::parallel_for(0, g.strips(), grain(3 * g.M * g.channels()), [&](int64_t begin, int64_t end) {
    (backward ? partition_strips<true> : partition_strips<false>)(g, itemsize, (char*)map, (char*)windows, begin, end);
  });
}

void cpu::merge_lim(const Windows& g, Type type, int64_t k, const void* z, Strides z_strides, const void* qkv,
                    const void* weight, const void* bias, void* out) {
  with_type(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const auto taps = transposed((const Sum<T>*)weight, g.channels(), k * k);
    at::parallel_for(0, g.B * ((g.H + 1) / 2), grain(2 * g.W * g.channels()), [&](int64_t begin, int64_t end) {
      merge_lim_pairs(g, k, (const T*)z, z_strides, (const T*)qkv + 2 * g.channels(), taps.data(), (const Sum<T>*)bias,
                      (T*)out, begin, end);
    });
  });
}

void cpu::merge_lim_backward(const Windows& g, Type type, int64_t k, const void* grad, const void* qkv,
                             const void* weight, void* dz, void* dqkv, void* dweight, void* dbias) {
  with_type(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const int64_t C = g.channels(), size = (k * k + 1) * C;
    const auto taps = transposed((const Sum<T>*)weight, C, k * k);
    // The weight's gradient is summed in parts and then over the parts, in order.  Their number follows from the shape,
    // so that the result does not depend on the number of threads.
    const int64_t parts = std::clamp<int64_t>(g.B * g.H * g.W / 64, 1, 32);
    std::vector<Sum<T>> sums(parts * size);
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        merge_lim_backward_strips(g, k, (const T*)grad, (const T*)qkv + 2 * C, taps.data(), (T*)dz, (T*)dqkv,
                                  sums.data() + i * size, g.strips() * i / parts, g.strips() * (i + 1) / parts);
    });
    for (int64_t i = 1; i < parts; ++i)
      for (int64_t j = 0; j < size; ++j) sums[j] += sums[i * size + j];
    for (int64_t c = 0; c < C; ++c)
      for (int64_t tap = 0; tap < k * k; ++tap) ((Sum<T>*)dweight)[c * k * k + tap] = sums[tap * C + c];
    std::copy_n(sums.data() + k * k * C, C, (Sum<T>*)dbias);
  });
}
