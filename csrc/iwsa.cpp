// IWSA in one pass on the CPU: (B, H, W, 3C) -> (B, H, W, C).  A thread takes one head of one window, gathers its Q, K and
// V into a few kB of buffers that stay in the cache, attends, adds LIM and writes the result to its place in the map.
// A window that the border cuts is gathered without what lies beyond: nothing has to be masked.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "lim.h"

namespace {

constexpr int64_t LANES = 16;
// The queries are taken in blocks, so that the scores of a large window need not be stored whole.
constexpr int64_t QUERIES = 56;
int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// A matrix of the buffers: its rows begin at multiples of 16 numbers, a cache line of floats.
template <class A>
struct Matrix {
  struct alignas(64) Line {
    A numbers[LANES];
  };
  int64_t stride;  // from row to row
  std::vector<Line> lines;

  Matrix(int64_t rows, int64_t columns) : stride(padded(columns)), lines(padded(rows) * stride / LANES) {}
  A* row(int64_t i) { return lines.data()->numbers + i * stride; }
};

// ---------------------------------------------------------------- matrix product
// out = a b, or += : `rows` x `columns` numbers of out in registers while j runs over the products' inner dimension.
// a(i, j) lies at a[i * a_row + j * a_column], so that the same code takes a transposed.
template <int rows, int vectors, int L, class A>
INLINED inline void product_block(int64_t inner, const A* a, int64_t a_row, int64_t a_column, const A* b,
                                  int64_t b_row, A* out, int64_t out_row, bool add) {
  Vec<A, L> sum[rows][vectors];
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < vectors; ++v) sum[i][v] = add ? load<L>(out + i * out_row + v * L) : Vec<A, L>{};
  for (int64_t j = 0; j < inner; ++j, a += a_column, b += b_row) {
    Vec<A, L> right[vectors];
    for (int v = 0; v < vectors; ++v) right[v] = load<L>(b + v * L);
    for (int i = 0; i < rows; ++i)
      for (int v = 0; v < vectors; ++v) sum[i][v] += a[i * a_row] * right[v];
  }
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < vectors; ++v) store<L>(out + i * out_row + v * L, sum[i][v]);
}

template <int vectors, int L, class A>
INLINED inline void product_columns(int64_t rows, int64_t inner, const A* a, int64_t a_row, int64_t a_column,
                                    const A* b, int64_t b_row, A* out, int64_t out_row, bool add) {
  constexpr int block = 7;  // 7 x 3 sums, 3 numbers of b: 24 of AVX-512's 32 registers; and 49 tokens are 7 blocks
  int64_t i = 0;
  for (; i + block <= rows; i += block)
    product_block<block, vectors, L>(inner, a + i * a_row, a_row, a_column, b, b_row, out + i * out_row, out_row, add);
  for (; i < rows; ++i)
    product_block<1, vectors, L>(inner, a + i * a_row, a_row, a_column, b, b_row, out + i * out_row, out_row, add);
}

// columns: a multiple of 8.
template <class A>
VECTORISED void product(int64_t rows, int64_t inner, int64_t columns, const A* a, int64_t a_row, int64_t a_column,
                        const A* b, int64_t b_row, A* out, int64_t out_row, bool add) {
  int64_t c = 0;
  for (; c + 48 <= columns; c += 48)
    product_columns<3, 16>(rows, inner, a, a_row, a_column, b + c, b_row, out + c, out_row, add);
  for (; c + 32 <= columns; c += 32)
    product_columns<2, 16>(rows, inner, a, a_row, a_column, b + c, b_row, out + c, out_row, add);
  for (; c + 16 <= columns; c += 16)
    product_columns<1, 16>(rows, inner, a, a_row, a_column, b + c, b_row, out + c, out_row, add);
  for (; c < columns; c += 8)
    product_columns<1, 8>(rows, inner, a, a_row, a_column, b + c, b_row, out + c, out_row, add);
}

