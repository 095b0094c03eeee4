// Attention in one pass on the CPU: the last rung of a ladder.  For IWSA, between its two linears, over the stage shapes of
// ScalableViT-S at batch 8 (tests/bench.py; two cores with AVX-512, medians of one run, float32 and bfloat16):
//
//   1. plain PyTorch (scalablevit.py)                           forward 1          forward + backward 1
//   2. partition, PyTorch's attention, merge + LIM (cpu.cpp)            1.3-1.7 x                     1.2-1.5 x as fast
//   3. one pass (here)                                                  2.8-3.4 x                     1.9-3.0 x
//
// IWSA, (B, H, W, 3C) -> (B, H, W, C): a thread takes one head of one window, gathers its Q, K and V into a few kB of
// buffers that stay in the cache, attends, adds LIM and writes the result to its place in the map.  A window that the
// border cuts is gathered without what lies beyond: nothing has to be masked.
//
// SSA's equation (2), Q' (B, N, C'), K' (B, N_rn, C') and V' (B, N_rn, C) -> (B, N, C): a thread takes one head of some
// hundred queries, with the head's keys and values in such buffers.
//
// Everything is computed in float, double for float64.  Where the processor multiplies pairs of bfloat16 and adds them to
// a float (AVX512-BF16), bfloat16 stays as it is up to there: `PairsHead`.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "lim.h"

namespace {

constexpr int64_t LANES = 16;
// The queries are taken in blocks, so that the scores of a large window need not be stored whole.  Even: `PairsHead`.
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
  A* row(int64_t i) { return reinterpret_cast<A*>(lines.data()) + i * stride; }
};

// ---------------------------------------------------------------- matrix product
// sum += a b, where a is one number for all lanes.
template <int L, class A>
INLINED inline void multiply_add(Vec<A, L>& sum, const A* a, Vec<A, L> b) {
  sum += *a * b;
}

#ifdef BFLOAT16_PAIRS
using Pair = uint32_t;  // two bfloat16: a product's inner dimension is taken two by two

template <int L>
INLINED inline void multiply_add(Vec<float, L>& sum, const Pair* a, Vec<Pair, L> b) {
  if constexpr (L == 16) asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(b), "m"(*a));
  else asm("vdpbf16ps %2%{1to8%}, %1, %0" : "+v"(sum) : "v"(b), "m"(*a));
}
#endif

// out = a b, or += : `rows` x `vectors` x L numbers of out in registers while j runs over the product's inner dimension.
// a(i, j) lies at a[i * a_row + j * a_column], so that the same code takes a transposed.
template <int rows, int vectors, int L, class E, class A>
INLINED inline void product_block(int64_t inner, const E* a, int64_t a_row, int64_t a_column, const E* b,
                                  int64_t b_row, A* out, int64_t out_row, bool add) {
  Vec<A, L> sum[rows][vectors];
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < vectors; ++v) sum[i][v] = add ? load<L>(out + i * out_row + v * L) : Vec<A, L>{};
  for (int64_t j = 0; j < inner; ++j, a += a_column, b += b_row) {
    Vec<E, L> right[vectors];
    std::memcpy(right, b, sizeof(right));
    for (int i = 0; i < rows; ++i)
      for (int v = 0; v < vectors; ++v) multiply_add<L>(sum[i][v], a + i * a_row, right[v]);
  }
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < vectors; ++v) store<L>(out + i * out_row + v * L, sum[i][v]);
}

template <int vectors, int L, class E, class A>
INLINED inline void product_columns(int64_t rows, int64_t inner, const E* a, int64_t a_row, int64_t a_column,
                                    const E* b, int64_t b_row, A* out, int64_t out_row, bool add) {
  constexpr int block = 7;  // 7 x 3 sums, 3 vectors of b: 24 of AVX-512's 32 registers; and 49 tokens are 7 blocks
  int64_t i = 0;
  for (; i + block <= rows; i += block)
    product_block<block, vectors, L>(inner, a + i * a_row, a_row, a_column, b, b_row, out + i * out_row, out_row, add);
  for (; i < rows; ++i)
    product_block<1, vectors, L>(inner, a + i * a_row, a_row, a_column, b, b_row, out + i * out_row, out_row, add);
}

