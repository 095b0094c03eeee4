// IWSA on the CPU in one pass: everything between its two linear layers, (B, H, W, 3C) -> (B, H, W, C).
// A thread takes one head of one window, gathers its Q, K and V into a few kB of buffers that stay in cache, computes
// attention, adds LIM and writes the result to the map: windows and attention matrices never reach main memory.  Only
// a window's real tokens are gathered, so nothing is masked.  The backward pass recomputes attention.
#include <cmath>

#include "lim.h"

namespace {
constexpr int64_t LANES = 16, WIDTH = 2 * LANES;
constexpr int64_t QUERIES = 56;  // processed at a time: a large window's full score matrix is never stored

// The left factor of a product, with strides: element (i, j) is numbers[i * row + j * column], so it may be transposed.
template <class A> struct Left {
  A* numbers;
  int64_t row, column;
};

// A matrix buffer whose rows are padded to a multiple of 32 numbers.
template <class A> struct Matrix {
  struct alignas(64) Line {
    A numbers[WIDTH];
  };
  int64_t stride;  // between rows
  std::vector<Line> lines;

  Matrix(int64_t rows, int64_t columns) : stride((columns + WIDTH - 1) / WIDTH * WIDTH), lines(rows * stride / WIDTH) {}
  A* row(int64_t i) { return lines.data()->numbers + i * stride; }
  Left<A> from(int64_t i) { return {row(i), stride, 1}; }
  Left<A> transposed() { return {row(0), 1, stride}; }
};

// out = a b, or out += a b: a tile of `rows` x 2 x 16 numbers stays in registers while j runs over the inner dimension.
template <int rows, class A>
INLINED inline void product_block(int64_t inner, Left<A> a, const A* b, int64_t b_row, A* out, int64_t out_row,
                                  bool add) {
  Vec<A, LANES> sum[rows][2], right[2];
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < 2; ++v) sum[i][v] = add ? load<LANES>(out + i * out_row + v * LANES) : Vec<A, LANES>{};
  for (int64_t j = 0; j < inner; ++j, a.numbers += a.column, b += b_row) {
    std::memcpy(right, b, sizeof(right));
    for (int i = 0; i < rows; ++i)
      for (int v = 0; v < 2; ++v) sum[i][v] += a.numbers[i * a.row] * right[v];
  }
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < 2; ++v) store<LANES>(out + i * out_row + v * LANES, sum[i][v]);
}

// out[out_first:] = a b[b_first:], in tiles.
template <class A>
VECTORIZED void product(int64_t rows, int64_t inner, int64_t columns, Left<A> a, Matrix<A>& b, int64_t b_first,
                        Matrix<A>& out, int64_t out_first, bool add = false) {
  constexpr int64_t block = 7;  // 7 x 2 sums and 2 vectors of b fit in registers; 49 tokens are 7 blocks
  for (int64_t c = 0; c < columns; c += WIDTH)
    for (int64_t i = 0; i < rows;) {
      const Left<A> left = {a.numbers + i * a.row, a.row, a.column};
      const A* right = b.row(b_first) + c;
      A* to = out.row(out_first + i) + c;
      if (i + block <= rows) product_block<block>(inner, left, right, b.stride, to, out.stride, add), i += block;
      else product_block<1>(inner, left, right, b.stride, to, out.stride, add), ++i;
    }
}

// e^x for x <= 0; in float32 as 2^n 2^f, |f| <= 1/2: 2^f by Taylor series, 2^n by exponent bits; 0 below 2^-126.
INLINED inline Vec<double, LANES> exp(Vec<double, LANES> x) {
  for (int i = 0; i < LANES; ++i) x[i] = std::exp(x[i]);
  return x;
}
INLINED inline Vec<float, LANES> exp(Vec<float, LANES> x) {
  constexpr float round = 0x1.8p23f;  // adding and subtracting it rounds to an integer
  x *= 0x1.715476p0f;                 // 1 / ln 2
  const auto tiny = x < -126.0f;
  x = tiny ? Vec<float, LANES>{} : x;
  const Vec<float, LANES> n = (x + round) - round, f = x - n;
  Vec<float, LANES> power = f * 0x1.430912p-13f + 0x1.5d87fep-10f;  // (ln 2)^i / i!
  for (float next : {0x1.3b2ab6p-7f, 0x1.c6b08ep-5f, 0x1.ebfbep-3f, 0x1.62e43p-1f, 1.0f}) power = power * f + next;
  const auto exponent = (Vec<uint32_t, LANES>)__builtin_convertvector(n, Vec<int32_t, LANES>) << 23;
  return tiny ? Vec<float, LANES>{} : (Vec<float, LANES>)((Vec<uint32_t, LANES>)power + exponent);
}