// ---------------------------------------------------------------- transposition
// Exchanges, in squares of 2s x 2s numbers, the upper right s x s with the lower left.  s = 1, 2, 4, 8 in turn transpose 16 x 16.
template <int s, class A, int... I>
INLINED inline void exchange(Vec<A, LANES>* rows, std::integer_sequence<int, I...>) {
  for (int i = 0; i < LANES; ++i)
    if (!(i & s)) {
      const auto upper = rows[i], lower = rows[i + s];
      rows[i] = __builtin_shufflevector(upper, lower, (I & s ? LANES + I - s : I)...);
      rows[i + s] = __builtin_shufflevector(upper, lower, (I & s ? LANES + I : I + s)...);
    }
}

// to (columns, rows) = from (rows, columns), with whatever the padding of `from` holds in that of `to`.
template <class A>
VECTORISED void transpose(int64_t rows, int64_t columns, const A* from, int64_t from_row, A* to, int64_t to_row) {
  constexpr auto lanes = std::make_integer_sequence<int, LANES>();
  for (int64_t i = 0; i < rows; i += LANES)
    for (int64_t j = 0; j < columns; j += LANES) {
      Vec<A, LANES> square[LANES];
      for (int l = 0; l < LANES; ++l) square[l] = load<LANES>(from + (i + l) * from_row + j);
      exchange<1, A>(square, lanes);
      exchange<2, A>(square, lanes);
      exchange<4, A>(square, lanes);
      exchange<8, A>(square, lanes);
      for (int l = 0; l < LANES; ++l) store<LANES>(to + (j + l) * to_row + i, square[l]);
    }
}

// ---------------------------------------------------------------- softmax
template <int L>
INLINED inline Vec<double, L> exp(Vec<double, L> x) {
  for (int i = 0; i < L; ++i) x[i] = std::exp(x[i]);
  return x;
}

// e^x for x <= 0 as 2^n 2^f, |f| <= 1/2: 2^f by its Taylor series, 2^n by adding n to the exponent.  Numbers below 2^-126
// are taken for that; NaN stays NaN.
template <int L>
INLINED inline Vec<float, L> exp(Vec<float, L> x) {
  constexpr float round = 0x1.8p23f;  // adding it leaves no room for a fraction
  x *= 0x1.715476p0f;                 // 1 / ln 2
  x = x < -126.0f ? Vec<float, L>{} - 126.0f : x;
  const Vec<float, L> n = (x + round) - round, f = x - n;
  Vec<float, L> power = f * 0x1.430912p-13f + 0x1.5d87fep-10f;  // (ln 2)^i / i!
  power = power * f + 0x1.3b2ab6p-7f;
  power = power * f + 0x1.c6b08ep-5f;
  power = power * f + 0x1.ebfbep-3f;
  power = power * f + 0x1.62e43p-1f;
  power = power * f + 1.0f;
  Vec<uint32_t, L> bits;
  std::memcpy(&bits, &power, sizeof(bits));
  bits += (Vec<uint32_t, L>)__builtin_convertvector(n, Vec<int32_t, L>) << 23;
  std::memcpy(&power, &bits, sizeof(bits));
  return power;
}

// f of all L numbers: of two halves, then of their halves.
template <int L, class A, class F, int... I>
INLINED inline A reduce(Vec<A, L> v, F f, std::integer_sequence<int, I...>) {
  const Vec<A, L / 2> lower = __builtin_shufflevector(v, v, I...), upper = __builtin_shufflevector(v, v, L / 2 + I...);
  if constexpr (L == 2) return f(lower, upper)[0];
  else return reduce<L / 2, A>(f(lower, upper), f, std::make_integer_sequence<int, L / 4>());
}
template <int L, class A, class F>
INLINED inline A reduce(Vec<A, L> v, F f) {
  return reduce<L, A>(v, f, std::make_integer_sequence<int, L / 2>());
}

// 16 numbers of a row from j on, and `otherwise` where the row has ended.
template <class A>
INLINED inline Vec<A, LANES> load_row(const A* row, int64_t j, int64_t n, A otherwise) {
  if (n - j >= LANES) return load<LANES>(row + j);
  const Vec<A, LANES> lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return lane < A(n - j) ? load<LANES>(row + j) : Vec<A, LANES>{} + otherwise;
}

template <class A>
INLINED inline A sum_of(Vec<A, LANES> v) {
  return reduce<LANES, A>(v, [](auto a, auto b) INLINED { return a + b; });
}

