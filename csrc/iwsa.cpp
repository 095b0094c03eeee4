// IWSA on the CPU in one pass: all that lies between its two linear layers, (B, H, W, 3C) -> (B, H, W, C).
//
// A ladder of three rungs, plain PyTorch (scalablevit.py), partition and merge + LIM around PyTorch's attention (cpu.cpp),
// and this: a thread takes one head of one window, gathers its Q, K and V into a few kB of buffers that stay in the cache,
// attends, adds LIM, and writes the result to its place in the map.  Neither windows nor attention matrices ever reach
// memory.  A window that the border cuts is gathered without what lies beyond, so that nothing has to be masked.
//
// The backward pass computes attention again from the same input.  All numbers are float here, double for float64.
#include <cmath>

#include "cpu.h"

namespace {

constexpr int64_t LANES = 16;    // columns of the buffers come in vectors of 16
constexpr int64_t QUERIES = 56;  // taken at a time, so that the scores of a large window need not be stored whole

// A matrix, or the transposed of one: number (i, j) lies at numbers[i * row + j * column].
template <class A>
struct View {
  A* numbers;
  int64_t row, column;
};

// A matrix of the buffers: rows begin at multiples of 16 numbers, a cache line of floats; what follows a row's last number
// is padding.
template <class A>
struct Matrix {
  struct alignas(64) Line {
    A numbers[LANES];
  };
  int64_t stride;  // from row to row
  std::vector<Line> lines;

  Matrix(int64_t rows, int64_t columns)
      : stride((columns + LANES - 1) / LANES * LANES), lines(rows * stride / LANES) {}
  A* row(int64_t i) { return lines.data()->numbers + i * stride; }
  View<A> from(int64_t i) { return {row(i), stride, 1}; }
  View<A> transposed() { return {row(0), 1, stride}; }
};

// ---------------------------------------------------------------- matrix product
// out = a b, or += : `rows` x `vectors` x 16 numbers of out stay in registers while j runs over the inner dimension.
template <int rows, int vectors, class A>
INLINED inline void product_block(int64_t inner, View<A> a, View<A> b, View<A> out, bool add) {
  Vec<A, LANES> sum[rows][vectors], right[vectors];
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < vectors; ++v)
      sum[i][v] = add ? load<LANES>(out.numbers + i * out.row + v * LANES) : Vec<A, LANES>{};
  for (int64_t j = 0; j < inner; ++j, a.numbers += a.column, b.numbers += b.row) {
    std::memcpy(right, b.numbers, sizeof(right));
    for (int i = 0; i < rows; ++i)
      for (int v = 0; v < vectors; ++v) sum[i][v] += a.numbers[i * a.row] * right[v];
  }
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < vectors; ++v) store<LANES>(out.numbers + i * out.row + v * LANES, sum[i][v]);
}

template <int vectors, class A>
INLINED inline void product_columns(int64_t rows, int64_t inner, View<A> a, View<A> b, View<A> out, bool add) {
  constexpr int block = 7;  // 7 x 2 sums and 2 vectors of b fit in registers, and 49 tokens are 7 blocks
  const auto below = [](View<A> m, int64_t i) { return View<A>{m.numbers + i * m.row, m.row, m.column}; };
  int64_t i = 0;
  for (; i + block <= rows; i += block) product_block<block, vectors>(inner, below(a, i), b, below(out, i), add);
  for (; i < rows; ++i) product_block<1, vectors>(inner, below(a, i), b, below(out, i), add);
}

template <class A>
VECTORISED void product(int64_t rows, int64_t inner, int64_t columns, View<A> a, View<A> b, View<A> out,
                        bool add = false) {
  for (; columns > LANES; columns -= 2 * LANES, b.numbers += 2 * LANES, out.numbers += 2 * LANES)
    product_columns<2>(rows, inner, a, b, out, add);
  if (columns > 0) product_columns<1>(rows, inner, a, b, out, add);
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
  for (float next : {0x1.3b2ab6p-7f, 0x1.c6b08ep-5f, 0x1.ebfbep-3f, 0x1.62e43p-1f, 1.0f}) power = power * f + next;
  Vec<uint32_t, L> bits;
  std::memcpy(&bits, &power, sizeof(bits));
  bits += (Vec<uint32_t, L>)__builtin_convertvector(n, Vec<int32_t, L>) << 23;
  std::memcpy(&power, &bits, sizeof(bits));
  return tiny ? Vec<float, L>{} : power;
}

// f of all L numbers: of two halves, then of their halves.
template <int L, class A, class F>
INLINED inline A reduce(Vec<A, L> v, F f) {
  if constexpr (L == 1) {
    return v[0];
  } else {
    Vec<A, L / 2> half[2];
    std::memcpy(half, &v, sizeof(v));
    return reduce<L / 2, A>(f(half[0], half[1]), f);
  }
}