// Reduces the L numbers with f by repeated halving.
template <int L, class A, class F>
INLINED inline A reduce(Vec<A, L> v, F f) {
  if constexpr (L == 1) return v[0];
  else {
    Vec<A, L / 2> half[2];
    std::memcpy(half, &v, sizeof(v));
    return reduce<L / 2, A>(f(half[0], half[1]), f);
  }
}

// In-place softmax(scale s) over the n numbers of each row, with zeros in the padding; scale > 0.
template <class A>
VECTORIZED void softmax(int64_t rows, int64_t n, A scale, Matrix<A>& s) {
  using V = Vec<A, LANES>;
  A shift[QUERIES], weight[QUERIES];  // one step for all rows at a time: steps depend on each other, rows do not
  for (int64_t i = 0; i < rows; ++i) {
    A* row = s.row(i);
    for (int64_t j = n; j < s.stride; ++j) row[j] = -INFINITY;
    V largest = load<LANES>(row);
    for (int64_t j = LANES; j < n; j += LANES) {
      const V x = load<LANES>(row + j);
      largest = x > largest ? x : largest;
    }
    shift[i] = reduce<LANES, A>(largest, [](auto a, auto b) INLINED { return a > b ? a : b; });
  }
  for (int64_t i = 0; i < rows; ++i) {
    V sum = {};
    for (int64_t j = 0; j < n; j += LANES) {  // subtract first, then scale: no rounding errors from large scores
      const V power = exp(scale * (load<LANES>(s.row(i) + j) - shift[i]));
      store<LANES>(s.row(i) + j, power);
      sum += power;
    }
    weight[i] = 1 / reduce<LANES, A>(sum, [](auto a, auto b) INLINED { return a + b; });
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < n; j += LANES) store<LANES>(s.row(i) + j, load<LANES>(s.row(i) + j) * weight[i]);
}

// dS = P (dP - Σ P dP), written over dP.
template <class A>
VECTORIZED void softmax_backward(int64_t rows, int64_t n, Matrix<A>& p, Matrix<A>& dp) {
  for (int64_t i = 0; i < rows; ++i) {
    A *from = p.row(i), *to = dp.row(i);
    std::fill(to + n, to + dp.stride, A(0));  // may hold NaN from another window
    Vec<A, LANES> sum = {};
    for (int64_t j = 0; j < n; j += LANES) sum += load<LANES>(from + j) * load<LANES>(to + j);
    const A total = reduce<LANES, A>(sum, [](auto a, auto b) INLINED { return a + b; });
    for (int64_t j = 0; j < n; j += LANES) store<LANES>(to + j, load<LANES>(from + j) * (load<LANES>(to + j) - total));
  }
}

template <class A>
VECTORIZED void transpose(int64_t rows, int64_t columns, Matrix<A>& from, Matrix<A>& to) {
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t i = 0; i < rows; ++i) to.row(j)[i] = from.row(i)[j];
}

// Buffers for one head: Q, K, V (n, d), Z = Softmax(scale Q Kᵀ) V of equation (4), and those of the backward pass.
template <class A> struct Head {
  int64_t n, d;
  A scale = 1 / std::sqrt(A(d));
  Matrix<A> q{n, d}, key{n, d}, v{n, d}, key_t{d, n}, p{std::min(QUERIES, n), n}, z{n, d};
  Matrix<A> v_t{d, n}, ds{std::min(QUERIES, n), n}, dz{n, d}, dq{n, d}, dk{n, d}, dv{n, d};

  void attend(int64_t n) {
    transpose(n, d, key, key_t);
    for (int64_t i = 0; i < n; i += QUERIES) {
      const int64_t m = std::min(QUERIES, n - i);
      product(m, d, n, q.from(i), key_t, 0, p, 0);
      softmax(m, n, scale, p);
      product(m, n, d, p.from(0), v, 0, z, i);
    }
  }

  // dZ -> dQ, dK and dV; dQ and dK still lack the factor scale.
  void attend_backward(int64_t n) {
    transpose(n, d, key, key_t);
    transpose(n, d, v, v_t);
    for (int64_t i = 0; i < n; i += QUERIES) {
      const int64_t m = std::min(QUERIES, n - i);
      product(m, d, n, q.from(i), key_t, 0, p, 0);
      softmax(m, n, scale, p);                                // P
      product(m, d, n, dz.from(i), v_t, 0, ds, 0);            // dP = dZ Vᵀ
      softmax_backward(m, n, p, ds);                          // dS, over dP
      product(n, m, d, p.transposed(), dz, i, dv, 0, i > 0);  // dV += Pᵀ dZ
      product(n, m, d, ds.transposed(), q, i, dk, 0, i > 0);  // dK += dSᵀ Q
      product(m, n, d, ds.from(0), key, 0, dq, i);            // dQ = dS K
    }
  }
};