// Of each row's n numbers, in place.  Step by step over all rows: a row's steps wait for each other, rows do not.
template <class A>
VECTORISED void softmax(int64_t rows, int64_t n, A* s, int64_t s_row) {
  using V = Vec<A, LANES>;
  A shift[QUERIES], scale[QUERIES];
  for (int64_t i = 0; i < rows; ++i) {
    const A* row = s + i * s_row;
    V largest = V{} + row[0];
    for (int64_t j = 0; j < n; j += LANES) {
      const V x = load_row(row, j, n, row[0]);
      largest = x > largest ? x : largest;
    }
    shift[i] = reduce<LANES, A>(largest, [](auto a, auto b) INLINED { return a > b ? a : b; });
  }
  for (int64_t i = 0; i < rows; ++i) {
    V sum = {};
    for (int64_t j = 0; j < n; j += LANES) {
      const V power = exp<LANES>(load_row(s + i * s_row, j, n, -std::numeric_limits<A>::infinity()) - shift[i]);
      store<LANES>(s + i * s_row + j, power);
      sum += power;
    }
    scale[i] = 1 / sum_of<A>(sum);
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < n; j += LANES) store<LANES>(s + i * s_row + j, load<LANES>(s + i * s_row + j) * scale[i]);
}

// P and dP -> dS = P (dP - Σ P dP), in place of dP.
template <class A>
VECTORISED void softmax_backward(int64_t rows, int64_t n, const A* p, A* dp, int64_t row) {
  for (int64_t i = 0; i < rows; ++i, p += row, dp += row) {
    Vec<A, LANES> sum = {};
    for (int64_t j = 0; j < n; j += LANES) sum += load<LANES>(p + j) * load_row(dp, j, n, A(0));
    const A mean = sum_of<A>(sum);
    for (int64_t j = 0; j < n; j += LANES) store<LANES>(dp + j, load<LANES>(p + j) * (load<LANES>(dp + j) - mean));
  }
}

// ---------------------------------------------------------------- one head of one window
// Its real tokens: `rows` strips from t on.
struct Window {
  Strip t;
  int64_t rows;
  int64_t tokens() const { return rows * t.tokens; }
};

Window window_of(const Windows& g, int64_t window) {
  const Strip t = g.strip(g.first_strip(window));
  return {t, std::min(g.M, g.H - t.y)};
}

// Reads a window whole before its heads are gathered from it piece by piece: memory is fastest when it is read in order.
template <class T>
void touch(const Windows& g, const Window& window, const T* map, int64_t channels) {
  for (int64_t y = 0; y < window.rows; ++y) {
    const T* row = map + g.token(window.t.b, window.t.y + y, window.t.x) * channels;
    for (int64_t j = 0; j < window.t.tokens * channels; j += 64 / sizeof(T)) *(const volatile char*)(row + j);
  }
}

// Row by row: d channels of each token, from `map` at the window's first token and `stride` numbers from token to token.
template <class T>
VECTORISED void gather(const Windows& g, const Window& window, const T* map, int64_t stride, Sum<T> scale, Sum<T>* to,
                       int64_t to_row) {
  for (int64_t y = 0; y < window.rows; ++y)
    for (int64_t x = 0; x < window.t.tokens; ++x, to += to_row) {
      const T* token = map + (y * g.W + x) * stride;
      for_blocks(g.d, [&](auto lanes, int64_t j) INLINED { store<lanes>(to + j, load<lanes>(token + j) * scale); });
    }
}

template <class T>
VECTORISED void scatter(const Windows& g, const Window& window, const Sum<T>* from, int64_t from_row, Sum<T> scale,
                        T* map, int64_t stride) {
  for (int64_t y = 0; y < window.rows; ++y)
    for (int64_t x = 0; x < window.t.tokens; ++x, from += from_row) {
      T* token = map + (y * g.W + x) * stride;
      for_blocks(g.d, [&](auto lanes, int64_t j) INLINED { store<lanes>(token + j, load<lanes>(from + j) * scale); });
    }
}

