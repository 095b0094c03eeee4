// Attention in one pass on the CPU.
//
// IWSA, (B, H, W, 3C) -> (B, H, W, C): a thread takes one head of one window, gathers its Q, K and V into a few kB of
// buffers that stay in the cache, attends, adds LIM and writes the result to its place in the map.  A window that the
// border cuts is gathered without what lies beyond: nothing has to be masked.
//
// SSA's equation (2), Q' (B, N, C'), K' (B, N_rn, C') and V' (B, N_rn, C) -> (B, N, C): a thread takes one head of some
// hundred queries, with the head's keys and values in such buffers.
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

// ---------------------------------------------------------------- one head
int64_t eights(int64_t n) { return (n + 7) / 8 * 8; }

// Buffers of one head, and what is done with them: Q (m, d) with the scale in it, K (n, d) and V (n, d_v) -> Z (m, d_v).
template <class A>
struct Head {
  int64_t d, d_v;
  Matrix<A> q, key, v, key_t, s, z;

  Head(int64_t m, int64_t n, int64_t d, int64_t d_v)
      : d(d), d_v(d_v), q(m, d), key(n, d), v(n, d_v), key_t(d, n), s(std::min(QUERIES, m), n), z(m, d_v) {}

  // Softmax(Q Kᵀ) for m queries from i on.
  void scores(int64_t i, int64_t m, int64_t n) {
    product(m, d, eights(n), q.row(i), q.stride, 1, key_t.row(0), key_t.stride, s.row(0), s.stride, false);
    softmax(m, n, s.row(0), s.stride);
  }

  void attend(int64_t m, int64_t n) {
    transpose(n, d, key.row(0), key.stride, key_t.row(0), key_t.stride);
    for (int64_t i = 0; i < m; i += QUERIES) {
      const int64_t block = std::min(QUERIES, m - i);
      scores(i, block, n);
      product(block, n, eights(d_v), s.row(0), s.stride, 1, v.row(0), v.stride, z.row(i), z.stride, false);
    }
  }
};

// dZ (m, d_v) -> dQ, dK and dV.  The scores are computed again: the backward pass needs nothing but the operator's input.
template <class A>
struct HeadBackward : Head<A> {
  using Head<A>::d, Head<A>::d_v, Head<A>::q, Head<A>::key, Head<A>::v, Head<A>::key_t, Head<A>::s;
  Matrix<A> dz, v_t, ds, dq, dk, dv;

  HeadBackward(int64_t m, int64_t n, int64_t d, int64_t d_v)
      : Head<A>(m, n, d, d_v), dz(m, d_v), v_t(d_v, n), ds(std::min(QUERIES, m), n), dq(m, d), dk(n, d), dv(n, d_v) {}

  void attend_backward(int64_t m, int64_t n, bool add) {  // `add`: to dK and dV of the queries before
    transpose(n, d, key.row(0), key.stride, key_t.row(0), key_t.stride);
    transpose(n, d_v, v.row(0), v.stride, v_t.row(0), v_t.stride);
    for (int64_t i = 0; i < m; i += QUERIES, add = true) {
      const int64_t block = std::min(QUERIES, m - i), d8 = eights(d), v8 = eights(d_v);
      this->scores(i, block, n);                                                                    // P
      product(block, d_v, eights(n), dz.row(i), dz.stride, 1, v_t.row(0), v_t.stride, ds.row(0), ds.stride, false);
      softmax_backward(block, n, s.row(0), ds.row(0), s.stride);                                    // dP -> dS
      product(n, block, v8, s.row(0), 1, s.stride, dz.row(i), dz.stride, dv.row(0), dv.stride, add);   // Pᵀ dZ
      product(n, block, d8, ds.row(0), 1, ds.stride, q.row(i), q.stride, dk.row(0), dk.stride, add);   // dSᵀ Q
      product(block, n, d8, ds.row(0), ds.stride, 1, key.row(0), key.stride, dq.row(i), dq.stride, false);
    }
  }
};

// ---------------------------------------------------------------- between the map and the buffers
// Tokens as they lie in a map: `rows` rows of `columns` of them, `pitch` tokens from row to row.
struct Grid {
  int64_t rows, columns, pitch;
  int64_t tokens() const { return rows * columns; }
};

// d numbers of each token, from `map` at the first token and `stride` numbers from token to token.
template <class T>
VECTORISED void gather(const Grid& grid, const T* map, int64_t stride, Sum<T> scale, int64_t d, Sum<T>* to,
                       int64_t to_row) {
  for (int64_t y = 0; y < grid.rows; ++y)
    for (int64_t x = 0; x < grid.columns; ++x, to += to_row) {
      const T* token = map + (y * grid.pitch + x) * stride;
      for_blocks(d, [&](auto lanes, int64_t j) INLINED { store<lanes>(to + j, load<lanes>(token + j) * scale); });
    }
}