// columns: a multiple of 8.
template <class E, class A>
INLINED inline void product_of(int64_t rows, int64_t inner, int64_t columns, const E* a, int64_t a_row,
                               int64_t a_column, const E* b, int64_t b_row, A* out, int64_t out_row, bool add) {
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

template <class A>
VECTORISED void product(int64_t rows, int64_t inner, int64_t columns, const A* a, int64_t a_row, int64_t a_column,
                        const A* b, int64_t b_row, A* out, int64_t out_row, bool add) {
  product_of(rows, inner, columns, a, a_row, a_column, b, b_row, out, out_row, add);
}

#ifdef BFLOAT16_PAIRS
BFLOAT16_PAIRS void product(int64_t rows, int64_t inner, int64_t columns, const Pair* a, int64_t a_row,
                            int64_t a_column, const Pair* b, int64_t b_row, float* out, int64_t out_row, bool add) {
  product_of(rows, inner, columns, a, a_row, a_column, b, b_row, out, out_row, add);
}
#endif

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
      for (int l = 0; l < LANES; ++l) std::memcpy(&square[l], from + (i + l) * from_row + j, sizeof(square[l]));
      exchange<1, A>(square, lanes);
      exchange<2, A>(square, lanes);
      exchange<4, A>(square, lanes);
      exchange<8, A>(square, lanes);
      for (int l = 0; l < LANES; ++l) std::memcpy(to + (j + l) * to_row + i, &square[l], sizeof(square[l]));
    }
}

// ---------------------------------------------------------------- softmax
template <int L>
INLINED inline Vec<double, L> exp(Vec<double, L> x) {
  for (int i = 0; i < L; ++i) x[i] = std::exp(x[i]);
  return x;
}

// e^x for x <= 0 as 2^n 2^f, |f| <= 1/2: 2^f by its Taylor series, 2^n by adding n to the exponent.  What would be below
// 2^-126 is 0; NaN stays NaN.
template <int L>
INLINED inline Vec<float, L> exp(Vec<float, L> x) {
  constexpr float round = 0x1.8p23f;  // adding it leaves no room for a fraction
  x *= 0x1.715476p0f;                 // 1 / ln 2
  const auto tiny = x < -126.0f;
  x = tiny ? Vec<float, L>{} : x;
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
  return tiny ? Vec<float, L>{} : power;
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

// Softmax(scale s) of each row's n numbers, in place; scale >= 0.  Step by step over all rows: a row's steps wait for each
// other, rows do not.
template <class A>
VECTORISED void softmax(int64_t rows, int64_t n, A scale, A* s, int64_t s_row) {
  using V = Vec<A, LANES>;
  A shift[QUERIES], weight[QUERIES];  // shift: the largest score
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
      // Subtracted before it is scaled: the other way round, an fma would leave the rounding of a large product behind.
      V power = exp<LANES>(scale * (load<LANES>(s + i * s_row + j) - shift[i]));
      if (n - j < LANES) power = load_row((const A*)&power, 0, n - j, A(0));
      store<LANES>(s + i * s_row + j, power);
      sum += power;
    }
    weight[i] = 1 / sum_of<A>(sum);
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < n; j += LANES) store<LANES>(s + i * s_row + j, load<LANES>(s + i * s_row + j) * weight[i]);
}

// P and dP -> dS = P (dP - Σ P dP), in place of dP.
template <class A>
VECTORISED void softmax_backward(int64_t rows, int64_t n, const A* p, A* dp, int64_t row) {
  for (int64_t i = 0; i < rows; ++i, p += row, dp += row) {
    Vec<A, LANES> sum = {};
    for (int64_t j = 0; j < n; j += LANES) sum += load<LANES>(p + j) * load_row(dp, j, n, A(0));
    const A mean = sum_of<A>(sum);
    for (int64_t j = 0; j < n; j += LANES) store<LANES>(dp + j, load<LANES>(p + j) * (load_row(dp, j, n, A(0)) - mean));
  }
}

