// LIM on the CPU, strip by strip: equation (5) and its gradients.
#pragma once
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "simd.h"

// Calls f(i, neighbor) for each token i of a strip whose neighbor at offset (dy, dx) is inside the map.
template <class F>
INLINED inline void for_neighbors(const Windows& g, const Strip& t, int64_t dy, int64_t dx, F f) {
  if (t.y + dy < 0 || t.y + dy >= g.H) return;
  const int64_t begin = std::max<int64_t>(0, -dx - t.x), end = std::min(t.tokens, g.W - dx - t.x);
  for (int64_t i = begin; i < end; ++i) f(i, g.token(t.b, t.y + dy, t.x + dx + i));
}

// Adds F(V) of equation (5) to a strip, for one head, whose channels begin at `channel`.  `row`: stride of `to`.
template <class T>
static VECTORIZED void add_lim(const Inputs& in, const void* bias, const Strip& t, int64_t channel, Sum<T>* to,
                               int64_t row) {
  const int64_t C = in.g.channels(), k = in.k;
  const T* v = (const T*)in.qkv + 2 * C + channel;
  const Sum<T> *weight = (const Sum<T>*)in.weight + channel, *b = (const Sum<T>*)bias + channel;
  for_blocks(in.g.d, [&](auto L, int64_t j) INLINED {
    const auto add = [&](Sum<T>* sum, auto more) INLINED { store<L>(sum, load<L>(sum) + more); };
    for (int64_t i = 0; i < t.tokens; ++i) add(to + i * row + j, load<L>(b + j));
    for (int64_t tap = 0; tap < k * k; ++tap) {
      const auto w = load<L>(weight + tap * C + j);
      for_neighbors(in.g, t, tap / k - k / 2, tap % k - k / 2, [&](int64_t i, int64_t neighbor) INLINED {
        add(to + i * row + j, w * load<L>(v + neighbor * 3 * C + j));
      });
    }
  });
}

// V at a token contributes to the outputs around it, so both gradients are sums over the same neighbors: Σ w dOut is
// added to dv, and V dOut to sums (k² + 1, C), whose last row belongs to the bias.
template <class T>
static VECTORIZED void add_lim_backward(const Inputs& in, const void* grad, const Strip& t, int64_t channel,
                                        Sum<T>* sums, Sum<T>* dv, int64_t row) {
  const int64_t C = in.g.channels(), k = in.k, first = in.g.token(t.b, t.y, t.x);
  const T *v = (const T*)in.qkv + 2 * C + channel, *dout = (const T*)grad + channel;
  const Sum<T>* weight = (const Sum<T>*)in.weight + channel;
  for_blocks(in.g.d, [&](auto L, int64_t j) INLINED {
    for (int64_t tap = 0; tap <= k * k; ++tap) {
      Sum<T>* total = sums + tap * C + channel + j;
      auto sum = load<L>(total);
      if (tap == k * k) {
        for (int64_t i = 0; i < t.tokens; ++i) sum += load<L>(dout + (first + i) * C + j);
      } else {
        const auto w = load<L>(weight + tap * C + j);
        for_neighbors(in.g, t, k / 2 - tap / k, k / 2 - tap % k, [&](int64_t i, int64_t neighbor) INLINED {
          const auto d = load<L>(dout + neighbor * C + j);
          store<L>(dv + i * row + j, load<L>(dv + i * row + j) + w * d);
          sum += load<L>(v + (first + i) * 3 * C + j) * d;
        });
      }
      store<L>(total, sum);
    }
  });
}

// Gradients of weight and bias: work(sums, begin, end) adds those of pieces begin .. end, if any, to sums (k² + 1, C).
template <class A, class F>
void sum_in_parts(int64_t pieces, const Inputs& in, A* parts, F work) {
  const int64_t size = (in.k * in.k + 1) * in.g.channels(), n = std::min(pieces, cpu_parts);
  std::fill_n(parts, cpu_parts * size, A(0));
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(parts + i * size, pieces * i / n, pieces * (i + 1) / n);
  });
}