template <class T>
VECTORISED void scatter(const Grid& grid, const Sum<T>* from, int64_t from_row, Sum<T> scale, int64_t d, T* map,
                        int64_t stride) {
  for (int64_t y = 0; y < grid.rows; ++y)
    for (int64_t x = 0; x < grid.columns; ++x, from += from_row) {
      T* token = map + (y * grid.pitch + x) * stride;
      for_blocks(d, [&](auto lanes, int64_t j) INLINED { store<lanes>(token + j, load<lanes>(from + j) * scale); });
    }
}

// Reads all channels before one head after the other is gathered from them: memory is fastest when it is read in order.
template <class T>
void touch(const Grid& grid, const T* map, int64_t channels) {
  for (int64_t y = 0; y < grid.rows; ++y)
    for (int64_t j = 0; j < grid.columns * channels; j += 64 / sizeof(T))
      *(const volatile char*)(map + y * grid.pitch * channels + j);
}

// ---------------------------------------------------------------- IWSA: one head of one window
// The real tokens of a window.
Grid grid_of(const Windows& g, const Strip& first) { return {std::min(g.M, g.H - first.y), first.tokens, g.W}; }

int64_t most_tokens(const Windows& g) { return std::min(g.M, g.H) * std::min(g.M, g.W); }

// out = Z + F(V), equation (5), in a window's tokens.
template <class T>
VECTORISED void add_lim(const Windows& g, int64_t window, int64_t head, int64_t k, const T* v, const Sum<T>* taps,
                        const Sum<T>* bias, const Sum<T>* z, int64_t z_row, T* out) {
  const int64_t C = g.channels(), first = g.first_strip(window), rows = grid_of(g, g.strip(first)).rows;
  for (int64_t y = 0; y < rows; y += 2) {
    const Strip t = g.strip(first + y * g.w);
    T* to = out + g.token(t.b, t.y, t.x) * C + head * g.d;
    const Sum<T>* from = z + y * t.tokens * z_row;
    lim(g, t, y + 1 < rows, head, k, v, taps, bias, [&](auto lanes, int row, int64_t i, int64_t j, auto value) INLINED {
      store<lanes>(to + (row * g.W + i) * C + j, value + load<lanes>(from + (row * t.tokens + i) * z_row + j));
    });
  }
}

// dV += what F(V) passes on of the gradient.
template <class T>
VECTORISED void add_lim_backward(const Windows& g, int64_t window, int64_t head, int64_t k, const T* grad, const T* v,
                                 const Sum<T>* taps, Sum<T>* sums, Sum<T>* dv, int64_t dv_row) {
  const int64_t first = g.first_strip(window), rows = grid_of(g, g.strip(first)).rows;
  for (int64_t y = 0; y < rows; ++y) {
    const Strip t = g.strip(first + y * g.w);
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
  const int64_t C = g.channels(), d = g.d, most = most_tokens(g);
  Head<A> h(most, most, d, d);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t window = i / g.heads, head = i % g.heads;
    const Strip t = g.strip(g.first_strip(window));
    const Grid grid = grid_of(g, t);
    const T* first = qkv + g.token(t.b, t.y, t.x) * 3 * C;
    if (i == begin || head == 0) touch(grid, first, 3 * C);
    gather(grid, first + head * d, 3 * C, 1 / std::sqrt(A(d)), d, h.q.row(0), h.q.stride);
    gather(grid, first + C + head * d, 3 * C, A(1), d, h.key.row(0), h.key.stride);
    gather(grid, first + 2 * C + head * d, 3 * C, A(1), d, h.v.row(0), h.v.stride);
    h.attend(grid.tokens(), grid.tokens());
    add_lim(g, window, head, k, qkv + 2 * C, taps, bias, h.z.row(0), h.z.stride, out);
  }
}

template <class T>
void iwsa_heads_backward(const Windows& g, int64_t k, const T* grad, const T* qkv, const Sum<T>* taps, T* dqkv,
                         Sum<T>* sums, int64_t begin, int64_t end) {
  using A = Sum<T>;
  const int64_t C = g.channels(), d = g.d, most = most_tokens(g);
  const A scale = 1 / std::sqrt(A(d));
  HeadBackward<A> h(most, most, d, d);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t window = i / g.heads, head = i % g.heads;
    const Strip t = g.strip(g.first_strip(window));
    const Grid grid = grid_of(g, t);
    const int64_t token = g.token(t.b, t.y, t.x), first = token * 3 * C + head * d;
    if (i == begin || head == 0) {
      touch(grid, qkv + token * 3 * C, 3 * C);
      touch(grid, grad + token * C, C);
    }
    gather(grid, qkv + first, 3 * C, scale, d, h.q.row(0), h.q.stride);
    gather(grid, qkv + first + C, 3 * C, A(1), d, h.key.row(0), h.key.stride);
    gather(grid, qkv + first + 2 * C, 3 * C, A(1), d, h.v.row(0), h.v.stride);
    gather(grid, grad + token * C + head * d, C, A(1), d, h.dz.row(0), h.dz.stride);
    h.attend_backward(grid.tokens(), grid.tokens(), false);
    add_lim_backward(g, window, head, k, grad, qkv + 2 * C, taps, sums, h.dv.row(0), h.dv.stride);
    scatter(grid, h.dq.row(0), h.dq.stride, scale, d, dqkv + first, 3 * C);
    scatter(grid, h.dk.row(0), h.dk.stride, A(1), d, dqkv + first + C, 3 * C);
    scatter(grid, h.dv.row(0), h.dv.stride, A(1), d, dqkv + first + 2 * C, 3 * C);
  }
}

