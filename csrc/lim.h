// LIM on the CPU, strip by strip: equation (5) and its gradients.
#pragma once
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "simd.h"

// LIM's inputs: V, the last third of qkv (B, H, W, 3C), and the k x k convolution's weight (k, k, C) and bias (C).
template <class T> struct Lim {
  int64_t k;
  const T* v;
  const Sum<T> *weight, *bias;

  Lim(const Windows& g, int64_t k, const void* qkv, const void* weight, const void* bias = nullptr)
      : k(k), v((const T*)qkv + 2 * g.channels()), weight((const Sum<T>*)weight), bias((const Sum<T>*)bias) {}
};

// Calls f(i, neighbor) for each token i of a strip whose neighbor at offset (dy, dx) is inside the map.
template <class F>
INLINED inline void for_neighbors(const Windows& g, const Strip& t, int64_t dy, int64_t dx, F f) {
  if (t.y + dy < 0 || t.y + dy >= g.H) return;
  const int64_t begin = std::max<int64_t>(0, -dx - t.x), end = std::min(t.tokens, g.W - dx - t.x);
  for (int64_t i = begin; i < end; ++i) f(i, g.token(t.b, t.y + dy, t.x + dx + i));
}

// Adds F(V) of equation (5) to a strip, for the d channels from `channel` on.  `row`: stride of `to`.
template <class T>
static VECTORIZED void add_lim(const Windows& g, const Strip& t, int64_t channel, Lim<T> lim, Sum<T>* to,
                               int64_t row) {
  for_blocks(g.d, [&](auto L, int64_t j) INLINED {
    const int64_t C = g.channels(), c = channel + j, k = lim.k;
    const auto add = [&](Sum<T>* sum, auto more) INLINED { store<L>(sum, load<L>(sum) + more); };
    for (int64_t i = 0; i < t.tokens; ++i) add(to + i * row + j, load<L>(lim.bias + c));
    for (int64_t tap = 0; tap < k * k; ++tap) {
      const auto w = load<L>(lim.weight + tap * C + c);
      for_neighbors(g, t, tap / k - k / 2, tap % k - k / 2, [&](int64_t i, int64_t neighbor) INLINED {
        add(to + i * row + j, w * load<L>(lim.v + neighbor * 3 * C + c));
      });
    }
  });
}

// V at a token contributes to the outputs around it, so both gradients are sums over the same neighbors: Σ w dOut is
// added to dv, and V dOut to sums (k² + 1, C), whose last row belongs to the bias.
template <class T>
static VECTORIZED void add_lim_backward(const Windows& g, const Strip& t, int64_t channel, Lim<T> lim,
                                        const T* grad, Sum<T>* sums, Sum<T>* dv, int64_t row) {
  for_blocks(g.d, [&](auto L, int64_t j) INLINED {
    const int64_t C = g.channels(), c = channel + j, k = lim.k, first = g.token(t.b, t.y, t.x);
    for (int64_t tap = 0; tap <= k * k; ++tap) {
      auto sum = load<L>(sums + tap * C + c);
      if (tap == k * k) {
        for (int64_t i = 0; i < t.tokens; ++i) sum += load<L>(grad + (first + i) * C + c);
      } else {
        const auto w = load<L>(lim.weight + tap * C + c);
        for_neighbors(g, t, k / 2 - tap / k, k / 2 - tap % k, [&](int64_t i, int64_t neighbor) INLINED {
          const auto dout = load<L>(grad + neighbor * C + c);
          store<L>(dv + i * row + j, load<L>(dv + i * row + j) + w * dout);
          sum += load<L>(lim.v + (first + i) * 3 * C + c) * dout;
        });
      }
      store<L>(sums + tap * C + c, sum);
    }
  });
}

// Gradients of weight and bias: work(sums, begin, end) adds those of pieces begin .. end to sums (k² + 1, C).  It is
// not called if there are no pieces, as its buffers are as large as a window.
template <class A, class F>
void sum_in_parts(int64_t pieces, int64_t C, int64_t k, A* parts, F work) {
  const int64_t size = (k * k + 1) * C, n = std::min(pieces, cpu_parts);
  std::fill_n(parts, cpu_parts * size, A(0));
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(parts + i * size, pieces * i / n, pieces * (i + 1) / n);
  });
}