// ---------------------------------------------------------------- one head
int64_t eights(int64_t n) { return (n + 7) / 8 * 8; }

// Buffers of one head, and what is done with them: Q (m, d), K (n, d) and V (n, d_v) -> Z (m, d_v).
template <class A>
struct Head {
  int64_t d, d_v;
  A scale;
  Matrix<A> q, key, v, key_t, s, z;

  Head(int64_t m, int64_t n, int64_t d, int64_t d_v, double scale)
      : d(d), d_v(d_v), scale(scale), q(m, d), key(n, d), v(n, d_v), key_t(d, n), s(std::min(QUERIES, m), n), z(m, d_v) {}

  // Softmax(scale Q Kᵀ) of m queries from i on.
  void scores(int64_t i, int64_t m, int64_t n) {
    product(m, d, eights(n), q.row(i), q.stride, 1, key_t.row(0), key_t.stride, s.row(0), s.stride, false);
    softmax(m, n, scale, s.row(0), s.stride);
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

// dZ (m, d_v) -> dQ and dK, both yet to be multiplied by the scale, and dV.  The scores are computed again: the backward
// pass needs nothing but the operator's input.
template <class A>
struct HeadBackward : Head<A> {
  using Head<A>::d, Head<A>::d_v, Head<A>::q, Head<A>::key, Head<A>::v, Head<A>::key_t, Head<A>::s;
  Matrix<A> dz, v_t, ds, dq, dk, dv;

  HeadBackward(int64_t m, int64_t n, int64_t d, int64_t d_v, double scale)
      : Head<A>(m, n, d, d_v, scale), dz(m, d_v), v_t(d_v, n), ds(std::min(QUERIES, m), n), dq(m, d), dk(n, d),
        dv(n, d_v) {}

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

#ifdef BFLOAT16_PAIRS
// The same for bfloat16, in pairs.  Other products, in another order of memory: not the template above.  `q`, `key`, `v` and
// `dz` hold the rows as they are in memory, two channels to a pair, and `..._rows` pairs from two rows each.  P and dS are
// rounded to bfloat16, as the plain form rounds them.
int64_t pairs_in(int64_t n) { return (n + 1) / 2; }

// Two rows of bfloat16 -> one row of pairs; a last odd row is paired with zeros.
VECTORISED void interleave(int64_t rows, int64_t columns, const Pair* from, int64_t from_row, Pair* to, int64_t to_row) {
  for (int64_t i = 0; i < rows; i += 2, from += 2 * from_row, to += to_row)
    for (int64_t j = 0; j < columns; j += LANES) {
      Vec<uint16_t, LANES> upper, lower = {};
      std::memcpy(&upper, (const char*)from + 2 * j, sizeof(upper));
      if (i + 1 < rows) std::memcpy(&lower, (const char*)(from + from_row) + 2 * j, sizeof(lower));
      const auto pairs = __builtin_convertvector(upper, Vec<Pair, LANES>) | __builtin_convertvector(lower, Vec<Pair, LANES>) << 16;
      std::memcpy(to + j, &pairs, sizeof(pairs));
    }
}

// Rows of floats -> rows of bfloat16.
VECTORISED void narrow(int64_t rows, int64_t columns, const float* from, int64_t from_row, Pair* to, int64_t to_row) {
  for (int64_t i = 0; i < rows; ++i, from += from_row, to += to_row)
    for (int64_t j = 0; j < columns; j += LANES) store<LANES>((c10::BFloat16*)to + j, load<LANES>(from + j));
}

struct PairsHead {
  int64_t d, d_v;
  float scale;
  Matrix<Pair> q, key, v, key_t, v_rows, p;
  Matrix<float> s, z;

  PairsHead(int64_t m, int64_t n, int64_t d, int64_t d_v, double scale)
      : d(d), d_v(d_v), scale(scale), q(m, pairs_in(d)), key(n, pairs_in(d)), v(n, pairs_in(d_v)),
        key_t(pairs_in(d), n), v_rows(pairs_in(n), d_v), p(std::min(QUERIES, m), pairs_in(n)),
        s(std::min(QUERIES, m), n), z(m, d_v) {}

  void scores(int64_t i, int64_t m, int64_t n) {
    product(m, pairs_in(d), eights(n), q.row(i), q.stride, 1, key_t.row(0), key_t.stride, s.row(0), s.stride, false);
    softmax(m, n, scale, s.row(0), s.stride);
    narrow(m, n, s.row(0), s.stride, p.row(0), p.stride);
  }

  void attend(int64_t m, int64_t n) {
    transpose(n, pairs_in(d), key.row(0), key.stride, key_t.row(0), key_t.stride);
    interleave(n, d_v, v.row(0), v.stride, v_rows.row(0), v_rows.stride);
    for (int64_t i = 0; i < m; i += QUERIES) {
      const int64_t block = std::min(QUERIES, m - i);
      scores(i, block, n);
      product(block, pairs_in(n), eights(d_v), p.row(0), p.stride, 1, v_rows.row(0), v_rows.stride, z.row(i), z.stride, false);
    }
  }
};

struct PairsHeadBackward : PairsHead {
  Matrix<Pair> dz, v_t, q_rows, k_rows, dz_rows, p_rows, ds16, ds_rows;
  Matrix<float> ds, dq, dk, dv;

  PairsHeadBackward(int64_t m, int64_t n, int64_t d, int64_t d_v, double scale)
      : PairsHead(m, n, d, d_v, scale), dz(m, pairs_in(d_v)), v_t(pairs_in(d_v), n), q_rows(pairs_in(m), d),
        k_rows(pairs_in(n), d), dz_rows(pairs_in(m), d_v), p_rows(pairs_in(std::min(QUERIES, m)), n), ds16(std::min(QUERIES, m), pairs_in(n)),
        ds_rows(pairs_in(std::min(QUERIES, m)), n), ds(std::min(QUERIES, m), n), dq(m, d), dk(n, d), dv(n, d_v) {}

  void attend_backward(int64_t m, int64_t n, bool add) {
    transpose(n, pairs_in(d), key.row(0), key.stride, key_t.row(0), key_t.stride);
    transpose(n, pairs_in(d_v), v.row(0), v.stride, v_t.row(0), v_t.stride);
    interleave(m, d, q.row(0), q.stride, q_rows.row(0), q_rows.stride);
    interleave(n, d, key.row(0), key.stride, k_rows.row(0), k_rows.stride);
    interleave(m, d_v, dz.row(0), dz.stride, dz_rows.row(0), dz_rows.stride);
    for (int64_t i = 0; i < m; i += QUERIES, add = true) {
      const int64_t block = std::min(QUERIES, m - i), pairs = pairs_in(block), d8 = eights(d), v8 = eights(d_v);
      scores(i, block, n);
      product(block, pairs_in(d_v), eights(n), dz.row(i), dz.stride, 1, v_t.row(0), v_t.stride, ds.row(0), ds.stride, false);
      softmax_backward(block, n, s.row(0), ds.row(0), s.stride);
      narrow(block, n, ds.row(0), ds.stride, ds16.row(0), ds16.stride);
      interleave(block, n, p.row(0), p.stride, p_rows.row(0), p_rows.stride);
      interleave(block, n, ds16.row(0), ds16.stride, ds_rows.row(0), ds_rows.stride);
      product(n, pairs, v8, p_rows.row(0), 1, p_rows.stride, dz_rows.row(i / 2), dz_rows.stride, dv.row(0), dv.stride, add);
      product(n, pairs, d8, ds_rows.row(0), 1, ds_rows.stride, q_rows.row(i / 2), q_rows.stride, dk.row(0), dk.stride, add);
      product(block, pairs_in(n), d8, ds16.row(0), ds16.stride, 1, k_rows.row(0), k_rows.stride, dq.row(i), dq.stride, false);
    }
  }
};
#endif

struct PairsHead;  // names only, where there are no pairs
struct PairsHeadBackward;

// Calls f with two null pointers for their types: a T* for the numbers in memory, and one to the head that computes with them.
template <template <class> class OfNumbers, class OfPairs, class F>
void with_head(Type type, F f) {
  with_type(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
#ifdef BFLOAT16_PAIRS
    if constexpr (std::is_same_v<T, c10::BFloat16>)
      if (__builtin_cpu_supports("avx512bf16")) return f(t, (OfPairs*)nullptr);
#endif
    f(t, (OfNumbers<Sum<T>>*)nullptr);
  });
}

// ---------------------------------------------------------------- between the map and the buffers
// Tokens as they lie in a map: `rows` rows of `columns` of them, `pitch` tokens from row to row.
struct Grid {
  int64_t rows, columns, pitch;
  int64_t tokens() const { return rows * columns; }
};

// d numbers of each token, from `map` at the first token and `stride` numbers from token to token.
template <class T>
VECTORISED void gather(const Grid& grid, const T* map, int64_t stride, int64_t d, Matrix<Sum<T>>& matrix) {
  Sum<T>* to = matrix.row(0);
  for (int64_t y = 0; y < grid.rows; ++y)
    for (int64_t x = 0; x < grid.columns; ++x, to += matrix.stride) {
      const T* token = map + (y * grid.pitch + x) * stride;
      for_blocks(d, [&](auto lanes, int64_t j) INLINED { store<lanes>(to + j, load<lanes>(token + j)); });
    }
}

#ifdef BFLOAT16_PAIRS
VECTORISED void gather(const Grid& grid, const c10::BFloat16* map, int64_t stride, int64_t d, Matrix<Pair>& matrix) {
  Pair* to = matrix.row(0);
  for (int64_t y = 0; y < grid.rows; ++y)
    for (int64_t x = 0; x < grid.columns; ++x, to += matrix.stride) {
      const c10::BFloat16* token = map + (y * grid.pitch + x) * stride;
      for_blocks(d, [&](auto lanes, int64_t j) INLINED { std::memcpy((char*)to + 2 * j, token + j, 2 * lanes); });
    }
}
#endif

template <class T>
VECTORISED void scatter(const Grid& grid, Matrix<Sum<T>>& matrix, Sum<T> scale, int64_t d, T* map, int64_t stride) {
  const Sum<T>* from = matrix.row(0);
  for (int64_t y = 0; y < grid.rows; ++y)
    for (int64_t x = 0; x < grid.columns; ++x, from += matrix.stride) {
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

// One head's Q, K and V, from a window's first token in (B, H, W, 3C) on.
template <class H, class T>
void gather_qkv(const Grid& grid, const T* token, int64_t C, int64_t head, H& h) {
  gather(grid, token + head * h.d, 3 * C, h.d, h.q);
  gather(grid, token + C + head * h.d, 3 * C, h.d, h.key);
  gather(grid, token + 2 * C + head * h.d, 3 * C, h.d, h.v);
}

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

template <class H, class T>
void iwsa_heads(const Windows& g, int64_t k, const T* qkv, const Sum<T>* taps, const Sum<T>* bias, T* out,
                int64_t begin, int64_t end) {
  const int64_t C = g.channels(), most = most_tokens(g);
  H h(most, most, g.d, g.d, 1 / std::sqrt(g.d));
  for (int64_t i = begin; i < end; ++i) {
    const int64_t window = i / g.heads, head = i % g.heads;
    const Strip t = g.strip(g.first_strip(window));
    const Grid grid = grid_of(g, t);
    const T* token = qkv + g.token(t.b, t.y, t.x) * 3 * C;
    if (i == begin || head == 0) touch(grid, token, 3 * C);
    gather_qkv(grid, token, C, head, h);
    h.attend(grid.tokens(), grid.tokens());
    add_lim(g, window, head, k, qkv + 2 * C, taps, bias, h.z.row(0), h.z.stride, out);
  }
}

template <class H, class T>
void iwsa_heads_backward(const Windows& g, int64_t k, const T* grad, const T* qkv, const Sum<T>* taps, T* dqkv,
                         Sum<T>* sums, int64_t begin, int64_t end) {
  const int64_t C = g.channels(), d = g.d, most = most_tokens(g);
  H h(most, most, d, d, 1 / std::sqrt(d));
  for (int64_t i = begin; i < end; ++i) {
    const int64_t window = i / g.heads, head = i % g.heads;
    const Strip t = g.strip(g.first_strip(window));
    const Grid grid = grid_of(g, t);
    const int64_t token = g.token(t.b, t.y, t.x), first = token * 3 * C + head * d;
    if (i == begin || head == 0) {
      touch(grid, qkv + token * 3 * C, 3 * C);
      touch(grid, grad + token * C, C);
    }
    gather_qkv(grid, qkv + token * 3 * C, C, head, h);
    gather(grid, grad + token * C + head * d, C, d, h.dz);
    h.attend_backward(grid.tokens(), grid.tokens(), false);
    add_lim_backward(g, window, head, k, grad, qkv + 2 * C, taps, sums, h.dv.row(0), h.dv.stride);
    scatter(grid, h.dq, h.scale, d, dqkv + first, 3 * C);
    scatter(grid, h.dk, h.scale, d, dqkv + first + C, 3 * C);
    scatter(grid, h.dv, Sum<T>(1), d, dqkv + first + 2 * C, 3 * C);
  }
}

// ---------------------------------------------------------------- SSA: one head of some queries
constexpr int64_t CHUNK = 8 * QUERIES;  // a few hundred queries make up for gathering keys and values

// Chunks begin .. end, of (image, chunk of queries, head), the head running fastest.
template <class H, class T>
void ssa_chunks(const Sizes& n, double scale, const T* q, const T* k, const T* v, T* out, int64_t begin, int64_t end) {
  const int64_t d = n.d, d_v = n.d_v, chunks = (n.N + CHUNK - 1) / CHUNK;
  H h(std::min(CHUNK, n.N), n.N_rn, d, d_v, scale);
  const Grid keys = {1, n.N_rn, 0};
  for (int64_t i = begin; i < end; ++i) {
    const int64_t head = i % n.heads, first = i / n.heads % chunks * CHUNK, b = i / n.heads / chunks;
    const Grid queries = {1, std::min(CHUNK, n.N - first), 0};
    const int64_t token = b * n.N + first, key = b * n.N_rn;
    gather(queries, q + (token * n.heads + head) * d, n.heads * d, d, h.q);
    gather(keys, k + (key * n.heads + head) * d, n.heads * d, d, h.key);
    gather(keys, v + (key * n.heads + head) * d_v, n.heads * d_v, d_v, h.v);
    h.attend(queries.columns, n.N_rn);
    scatter(queries, h.z, Sum<T>(1), d_v, out + (token * n.heads + head) * d_v, n.heads * d_v);
  }
}

// Heads begin .. end, of (image, head): all queries, so that dK and dV are summed in one place and in order.  (More
// threads than images x heads have nothing to do.)
template <class H, class T>
void ssa_heads_backward(const Sizes& n, double scale, const T* grad, const T* q, const T* k, const T* v, T* dq, T* dk,
                        T* dv, int64_t begin, int64_t end) {
  const int64_t d = n.d, d_v = n.d_v, row = n.heads * d, row_v = n.heads * d_v;
  H h(std::min(CHUNK, n.N), n.N_rn, d, d_v, scale);
  const Grid keys = {1, n.N_rn, 0};
  for (int64_t i = begin; i < end; ++i) {
    const int64_t head = i % n.heads, b = i / n.heads, key = b * n.N_rn * row + head * d;
    const int64_t value = b * n.N_rn * row_v + head * d_v;
    gather(keys, k + key, row, d, h.key);
    gather(keys, v + value, row_v, d_v, h.v);
    for (int64_t first = 0; first < n.N; first += CHUNK) {
      const Grid queries = {1, std::min(CHUNK, n.N - first), 0};
      const int64_t token = (b * n.N + first) * row + head * d;
      gather(queries, q + token, row, d, h.q);
      gather(queries, grad + (b * n.N + first) * row_v + head * d_v, row_v, d_v, h.dz);
      h.attend_backward(queries.columns, n.N_rn, first > 0);
      scatter(queries, h.dq, h.scale, d, dq + token, row);
    }
    scatter(keys, h.dk, h.scale, d, dk + key, row);
    scatter(keys, h.dv, Sum<T>(1), d_v, dv + value, row_v);
  }
}

}  // namespace

void cpu::iwsa(const Windows& g, Type type, int64_t k, const void* qkv, const void* weight, const void* bias, void* out) {
  with_head<Head, PairsHead>(type, [&](auto* t, auto* h) {
    using T = std::remove_pointer_t<decltype(t)>;
    using H = std::remove_pointer_t<decltype(h)>;
    const auto taps = transposed((const Sum<T>*)weight, g.channels(), k * k);
    at::parallel_for(0, g.count() * g.heads, 1, [&](int64_t begin, int64_t end) {
      iwsa_heads<H>(g, k, (const T*)qkv, taps.data(), (const Sum<T>*)bias, (T*)out, begin, end);
    });
  });
}

void cpu::iwsa_backward(const Windows& g, Type type, int64_t k, const void* grad, const void* qkv, const void* weight,
                        void* dqkv, void* dweight, void* dbias) {
  with_head<HeadBackward, PairsHeadBackward>(type, [&](auto* t, auto* h) {
    using T = std::remove_pointer_t<decltype(t)>;
    using H = std::remove_pointer_t<decltype(h)>;
    const int64_t C = g.channels(), size = (k * k + 1) * C, heads = g.count() * g.heads;
    const auto taps = transposed((const Sum<T>*)weight, C, k * k);
    const int64_t parts = std::clamp<int64_t>(heads / 4, 1, 32);  // from the shape alone, as in cpu.cpp
    std::vector<Sum<T>> sums(parts * size);
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        iwsa_heads_backward<H>(g, k, (const T*)grad, (const T*)qkv, taps.data(), (T*)dqkv, sums.data() + i * size,
                            heads * i / parts, heads * (i + 1) / parts);
    });
    sum_parts(sums, parts, C, k * k, (Sum<T>*)dweight, (Sum<T>*)dbias);
  });
}

void cpu::ssa(const Sizes& n, Type type, double scale, const void* q, const void* k, const void* v, void* out) {
  with_head<Head, PairsHead>(type, [&](auto* t, auto* h) {
    using T = std::remove_pointer_t<decltype(t)>;
    using H = std::remove_pointer_t<decltype(h)>;
    at::parallel_for(0, n.B * ((n.N + CHUNK - 1) / CHUNK) * n.heads, 1, [&](int64_t begin, int64_t end) {
      ssa_chunks<H>(n, scale, (const T*)q, (const T*)k, (const T*)v, (T*)out, begin, end);
    });
  });
}

void cpu::ssa_backward(const Sizes& n, Type type, double scale, const void* grad, const void* q, const void* k,
                       const void* v, void* dq, void* dk, void* dv) {
  with_head<HeadBackward, PairsHeadBackward>(type, [&](auto* t, auto* h) {
    using T = std::remove_pointer_t<decltype(t)>;
    using H = std::remove_pointer_t<decltype(h)>;
    at::parallel_for(0, n.B * n.heads, 1, [&](int64_t begin, int64_t end) {
      ssa_heads_backward<H>(n, scale, (const T*)grad, (const T*)q, (const T*)k, (const T*)v, (T*)dq, (T*)dk, (T*)dv, begin, end);
    });
  });
}