// out = Z + F(V), equation (5).
template <class T>
VECTORISED void add_lim(const Windows& g, const Window& window, int64_t head, int64_t k, const T* v,
                        const Sum<T>* taps, const Sum<T>* bias, const Sum<T>* z, int64_t z_row, T* out) {
  const int64_t C = g.channels();
  for (int64_t y = 0; y < window.rows; y += 2) {
    const Strip t = g.strip(g.first_strip(window.t.window) + y * g.w);
    T* to = out + g.token(t.b, t.y, t.x) * C + head * g.d;
    const Sum<T>* from = z + y * t.tokens * z_row;
    lim(g, t, y + 1 < window.rows, head, k, v, taps, bias, [&](auto lanes, int row, int64_t i, int64_t j, auto value) INLINED {
      store<lanes>(to + (row * g.W + i) * C + j, value + load<lanes>(from + (row * t.tokens + i) * z_row + j));
    });
  }
}

// dV += what F(V) passes on of the gradient.
template <class T>
VECTORISED void add_lim_backward(const Windows& g, const Window& window, int64_t head, int64_t k, const T* grad,
                                 const T* v, const Sum<T>* taps, Sum<T>* sums, Sum<T>* dv, int64_t dv_row) {
  for (int64_t y = 0; y < window.rows; ++y) {
    const Strip t = g.strip(g.first_strip(window.t.window) + y * g.w);
    Sum<T>* to = dv + y * t.tokens * dv_row;
    lim_backward(g, t, head, k, grad, v, taps, sums, [&](auto lanes, int64_t i, int64_t j, auto value) INLINED {
      store<lanes>(to + i * dv_row + j, load<lanes>(to + i * dv_row + j) + value);
    });
  }
}

template <class T>
void iwsa_heads(const Windows& g, int64_t k, const T* qkv, const Sum<T>* taps, const Sum<T>* bias, T* out,
                int64_t begin, int64_t end) {
  using A = Sum<T>;
  const int64_t C = g.channels(), most = std::min(g.M, g.H) * std::min(g.M, g.W), d8 = (g.d + 7) / 8 * 8;
  Matrix<A> q(most, g.d), key(most, g.d), v(most, g.d), key_t(g.d, most), s(std::min(QUERIES, most), most), z(most, g.d);
  for (int64_t i = begin; i < end; ++i) {
    const Window window = window_of(g, i / g.heads);
    const int64_t head = i % g.heads, n = window.tokens(), n8 = (n + 7) / 8 * 8;
    const T* first = qkv + g.token(window.t.b, window.t.y, window.t.x) * 3 * C + head * g.d;
    if (i == begin || head == 0) touch(g, window, qkv, 3 * C);
    gather(g, window, first, 3 * C, 1 / std::sqrt(A(g.d)), q.row(0), q.stride);
    gather(g, window, first + C, 3 * C, A(1), key.row(0), key.stride);
    gather(g, window, first + 2 * C, 3 * C, A(1), v.row(0), v.stride);
    transpose(n, g.d, key.row(0), key.stride, key_t.row(0), key_t.stride);
    for (int64_t j = 0; j < n; j += QUERIES) {
      const int64_t m = std::min(QUERIES, n - j);
      product(m, g.d, n8, q.row(j), q.stride, 1, key_t.row(0), key_t.stride, s.row(0), s.stride, false);
      softmax(m, n, s.row(0), s.stride);
      product(m, n, d8, s.row(0), s.stride, 1, v.row(0), v.stride, z.row(j), z.stride, false);
    }
    add_lim(g, window, head, k, qkv + 2 * C, taps, bias, z.row(0), z.stride, out);
  }
}