// The place of head i % heads of window i / heads in the map: rows x columns of real tokens.
struct Place {
  const Windows& g;
  int64_t channel, strip, rows, columns;

  Place(const Windows& g, int64_t i)
      : g(g), channel(i % g.heads * g.d), strip(g.first_strip(i / g.heads)), rows(std::min(g.M, g.H - row(0).y)),
        columns(row(0).tokens) {}
  Strip row(int64_t y) const { return g.strip(strip + y * g.w); }
  int64_t token(int64_t y) const { return g.token(row(y).b, row(y).y, row(y).x); }
};

// Copies the head's channels out of a map (B, H, W, n C) into n matrices: Q, K and V, or one.
template <class T>
void gather(const Place& at, const T* map, std::initializer_list<Matrix<Sum<T>>*> matrices) {
  const int64_t C = at.g.channels(), stride = matrices.size() * C;
  map += at.channel;
  for (Matrix<Sum<T>>* to : matrices) {
    for (int64_t y = 0; y < at.rows; ++y)
      copy_tokens(at.columns, at.g.d, map + at.token(y) * stride, stride, to->row(y * at.columns), to->stride);
    map += C;
  }
}

template <class T>
void scatter(const Place& at, Matrix<Sum<T>>& from, Sum<T> scale, T* map, int64_t stride) {
  for (int64_t y = 0; y < at.rows; ++y)
    copy_tokens(at.columns, at.g.d, from.row(y * at.columns), from.stride, map + at.token(y) * stride + at.channel,
                stride, scale);
}
}  // namespace

void cpu::iwsa(const Inputs& in, const void* bias, void* out) {
  with_type<c10::BFloat16, c10::Half>(in.type, [&](auto zero) {
    using T = decltype(zero);
    const Windows& g = in.g;
    at::parallel_for(0, g.count() * g.heads, 1, [&](int64_t begin, int64_t end) {
      Head<Sum<T>> h{g.largest(), g.d};
      for (int64_t i = begin; i < end; ++i) {
        const Place at(g, i);
        gather(at, (const T*)in.qkv, {&h.q, &h.key, &h.v});
        h.attend(at.rows * at.columns);
        for (int64_t y = 0; y < at.rows; ++y)
          add_lim<T>(in, bias, at.row(y), at.channel, h.z.row(y * at.columns), h.z.stride);
        scatter(at, h.z, Sum<T>(1), (T*)out, g.channels());
      }
    });
  });
}

void cpu::iwsa_backward(const Inputs& in, const void* grad, void* dqkv, void* parts) {
  with_type<c10::BFloat16, c10::Half>(in.type, [&](auto zero) {
    using T = decltype(zero);
    const Windows& g = in.g;
    const int64_t C = g.channels();
    T* to = (T*)dqkv;
    sum_in_parts(g.count(), in, (Sum<T>*)parts, [&](Sum<T>* sums, int64_t begin, int64_t end) {
      Head<Sum<T>> h{g.largest(), g.d};
      for (int64_t i = begin * g.heads; i < end * g.heads; ++i) {
        const Place at(g, i);
        gather(at, (const T*)in.qkv, {&h.q, &h.key, &h.v});
        gather(at, (const T*)grad, {&h.dz});
        h.attend_backward(at.rows * at.columns);
        for (int64_t y = 0; y < at.rows; ++y)
          add_lim_backward<T>(in, grad, at.row(y), at.channel, sums, h.dv.row(y * at.columns), h.dv.stride);
        scatter(at, h.dq, h.scale, to, 3 * C);
        scatter(at, h.dk, h.scale, to + C, 3 * C);
        scatter(at, h.dv, Sum<T>(1), to + 2 * C, 3 * C);
      }
    });
  });
}
