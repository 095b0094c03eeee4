// LIM on the CPU, a depthwise convolution of V: what `merge_lim` (cpu.cpp) and IWSA in one pass (attention.cpp) share.
//
// v points at V's first number in (B, H, W, 3C); taps (k², C) is the weight, neighbouring channels side by side.
#pragma once
#include <algorithm>
#include <vector>

#include "vector.h"

// The weight (C, k²) as taps (k², C).
template <class A>
std::vector<A> transposed(const A* weight, int64_t C, int64_t taps) {
  std::vector<A> result(taps * C);
  for (int64_t c = 0; c < C; ++c)
    for (int64_t tap = 0; tap < taps; ++tap) result[tap * C + c] = weight[c * taps + tap];
  return result;
}

// parts x (k² + 1, C) partial sums of the gradients of the weight and, as last row, the bias.  Added up in order.
template <class A>
void sum_parts(std::vector<A>& sums, int64_t parts, int64_t C, int64_t taps, A* dweight, A* dbias) {
  const int64_t size = (taps + 1) * C;
  for (int64_t i = 1; i < parts; ++i)
    for (int64_t j = 0; j < size; ++j) sums[j] += sums[i * size + j];
  for (int64_t c = 0; c < C; ++c)
    for (int64_t tap = 0; tap < taps; ++tap) dweight[c * taps + tap] = sums[tap * C + c];
  std::copy_n(sums.data() + taps * C, C, dbias);
}

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

// k = 3: two rows of the map at a time, since they share half of their neighbours.
template <class T, class Take>
INLINED inline void lim_3x3(const Windows& g, const Strip& t, bool two, int64_t head, const T* v, const Sum<T>* taps,
                            const Sum<T>* bias, Take take) {
  const int64_t C = g.channels();
  const Rows<T, 4> rows(g, t.b, t.y - 1, t.x, v, 3 * C);
  // What the next rows will need, on its way from memory meanwhile.
  const T* ahead = v + g.token(t.b, std::min(t.y + 3, g.H - 1), t.x) * 3 * C;
  const int64_t ahead_below = t.y + 4 < g.H ? g.W * 3 * C : 0;
  for_blocks(g.d, [&](auto lanes, int64_t j) INLINED {
    constexpr int L = lanes;
    const int64_t c = head * g.d + j;
    Vec<Sum<T>, L> weight[9];
    for (int tap = 0; tap < 9; ++tap) weight[tap] = load<L>(taps + tap * C + c);
    const auto b = load<L>(bias + c);
    Neighbours<T, L, 4> near(rows, c, t.x > 0);
    for (int64_t i = 0; i < t.tokens; ++i) {
      near.move(rows, t.x + i + 1 < g.W);
      __builtin_prefetch(ahead + i * 3 * C + c);
      __builtin_prefetch(ahead + i * 3 * C + c + ahead_below);
      Vec<Sum<T>, L> upper = b, lower = b;
      for (int ky = 0; ky < 3; ++ky)
        for (int kx = 0; kx < 3; ++kx) {
          upper += weight[ky * 3 + kx] * near.at[ky][kx];
          lower += weight[ky * 3 + kx] * near.at[ky + 1][kx];
        }
      take(lanes, 0, i, j, upper);
      if (two) take(lanes, 1, i, j, lower);
    }
  });
}

// Any k: the sum as it is written, one token at a time.
template <class T, class Take>
INLINED inline void lim_any(const Windows& g, const Strip& t, int row, int64_t head, int64_t k, const T* v,
                            const Sum<T>* taps, const Sum<T>* bias, Take take) {
  const int64_t C = g.channels(), r = k / 2, y = t.y + row;
  for (int64_t i = 0, x = t.x; i < t.tokens; ++i, ++x)
    for_blocks(g.d, [&](auto lanes, int64_t j) INLINED {
      constexpr int L = lanes;
      const int64_t c = head * g.d + j;
      auto sum = load<L>(bias + c);
      for (int64_t ky = std::max<int64_t>(0, r - y); ky < std::min(k, g.H + r - y); ++ky)
        for (int64_t kx = std::max<int64_t>(0, r - x); kx < std::min(k, g.W + r - x); ++kx)
          sum += load<L>(taps + (ky * k + kx) * C + c) * load<L>(v + g.token(t.b, y + ky - r, x + kx - r) * 3 * C + c);
      take(lanes, row, i, j, sum);
    });
}