// Attention is computed again from Q, K and V: nothing but the operator's input is kept for the backward pass.
template <class T>
void iwsa_heads_backward(const Windows& g, int64_t k, const T* grad, const T* qkv, const Sum<T>* taps, T* dqkv,
                         Sum<T>* sums, int64_t begin, int64_t end) {
  using A = Sum<T>;
  const int64_t C = g.channels(), most = std::min(g.M, g.H) * std::min(g.M, g.W), d8 = (g.d + 7) / 8 * 8;
  const A scale = 1 / std::sqrt(A(g.d));
  Matrix<A> q(most, g.d), key(most, g.d), v(most, g.d), dz(most, g.d), key_t(g.d, most), v_t(g.d, most);
  Matrix<A> p(std::min(QUERIES, most), most), ds(std::min(QUERIES, most), most);
  Matrix<A> dq(most, g.d), dk(most, g.d), dv(most, g.d);
  for (int64_t i = begin; i < end; ++i) {
    const Window window = window_of(g, i / g.heads);
    const int64_t head = i % g.heads, n = window.tokens(), n8 = (n + 7) / 8 * 8;
    const int64_t token = g.token(window.t.b, window.t.y, window.t.x), first = token * 3 * C + head * g.d;
    if (i == begin || head == 0) {
      touch(g, window, qkv, 3 * C);
      touch(g, window, grad, C);
    }
    gather(g, window, qkv + first, 3 * C, scale, q.row(0), q.stride);
    gather(g, window, qkv + first + C, 3 * C, A(1), key.row(0), key.stride);
    gather(g, window, qkv + first + 2 * C, 3 * C, A(1), v.row(0), v.stride);
    gather(g, window, grad + token * C + head * g.d, C, A(1), dz.row(0), dz.stride);
    transpose(n, g.d, key.row(0), key.stride, key_t.row(0), key_t.stride);
    transpose(n, g.d, v.row(0), v.stride, v_t.row(0), v_t.stride);
    for (int64_t j = 0; j < n; j += QUERIES) {
      const int64_t m = std::min(QUERIES, n - j);
      product(m, g.d, n8, q.row(j), q.stride, 1, key_t.row(0), key_t.stride, p.row(0), p.stride, false);
      softmax(m, n, p.row(0), p.stride);
      product(m, g.d, n8, dz.row(j), dz.stride, 1, v_t.row(0), v_t.stride, ds.row(0), ds.stride, false);
      softmax_backward(m, n, p.row(0), ds.row(0), p.stride);
      product(n, m, d8, p.row(0), 1, p.stride, dz.row(j), dz.stride, dv.row(0), dv.stride, j > 0);   // Pᵀ dZ
      product(m, n, d8, ds.row(0), ds.stride, 1, key.row(0), key.stride, dq.row(j), dq.stride, false);
      product(n, m, d8, ds.row(0), 1, ds.stride, q.row(j), q.stride, dk.row(0), dk.stride, j > 0);   // dSᵀ Q
    }
    add_lim_backward(g, window, head, k, grad, qkv + 2 * C, taps, sums, dv.row(0), dv.stride);
    scatter(g, window, dq.row(0), dq.stride, scale, dqkv + first, 3 * C);
    scatter(g, window, dk.row(0), dk.stride, A(1), dqkv + first + C, 3 * C);
    scatter(g, window, dv.row(0), dv.stride, A(1), dqkv + first + 2 * C, 3 * C);
  }
}

}  // namespace

void cpu::iwsa(const Windows& g, Type type, int64_t k, const void* qkv, const void* weight, const void* bias, void* out) {
  with_type(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const auto taps = transposed((const Sum<T>*)weight, g.channels(), k * k);
    at::parallel_for(0, g.count() * g.heads, 1, [&](int64_t begin, int64_t end) {
      iwsa_heads(g, k, (const T*)qkv, taps.data(), (const Sum<T>*)bias, (T*)out, begin, end);
    });
  });
}

void cpu::iwsa_backward(const Windows& g, Type type, int64_t k, const void* grad, const void* qkv, const void* weight,
                        void* dqkv, void* dweight, void* dbias) {
  with_type(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const int64_t C = g.channels(), size = (k * k + 1) * C, heads = g.count() * g.heads;
    const auto taps = transposed((const Sum<T>*)weight, C, k * k);
    const int64_t parts = std::clamp<int64_t>(heads / 4, 1, 32);  // from the shape alone, as in cpu.cpp
    std::vector<Sum<T>> sums(parts * size);
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        iwsa_heads_backward(g, k, (const T*)grad, (const T*)qkv, taps.data(), (T*)dqkv, sums.data() + i * size,
                            heads * i / parts, heads * (i + 1) / parts);
    });
    sum_parts(sums, parts, C, k * k, (Sum<T>*)dweight, (Sum<T>*)dbias);
  });
}
