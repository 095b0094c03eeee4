// The first rung on the CPU: window partition, and window merge + LIM, each with its backward.  In their shortest form:
// this is where to read what cuda.cu does on a GPU; what is fast on a CPU is iwsa.cpp.
#include "cpu.h"

// Bytes are moved and no numbers computed: one function for all types.  A head's d channels are `size` bytes.
void cpu::partition(const Windows& g, int64_t itemsize, void* map, void* windows, bool backward) {
  const int64_t size = g.d * itemsize;
  at::parallel_for(0, g.strips(), 64, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const Strip t = g.strip(s);
      for (int64_t i = 0; i < g.M; ++i)
        for (int64_t group = 0; group < 3 * g.heads; ++group) {  // Q's heads, K's, V's
          char* outside = (char*)map + (g.token(t.b, t.y, t.x + i) * 3 * g.heads + group) * size;
          char* inside = (char*)windows + g.group(group / g.heads, t.window, group % g.heads, t.position + i) * size;
          if (i >= t.tokens) {
            if (!backward) std::memset(inside, 0, size);
          } else {
            std::memcpy(backward ? outside : inside, backward ? inside : outside, size);
          }
        }
    }
  });
}

namespace {

// d channels of n tokens, `from_row` and `to_row` apart.
template <class From, class To>
INLINED inline void copy_tokens(int64_t n, int64_t d, const From* from, int64_t from_row, To* to, int64_t to_row) {
  for (int64_t i = 0; i < n; ++i)
    for_blocks(d, [&](auto L, int64_t j) INLINED { store<L>(to + i * to_row + j, load<L>(from + i * from_row + j)); });
}

template <class T>
VECTORISED void merge_strips(const Windows& g, int64_t k, const T* z, Strides z_strides, const T* v, const Sum<T>* weight,
                             const Sum<T>* bias, T* out, int64_t begin, int64_t end) {
  const int64_t C = g.channels(), d = g.d;
  std::vector<Sum<T>> sum(g.M * d);
  for (int64_t s = begin; s < end; ++s) {
    const Strip t = g.strip(s);
    for (int64_t head = 0; head < g.heads; ++head) {
      copy_tokens(t.tokens, d, z + z_strides.at(t, head, 0), z_strides.position, sum.data(), d);
      add_lim(g, t, head * d, k, v, weight, bias, sum.data(), d);
      copy_tokens(t.tokens, d, sum.data(), d, out + g.token(t.b, t.y, t.x) * C + head * d, C);
    }
  }
}

// Strips begin .. end: dz and dqkv, and their part of the weight's gradient.
template <class T>
VECTORISED void merge_backward(const Windows& g, int64_t k, const T* grad, const T* v, const Sum<T>* weight, T* dz,
                               T* dqkv, Sum<T>* sums, int64_t begin, int64_t end) {
  const int64_t C = g.channels(), d = g.d;
  std::vector<Sum<T>> dv(g.M * d);
  for (int64_t s = begin; s < end; ++s) {
    const Strip t = g.strip(s);
    const int64_t token = g.token(t.b, t.y, t.x);
    for (int64_t i = 0; i < t.tokens; ++i) std::fill_n(dqkv + (token + i) * 3 * C, 2 * C, T(0));  // of Q and K: none
    for (int64_t head = 0; head < g.heads; ++head) {
      T* own = dz + g.group(0, t.window, head, t.position) * d;
      copy_tokens(t.tokens, d, grad + token * C + head * d, C, own, d);
      std::fill_n(own + t.tokens * d, (g.M - t.tokens) * d, T(0));
      std::fill(dv.begin(), dv.end(), Sum<T>(0));
      add_lim_backward(g, t, head * d, k, grad, v, weight, sums, dv.data(), d);
      copy_tokens(t.tokens, d, dv.data(), d, dqkv + (token * 3 + 2) * C + head * d, 3 * C);
    }
  }
}

}  // namespace

void cpu::merge_lim(const Windows& g, Type type, int64_t k, const void* z, Strides z_strides, const void* qkv,
                    const void* weight, const void* bias, void* out) {
  with_type(type, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    at::parallel_for(0, g.strips(), 8, [&](int64_t begin, int64_t end) {
      merge_strips(g, k, (const T*)z, z_strides, (const T*)qkv + 2 * g.channels(), (const Sum<T>*)weight,
                   (const Sum<T>*)bias, (T*)out, begin, end);
    });
  });
}

void cpu::merge_lim_backward(const Windows& g, Type type, int64_t k, const void* grad, const void* qkv,
                             const void* weight, void* dz, void* dqkv, void* dweight, void* dbias, void* parts) {
  with_type(type, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    const auto work = [&](Sum<T>* sums, int64_t begin, int64_t end) {
      merge_backward(g, k, (const T*)grad, (const T*)qkv + 2 * g.channels(), (const Sum<T>*)weight, (T*)dz, (T*)dqkv,
                     sums, begin, end);
    };
    sum_in_parts(g.strips(), g.channels(), k, (Sum<T>*)parts, (Sum<T>*)dweight, (Sum<T>*)dbias, work);
  });
}
