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

template <class T>
VECTORISED void merge_strips(const Windows& g, int64_t k, const T* z, Strides z_strides, const T* v,
                             const Sum<T>* taps, const Sum<T>* bias, T* out, int64_t begin, int64_t end) {
  for (int64_t s = begin; s < end; ++s) {
    const Strip t = g.strip(s);
    for (int64_t i = 0; i < t.tokens; ++i)
      for (int64_t head = 0; head < g.heads; ++head)
        for_blocks(g.d, [&](auto lanes, int64_t j) INLINED {
          const int64_t c = head * g.d + j;
          const auto own = load<lanes>(z + z_strides.at(t, head, i) + j);
          store<lanes>(out + g.token(t.b, t.y, t.x + i) * g.channels() + c,
                       own + lim<lanes>(g, t.b, t.y, t.x + i, c, k, v, taps, bias));
        });
  }
}

// Windows begin .. end: dz and dqkv, and their part of the weight's gradient.
template <class T>
VECTORISED void merge_backward(const Windows& g, int64_t k, const T* grad, const T* v, const Sum<T>* taps, T* dz,
                               T* dqkv, Sum<T>* sums, int64_t begin, int64_t end) {
  const int64_t C = g.channels();
  for (int64_t window = begin; window < end; ++window)
    for (int64_t y = 0; y < g.M; ++y) {
      const Strip t = g.strip(g.first_strip(window) + y * g.w);
      for (int64_t i = 0; i < g.M; ++i) {
        const int64_t token = g.token(t.b, t.y, t.x + i);
        if (i < t.tokens) std::fill_n(dqkv + token * 3 * C, 2 * C, T(0));  // LIM has no part in those of Q and K
        for (int64_t head = 0; head < g.heads; ++head) {
          T* own = dz + g.group(0, window, head, t.position + i) * g.d;
          if (i >= t.tokens) {
            std::fill_n(own, g.d, T(0));
            continue;
          }
          std::copy_n(grad + token * C + head * g.d, g.d, own);
          for_blocks(g.d, [&](auto lanes, int64_t j) INLINED {
            const int64_t c = head * g.d + j;
            store<lanes>(dqkv + (token * 3 + 2) * C + c,
                         lim_backward<lanes>(g, t.b, t.y, t.x + i, c, k, grad, v, taps, sums));
          });
        }
      }
    }
}

}  // namespace

void cpu::merge_lim(const Windows& g, Type type, int64_t k, const void* z, Strides z_strides, const void* qkv,
                    const void* taps, const void* bias, void* out) {
  with_type(type, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    at::parallel_for(0, g.strips(), 8, [&](int64_t begin, int64_t end) {
      merge_strips(g, k, (const T*)z, z_strides, (const T*)qkv + 2 * g.channels(), (const Sum<T>*)taps,
                   (const Sum<T>*)bias, (T*)out, begin, end);
    });
  });
}

void cpu::merge_lim_backward(const Windows& g, Type type, int64_t k, const void* grad, const void* qkv,
                             const void* taps, void* dz, void* dqkv, void* dweight, void* dbias) {
  with_type(type, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    sum_in_parts(g, k, (Sum<T>*)dweight, (Sum<T>*)dbias, [&](Sum<T>* sums, int64_t begin, int64_t end) {
      merge_backward(g, k, (const T*)grad, (const T*)qkv + 2 * g.channels(), (const Sum<T>*)taps, (T*)dz, (T*)dqkv,
                     sums, begin, end);
    });
  });
}