// Softmax(scale s) of each row's n numbers, in place, and zeros in its padding; scale > 0.
template <class A>
VECTORISED void softmax(int64_t rows, int64_t n, A scale, Matrix<A>& s) {
  using V = Vec<A, LANES>;
  A shift[QUERIES], weight[QUERIES];  // step by step over all rows: a row's steps wait for each other, rows do not
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
    for (int64_t j = 0; j < n; j += LANES) {  // subtracted before it is scaled: the rounding of large scores cancels
      const V power = exp<LANES>(scale * (load<LANES>(s.row(i) + j) - shift[i]));
      store<LANES>(s.row(i) + j, power);
      sum += power;
    }
    weight[i] = 1 / reduce<LANES, A>(sum, [](auto a, auto b) INLINED { return a + b; });
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < n; j += LANES) store<LANES>(s.row(i) + j, load<LANES>(s.row(i) + j) * weight[i]);
}

// P and dP -> dS = P (dP - Σ P dP), in place of dP.
template <class A>
VECTORISED void softmax_backward(int64_t rows, int64_t n, Matrix<A>& p, Matrix<A>& dp) {
  for (int64_t i = 0; i < rows; ++i) {
    A *from = p.row(i), *to = dp.row(i);
    std::fill(to + n, to + dp.stride, A(0));  // what another window left there may be NaN
    Vec<A, LANES> sum = {};
    for (int64_t j = 0; j < n; j += LANES) sum += load<LANES>(from + j) * load<LANES>(to + j);
    const A total = reduce<LANES, A>(sum, [](auto a, auto b) INLINED { return a + b; });
    for (int64_t j = 0; j < n; j += LANES) store<LANES>(to + j, load<LANES>(from + j) * (load<LANES>(to + j) - total));
  }
}

// ---------------------------------------------------------------- one head of one window
// The real tokens of a window: rows x columns of them from the first on, `pitch` tokens from row to row in the map.
struct Grid {
  int64_t rows, columns, pitch;
  int64_t tokens() const { return rows * columns; }
};

// d channels of each token, from `map` at the first token and `stride` numbers from token to token.
template <class T>
VECTORISED void gather(const Grid& grid, const T* map, int64_t stride, int64_t d, Matrix<Sum<T>>& matrix) {
  for (int64_t i = 0; i < grid.tokens(); ++i) {
    const T* token = map + (i / grid.columns * grid.pitch + i % grid.columns) * stride;
    for_blocks(d, [&](auto lanes, int64_t j) INLINED { store<lanes>(matrix.row(i) + j, load<lanes>(token + j)); });
  }
}

template <class T>
VECTORISED void scatter(const Grid& grid, Matrix<Sum<T>>& matrix, Sum<T> scale, int64_t d, T* map, int64_t stride) {
  for (int64_t i = 0; i < grid.tokens(); ++i) {
    T* token = map + (i / grid.columns * grid.pitch + i % grid.columns) * stride;
    for_blocks(d, [&](auto lanes, int64_t j) INLINED { store<lanes>(token + j, load<lanes>(matrix.row(i) + j) * scale); });
  }
}

template <class A>
VECTORISED void transpose(int64_t rows, int64_t columns, Matrix<A>& from, Matrix<A>& to) {
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t i = 0; i < rows; ++i) to.row(j)[i] = from.row(i)[j];
}

// Q, K, V (n, d) of a head and Z = Softmax(scale Q Kᵀ) V, equation (4); the gradients of all four.
template <class A>
struct Head {
  int64_t d;
  A scale;
  Matrix<A> q, key, v, key_t, p, z;

  Head(int64_t n, int64_t d)
      : d(d), scale(1 / std::sqrt(A(d))), q(n, d), key(n, d), v(n, d), key_t(d, n), p(std::min(QUERIES, n), n), z(n, d) {}

  // P for m queries from i on and n keys.
  void scores(int64_t i, int64_t m, int64_t n) {
    product(m, d, n, q.from(i), key_t.from(0), p.from(0));
    softmax(m, n, scale, p);
  }

  void attend(int64_t n) {
    transpose(n, d, key, key_t);
    for (int64_t i = 0; i < n; i += QUERIES) {
      const int64_t m = std::min(QUERIES, n - i);
      scores(i, m, n);
      product(m, n, d, p.from(0), v.from(0), z.from(i));
    }
  }
};

template <class A>
struct HeadBackward : Head<A> {
  using Head<A>::d, Head<A>::q, Head<A>::key, Head<A>::v, Head<A>::key_t, Head<A>::p;
  Matrix<A> dz, v_t, ds, dq, dk, dv;

  HeadBackward(int64_t n, int64_t d)
      : Head<A>(n, d), dz(n, d), v_t(d, n), ds(std::min(QUERIES, n), n), dq(n, d), dk(n, d), dv(n, d) {}