// F(V) at the tokens of a strip, or of a whole row, and, if `two`, of the one below, in one head's channels:
// take(L, row, i, j, value) gets L channels from j on of token i in row 0 or 1.
template <class T, class Take>
INLINED inline void lim(const Windows& g, const Strip& t, bool two, int64_t head, int64_t k, const T* v,
                        const Sum<T>* taps, const Sum<T>* bias, Take take) {
  if (k == 3) return lim_3x3(g, t, two, head, v, taps, bias, take);
  for (int row = 0; row < 1 + two; ++row) lim_any(g, t, row, head, k, v, taps, bias, take);
}

// V at a token went into the outputs around it, so both of its gradients are sums over the same neighbours:
// dV = Σ w dOut and dw = Σ V dOut, where tap (ky, kx) leads to the output at (y - ky + r, x - kx + r).
template <class T, class Take>
INLINED inline void lim_3x3_backward(const Windows& g, const Strip& t, int64_t head, const T* grad, const T* v,
                                     const Sum<T>* taps, Sum<T>* sums, Take take) {
  const int64_t C = g.channels();
  const Rows<T, 3> rows(g, t.b, t.y - 1, t.x, grad, C);
  const T* value = v + g.token(t.b, t.y, t.x) * 3 * C;
  const T* ahead = grad + g.token(t.b, std::min(t.y + 2, g.H - 1), t.x) * C;
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
      __builtin_prefetch(value + (i + t.tokens) * 3 * C + c);  // the next strip's, or the next row's
      const auto own = load<L>(value + i * 3 * C + c);
      Vec<Sum<T>, L> sum = {};
      for (int ky = 0; ky < 3; ++ky)
        for (int kx = 0; kx < 3; ++kx) {
          sum += weight[ky * 3 + kx] * near.at[2 - ky][2 - kx];
          dweight[ky * 3 + kx] += own * near.at[2 - ky][2 - kx];
        }
      dbias += near.at[1][1];
      take(lanes, i, j, sum);
    }
    for (int tap = 0; tap < 9; ++tap) store<L>(sums + tap * C + c, dweight[tap]);
    store<L>(sums + 9 * C + c, dbias);
  });
}

template <class T, class Take>
INLINED inline void lim_any_backward(const Windows& g, const Strip& t, int64_t head, int64_t k, const T* grad,
                                     const T* v, const Sum<T>* taps, Sum<T>* sums, Take take) {
  const int64_t C = g.channels(), r = k / 2;
  for (int64_t i = 0, x = t.x; i < t.tokens; ++i, ++x)
    for_blocks(g.d, [&](auto lanes, int64_t j) INLINED {
      constexpr int L = lanes;
      const int64_t c = head * g.d + j, token = g.token(t.b, t.y, x), bias = k * k * C + c;
      const auto value = load<L>(v + token * 3 * C + c);
      Vec<Sum<T>, L> sum = {};
      for (int64_t ky = std::max<int64_t>(0, t.y + r + 1 - g.H); ky < std::min(k, t.y + r + 1); ++ky)
        for (int64_t kx = std::max<int64_t>(0, x + r + 1 - g.W); kx < std::min(k, x + r + 1); ++kx) {
          const auto neighbour = load<L>(grad + g.token(t.b, t.y - ky + r, x - kx + r) * C + c);
          const int64_t tap = (ky * k + kx) * C + c;
          sum += load<L>(taps + tap) * neighbour;
          store<L>(sums + tap, load<L>(sums + tap) + value * neighbour);
        }
      store<L>(sums + bias, load<L>(sums + bias) + load<L>(grad + token * C + c));
      take(lanes, i, j, sum);
    });
}

// In one head's channels and for the tokens of a strip: take(L, i, j, dv) gets L channels from j on of dV at token i, and
// the token's part in the gradients of the weight and the bias is added to sums (k² + 1, C).
template <class T, class Take>
INLINED inline void lim_backward(const Windows& g, const Strip& t, int64_t head, int64_t k, const T* grad, const T* v,
                                 const Sum<T>* taps, Sum<T>* sums, Take take) {
  if (k == 3) lim_3x3_backward(g, t, head, grad, v, taps, sums, take);
  else lim_any_backward(g, t, head, k, grad, v, taps, sums, take);
}
