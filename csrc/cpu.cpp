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
// A row of the map is done as one wide strip: LIM slides along all of it, and windows matter to Z alone.  Where Z's tokens
// are, from the row's first one on, is the same for every row; place(strip, i) says it for token i of a strip.
template <class Place>
std::vector<int64_t> columns_of(const Windows& g, Place place) {
  std::vector<int64_t> columns(g.W);
  for (int64_t s = 0; s < g.w; ++s) {
    const Strip t = g.strip(s);
    for (int64_t i = 0; i < t.tokens; ++i) columns[t.x + i] = place(t, i);
  }
  return columns;
}

Strip wide(const Windows& g, Strip first) {
  first.tokens = g.W;
  return first;
}

// Pairs of rows begin .. end.  `g` is a copy: the compiler cannot know that no store changes what a reference leads to, and
// would read the sizes again for each token.
template <class T, bool streamed>
VECTORISED void merge_lim_pairs(const Windows g, int64_t k, const T* z, Strides z_strides, const int64_t* columns,
                                const T* v, const Sum<T>* taps, const Sum<T>* bias, T* out, int64_t begin, int64_t end) {
  const int64_t C = g.channels(), pairs = (g.H + 1) / 2;
  for (int64_t pair = begin; pair < end; ++pair) {
    const int64_t first = g.first_in_row(pair / pairs, pair % pairs * 2);
    const Strip row = wide(g, g.strip(first)), below = g.strip(first + g.w);
    for (int64_t head = 0; head < g.heads; ++head) {
      const T *upper_z = z + z_strides.at(row, head, 0), *lower_z = z + z_strides.at(below, head, 0);
      T *upper = out + g.token(row.b, row.y, 0) * C + head * g.d, *lower = upper + g.W * C;
      const bool two = row.y + 1 < g.H;
      lim(g, row, two, head, k, v, taps, bias, [&](auto lanes, int n, int64_t i, int64_t j, auto value) INLINED {
        const T* own = (n ? lower_z : upper_z) + columns[i] + j;
        __builtin_prefetch(own + z_strides.window);  // the next window's
        store<lanes, T, streamed>((n ? lower : upper) + i * C + j, value + load<lanes>(own));
      });
    }
  }
  if (streamed) end_stream();
}

// Rows begin .. end of the windows: one below the map has only zeros to write, in dz.
template <class T>
VECTORISED void merge_lim_backward_rows(const Windows g, int64_t k, const T* grad, const T* v, const Sum<T>* taps,
                                        const int64_t* columns, T* dz, T* dqkv, Sum<T>* sums, int64_t begin,
                                        int64_t end) {
  const int64_t C = g.channels();
  for (int64_t first = begin * g.w; first < end * g.w; first += g.w) {
    for (int64_t s = first; s < first + g.w; ++s) {
      const Strip t = g.strip(s);
      for (int64_t head = 0; head < g.heads && t.tokens < g.M; ++head)
        std::fill_n(dz + (g.group(0, t.window, head, t.position) + t.tokens) * g.d, (g.M - t.tokens) * g.d, T(0));
    }
    const Strip row = wide(g, g.strip(first));
    if (row.y >= g.H) continue;
    T* dqkv_row = dqkv + g.token(row.b, row.y, 0) * 3 * C;
    for (int64_t i = 0; i < g.W; ++i)  // LIM has no part in the gradients of Q and K
      std::fill_n(dqkv_row + i * 3 * C, 2 * C, T(0));
    for (int64_t head = 0; head < g.heads; ++head) {
      T *dz_row = dz + g.group(0, row.window, head, row.position) * g.d, *dv_row = dqkv_row + 2 * C + head * g.d;
      const T* grad_row = grad + g.token(row.b, row.y, 0) * C + head * g.d;
      lim_backward(g, row, head, k, grad, v, taps, sums, [&](auto lanes, int64_t i, int64_t j, auto dv) INLINED {
        store<lanes>(dv_row + i * 3 * C + j, dv);
        std::memcpy(dz_row + columns[i] + j, grad_row + i * C + j, lanes * sizeof(T));
      });
    }
  }
}

// How many pieces of work are worth a thread of their own, where each is `numbers` numbers long.
int64_t grain(int64_t numbers) { return 1 + 16384 / numbers; }

}  // namespace

void cpu::partition(const Windows& g, int64_t itemsize, void* map, void* windows, bool backward) {
  const int64_t bytes = (backward ? g.B * g.H * g.W : g.count() * g.M * g.M) * 3 * g.channels() * itemsize;
  const bool streamed = stream_pays(backward ? map : windows, bytes, g.d * itemsize);
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
    const auto columns = columns_of(g, [&](const Strip& t, int64_t i) { return z_strides.at(t, 0, i); });
    auto pairs = merge_lim_pairs<T, false>;
    if constexpr (sizeof(T) >= 4)  // 16 shorter numbers are half a line, and that takes as long as a line
      if (stream_pays(out, g.B * g.H * g.W * g.channels() * sizeof(T), g.d * sizeof(T))) pairs = merge_lim_pairs<T, true>;
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
    const auto columns = columns_of(g, [&](const Strip& t, int64_t i) {
      return g.group(0, t.window, 0, t.position + i) * g.d;
    });
    // The weight's gradient is summed in parts and then over the parts, in order.  Their number follows from the shape,
    // so that the result does not depend on the number of threads; no more threads than parts have work.
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