  // dZ -> dQ and dK, both yet to be multiplied by the scale, and dV.
  void attend_backward(int64_t n) {
    transpose(n, d, key, key_t);
    transpose(n, d, v, v_t);
    for (int64_t i = 0; i < n; i += QUERIES) {
      const int64_t m = std::min(QUERIES, n - i);
      this->scores(i, m, n);                                                // P
      product(m, d, n, dz.from(i), v_t.from(0), ds.from(0));                // dP = dZ Vᵀ
      softmax_backward(m, n, p, ds);                                        // dS, in place of dP
      product(n, m, d, p.transposed(), dz.from(i), dv.from(0), i > 0);      // dV += Pᵀ dZ
      product(n, m, d, ds.transposed(), q.from(i), dk.from(0), i > 0);      // dK += dSᵀ Q
      product(m, n, d, ds.from(0), key.from(0), dq.from(i));                // dQ = dS K
    }
  }
};

// ---------------------------------------------------------------- all windows
int64_t most_tokens(const Windows& g) { return std::min(g.M, g.H) * std::min(g.M, g.W); }

// From the first of a window's tokens, in (B, H, W, 3C), on: Q, K and V of one head.
template <class T, class H>
void gather_qkv(const Grid& grid, const T* token, const Windows& g, int64_t head, H& h) {
  const int64_t C = g.channels();
  gather(grid, token + head * g.d, 3 * C, g.d, h.q);
  gather(grid, token + head * g.d + C, 3 * C, g.d, h.key);
  gather(grid, token + head * g.d + 2 * C, 3 * C, g.d, h.v);
}

// Z += F(V), equation (5), and its backward: row by row of a window, from its first strip on.
template <class T>
VECTORISED void lim(const Windows& g, int64_t first, const Grid& grid, int64_t head, int64_t k, const T* v,
                    const Sum<T>* taps, const Sum<T>* bias, Matrix<Sum<T>>& z) {
  for (int64_t y = 0; y < grid.rows; ++y)
    add_lim(g, g.strip(first + y * g.w), head, k, v, taps, bias, z.row(y * grid.columns), z.stride);
}

template <class T>
VECTORISED void lim_backward(const Windows& g, int64_t first, const Grid& grid, int64_t head, int64_t k, const T* grad,
                             const T* v, const Sum<T>* taps, Sum<T>* sums, Matrix<Sum<T>>& dv) {
  for (int64_t y = 0; y < grid.rows; ++y)
    add_lim_backward(g, g.strip(first + y * g.w), head, k, grad, v, taps, sums, dv.row(y * grid.columns), dv.stride);
}

}  // namespace

void cpu::iwsa(const Windows& g, Type type, int64_t k, const void* qkv, const void* taps, const void* bias, void* out) {
  with_type(type, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    const T* map = (const T*)qkv;
    at::parallel_for(0, g.count() * g.heads, 1, [&](int64_t begin, int64_t end) {
      Head<Sum<T>> h(most_tokens(g), g.d);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i % g.heads, first = g.first_strip(i / g.heads);
        const Strip t = g.strip(first);
        const Grid grid = {std::min(g.M, g.H - t.y), t.tokens, g.W};
        const int64_t C = g.channels(), token = g.token(t.b, t.y, t.x);
        gather_qkv(grid, map + token * 3 * C, g, head, h);
        h.attend(grid.tokens());
        lim(g, first, grid, head, k, map + 2 * C, (const Sum<T>*)taps, (const Sum<T>*)bias, h.z);
        scatter(grid, h.z, Sum<T>(1), g.d, (T*)out + token * C + head * g.d, C);
      }
    });
  });
}

void cpu::iwsa_backward(const Windows& g, Type type, int64_t k, const void* grad, const void* qkv, const void* taps,
                        void* dqkv, void* dweight, void* dbias) {
  with_type(type, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    const T *map = (const T*)qkv, *dout = (const T*)grad;
    const int64_t C = g.channels(), d = g.d;
    sum_in_parts(g.count(), C, k, (Sum<T>*)dweight, (Sum<T>*)dbias, [&](Sum<T>* sums, int64_t begin, int64_t end) {
      HeadBackward<Sum<T>> h(most_tokens(g), d);
      for (int64_t i = begin * g.heads; i < end * g.heads; ++i) {
        const int64_t head = i % g.heads, first = g.first_strip(i / g.heads);
        const Strip t = g.strip(first);
        const Grid grid = {std::min(g.M, g.H - t.y), t.tokens, g.W};
        const int64_t token = g.token(t.b, t.y, t.x);
        T* to = (T*)dqkv + token * 3 * C + head * d;
        gather_qkv(grid, map + token * 3 * C, g, head, h);
        gather(grid, dout + token * C + head * d, C, d, h.dz);
        h.attend_backward(grid.tokens());
        lim_backward(g, first, grid, head, k, dout, map + 2 * C, (const Sum<T>*)taps, sums, h.dv);
        scatter(grid, h.dq, h.scale, d, to, 3 * C);
        scatter(grid, h.dk, h.scale, d, to + C, 3 * C);
        scatter(grid, h.dv, Sum<T>(1), d, to + 2 * C, 3 * C);
      }
    });
  });
}