// ---------------------------------------------------------------- SSA: one head of some queries
constexpr int64_t CHUNK = 8 * QUERIES;  // a few hundred queries make up for gathering keys and values

// Chunks begin .. end, of (image, chunk of queries, head), the head running fastest.
template <class T>
void ssa_chunks(const Sizes& n, double scale, const T* q, const T* k, const T* v, T* out, int64_t begin, int64_t end) {
  using A = Sum<T>;
  const int64_t d = n.d, d_v = n.d_v, chunks = (n.N + CHUNK - 1) / CHUNK;
  Head<A> h(std::min(CHUNK, n.N), n.N_rn, d, d_v);
  const Grid keys = {1, n.N_rn, 0};
  for (int64_t i = begin; i < end; ++i) {
    const int64_t head = i % n.heads, first = i / n.heads % chunks * CHUNK, b = i / n.heads / chunks;
    const Grid queries = {1, std::min(CHUNK, n.N - first), 0};
    const int64_t token = b * n.N + first, key = b * n.N_rn;
    gather(queries, q + (token * n.heads + head) * d, n.heads * d, A(scale), d, h.q.row(0), h.q.stride);
    gather(keys, k + (key * n.heads + head) * d, n.heads * d, A(1), d, h.key.row(0), h.key.stride);
    gather(keys, v + (key * n.heads + head) * d_v, n.heads * d_v, A(1), d_v, h.v.row(0), h.v.stride);
    h.attend(queries.columns, n.N_rn);
    scatter(queries, h.z.row(0), h.z.stride, A(1), d_v, out + (token * n.heads + head) * d_v, n.heads * d_v);
  }
}

// Heads begin .. end, of (image, head): all queries, so that dK and dV are summed in one place and in order.
template <class T>
void ssa_heads_backward(const Sizes& n, double scale, const T* grad, const T* q, const T* k, const T* v, T* dq, T* dk,
                        T* dv, int64_t begin, int64_t end) {
  using A = Sum<T>;
  const int64_t d = n.d, d_v = n.d_v, row = n.heads * d, row_v = n.heads * d_v;
  HeadBackward<A> h(std::min(CHUNK, n.N), n.N_rn, d, d_v);
  const Grid keys = {1, n.N_rn, 0};
  for (int64_t i = begin; i < end; ++i) {
    const int64_t head = i % n.heads, b = i / n.heads, key = b * n.N_rn * row + head * d;
    const int64_t value = b * n.N_rn * row_v + head * d_v;
    gather(keys, k + key, row, A(1), d, h.key.row(0), h.key.stride);
    gather(keys, v + value, row_v, A(1), d_v, h.v.row(0), h.v.stride);
    for (int64_t first = 0; first < n.N; first += CHUNK) {
      const Grid queries = {1, std::min(CHUNK, n.N - first), 0};
      const int64_t token = (b * n.N + first) * row + head * d;
      gather(queries, q + token, row, A(scale), d, h.q.row(0), h.q.stride);
      gather(queries, grad + (b * n.N + first) * row_v + head * d_v, row_v, A(1), d_v, h.dz.row(0), h.dz.stride);
      h.attend_backward(queries.columns, n.N_rn, first > 0);
      scatter(queries, h.dq.row(0), h.dq.stride, A(scale), d, dq + token, row);
    }
    scatter(keys, h.dk.row(0), h.dk.stride, A(1), d, dk + key, row);
    scatter(keys, h.dv.row(0), h.dv.stride, A(1), d_v, dv + value, row_v);
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

void cpu::ssa(const Sizes& n, Type type, double scale, const void* q, const void* k, const void* v, void* out) {
  with_type(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    at::parallel_for(0, n.B * ((n.N + CHUNK - 1) / CHUNK) * n.heads, 1, [&](int64_t begin, int64_t end) {
      ssa_chunks(n, scale, (const T*)q, (const T*)k, (const T*)v, (T*)out, begin, end);
    });
  });
}

void cpu::ssa_backward(const Sizes& n, Type type, double scale, const void* grad, const void* q, const void* k,
                       const void* v, void* dq, void* dk, void* dv) {
  with_type(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    at::parallel_for(0, n.B * n.heads, 1, [&](int64_t begin, int64_t end) {
      ssa_heads_backward(n, scale, (const T*)grad, (const T*)q, (const T*)k, (const T*)v, (T*)dq, (T*)dk, (T*)dv, begin, end);
    });
  });
}
