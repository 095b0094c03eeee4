// Partition and merge on the CPU: strips (windows.h) or rows in parallel, vectorised over channels.
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "lim.h"

namespace {

// ---------------------------------------------------------------- window partition and its backward
// A call to memcpy would cost more than the few dozen bytes that it copies.
template <bool streamed, class Size>
INLINED inline void copy_bytes(char* __restrict to, const char* __restrict from, Size bytes) {
  int64_t size = bytes;
  for (; size >= 64; size -= 64, to += 64, from += 64) {
    if (streamed) stream_line(to, from);
    else std::memcpy(to, from, 64);
  }
  for (; size >= 16; size -= 16, to += 16, from += 16) std::memcpy(to, from, 16);
  for (; size > 0; size -= 2, to += 2, from += 2) std::memcpy(to, from, 2);
}

// Bytes are moved and no numbers computed: one function for all types.  Token by token, so that the map is one stream.
// `size` is that of a head's d channels: int64_t, or a constant, with which `copy_bytes` is a few instructions.
template <bool backward, bool streamed, class Size>
INLINED inline void partition_strip(const Windows& g, const Strip& t, Size size, char* map, char* windows) {
  const int64_t next_head = g.M * g.M * size, next_third = g.count() * g.heads * next_head;
  char* token = map + g.token(t.b, t.y, t.x) * 3 * g.heads * size;
  char* first = windows + g.group(0, t.window, 0, t.position) * size;
  for (int64_t i = 0; i < (backward ? t.tokens : g.M); ++i, first += size)
    for (int64_t third = 0; third < 3; ++third) {
      char* group = first + third * next_third;
      for (int64_t head = 0; head < g.heads; ++head, token += size, group += next_head) {
        if (backward) copy_bytes<streamed>(token, group, size);
        else if (i < t.tokens) copy_bytes<streamed>(group, token, size);
        else std::memset(group, 0, size);
      }
    }
}

template <bool backward, bool streamed>
VECTORISED void partition_strips(const Windows& g, int64_t itemsize, char* map, char* windows, int64_t begin,
                                 int64_t end) {
  const int64_t size = g.d * itemsize;
  for (int64_t s = begin; s < end; ++s)
    if (size == 64)
      partition_strip<backward, streamed>(g, g.strip(s), std::integral_constant<int64_t, 64>(), map, windows);
    else if (size == 128)
      partition_strip<backward, streamed>(g, g.strip(s), std::integral_constant<int64_t, 128>(), map, windows);
    else
      partition_strip<backward, streamed>(g, g.strip(s), size, map, windows);
  if (streamed) end_stream();
}

// ---------------------------------------------------------------- window merge + LIM and its backward
// Where the tokens of a row of the map are in (windows, heads, M², d), from the row's first one on.
std::vector<int64_t> columns_of(const Windows& g, const Strides& strides) {
  std::vector<int64_t> columns(g.W);
  for (int64_t x = 0; x < g.W; ++x) columns[x] = x / g.M * strides.window + x % g.M * strides.position;
  return columns;
}
int64_t first_of_row(const Windows& g, const Strides& strides, int64_t b, int64_t y) {
  return (b * g.h + y / g.M) * g.w * strides.window + y % g.M * g.M * strides.position;
}

Strides dz_strides(const Windows& g) { return {g.heads * g.M * g.M * g.d, g.M * g.M * g.d, g.d}; }

// Pairs of rows begin .. end.  LIM slides along the whole width of the map: windows matter to Z alone.  (g by value: what
// a reference leads to might be what a store has changed, and would be read again after each.)
template <class T, bool streamed>
VECTORISED void merge_lim_pairs(const Windows g, int64_t k, const T* z, Strides z_strides, const int64_t* columns,
                                const T* v, const Sum<T>* taps, const Sum<T>* bias, T* out, int64_t begin, int64_t end) {
  const int64_t C = g.channels(), pairs = (g.H + 1) / 2;
  for (int64_t pair = begin; pair < end; ++pair) {
    const int64_t b = pair / pairs, y = pair % pairs * 2;
    const Strip row = {b, y, 0, 0, 0, g.W};
    for (int64_t head = 0; head < g.heads; ++head) {
      const T *upper_z = z + first_of_row(g, z_strides, b, y) + head * z_strides.head,
              *lower_z = z + first_of_row(g, z_strides, b, y + 1) + head * z_strides.head;
      T *upper = out + g.token(b, y, 0) * C + head * g.d, *lower = upper + g.W * C;
      lim(g, row, y + 1 < g.H, head, k, v, taps, bias, [&](auto lanes, int below, int64_t i, int64_t j, auto value) INLINED {
        const T* own = (below ? lower_z : upper_z) + columns[i] + j;
        __builtin_prefetch(own + z_strides.window);
        store<lanes, T, streamed>((below ? lower : upper) + i * C + j, value + load<lanes>(own));
      });
    }
  }
  if (streamed) end_stream();
}

// Rows begin .. end of the windows: of each image H on the map, and those of the lowest windows that are beyond it.
template <class T>
VECTORISED void merge_lim_backward_rows(const Windows g, int64_t k, const T* grad, const T* v, const Sum<T>* taps,
                                        const int64_t* columns, T* dz, T* dqkv, Sum<T>* sums, int64_t begin,
                                        int64_t end) {
  const int64_t C = g.channels();
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t s = row * g.w; s < (row + 1) * g.w; ++s) {
      const Strip t = g.strip(s);
      for (int64_t head = 0; head < g.heads && t.tokens < g.M; ++head)
        std::fill_n(dz + (g.group(0, t.window, head, t.position) + t.tokens) * g.d, (g.M - t.tokens) * g.d, T(0));
    }
    const int64_t b = row / (g.h * g.M), y = row % (g.h * g.M), token = g.token(b, y, 0);
    if (y >= g.H) continue;
    for (int64_t i = 0; i < g.W; ++i)  // LIM has no part in the gradients of Q and K
      std::fill_n(dqkv + (token + i) * 3 * C, 2 * C, T(0));
    for (int64_t head = 0; head < g.heads; ++head) {
      T* dz_row = dz + first_of_row(g, dz_strides(g), b, y) + head * dz_strides(g).head;
      const Strip strip = {b, y, 0, 0, 0, g.W};
      lim_backward(g, strip, head, k, grad, v, taps, sums, [&](auto lanes, int64_t i, int64_t j, auto dv) INLINED {
        store<lanes>(dqkv + ((token + i) * 3 + 2) * C + head * g.d + j, dv);
        std::memcpy(dz_row + columns[i] + j, grad + (token + i) * C + head * g.d + j, lanes * sizeof(T));
      });
    }
  }
}

// How many pieces of work are worth a thread of their own, where each is `numbers` numbers long.
int64_t grain(int64_t numbers) { return 1 + 16384 / numbers; }

}  // namespace

void cpu::partition(const Windows& g, int64_t itemsize, void* map, void* windows, bool backward) {
  const bool streamed = stream_pays(3 * g.strips() * g.M * g.channels() * itemsize, g.d * itemsize);
  const auto strips = backward ? (streamed ? partition_strips<true, true> : partition_strips<true, false>)
                               : (streamed ? partition_strips<false, true> : partition_strips<false, false>);
  at::parallel_for(0, g.strips(), grain(3 * g.M * g.channels()), [&](int64_t begin, int64_t end) {
    strips(g, itemsize, (char*)map, (char*)windows, begin, end);
  });
}

void cpu::merge_lim(const Windows& g, Type type, int64_t k, const void* z, Strides z_strides, const void* qkv,
                    const void* weight, const void* bias, void* out) {
  with_type(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const auto taps = transposed((const Sum<T>*)weight, g.channels(), k * k);
    const auto columns = columns_of(g, z_strides);
    const bool streamed = stream_pays(g.B * g.H * g.W * g.channels() * sizeof(T), g.d * sizeof(T));
    const auto pairs = streamed ? merge_lim_pairs<T, true> : merge_lim_pairs<T, false>;
    at::parallel_for(0, g.B * ((g.H + 1) / 2), grain(2 * g.W * g.channels()), [&](int64_t begin, int64_t end) {
      pairs(g, k, (const T*)z, z_strides, columns.data(), (const T*)qkv + 2 * g.channels(), taps.data(),
            (const Sum<T>*)bias, (T*)out, begin, end);
    });
  });
}

void cpu::merge_lim_backward(const Windows& g, Type type, int64_t k, const void* grad, const void* qkv,
                             const void* weight, void* dz, void* dqkv, void* dweight, void* dbias) {
  with_type(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const int64_t C = g.channels(), size = (k * k + 1) * C;
    const auto taps = transposed((const Sum<T>*)weight, C, k * k);
    const auto columns = columns_of(g, dz_strides(g));
    // The weight's gradient is summed in parts and then over the parts, in order.  Their number follows from the shape,
    // so that the result does not depend on the number of threads.
    const int64_t parts = std::clamp<int64_t>(g.B * g.H * g.W / 64, 1, 32), rows = g.B * g.h * g.M;
    std::vector<Sum<T>> sums(parts * size);
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        merge_lim_backward_rows(g, k, (const T*)grad, (const T*)qkv + 2 * C, taps.data(), columns.data(), (T*)dz,
                                (T*)dqkv, sums.data() + i * size, rows * i / parts, rows * (i + 1) / parts);
    });
    sum_parts(sums, parts, C, k * k, (Sum<T>*)dweight, (Sum<T>*)dbias);
  });
}
