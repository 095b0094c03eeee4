// The reference for partition_merge_cuda.cu: the same operators on a CPU, to be read first (the fast kernel: iwsa_cpu.cpp)
#include "lim.h"

// Only copies bytes, so one function serves all types.  A head's d channels take `size` bytes.
void reference::partition(const Windows& g, int64_t itemsize, void* map, void* windows, bool backward) {
  const int64_t size = g.d * itemsize;
  for (int64_t s = 0; s < g.strips(); ++s) {
    const Strip t = g.strip(s);
    for (int64_t i = 0; i < g.M; ++i)
      for (int64_t group = 0; group < 3 * g.heads; ++group) {  // Q's heads, K's, V's
        char* outside = (char*)map + (g.token(t.b, t.y, t.x + i) * 3 * g.heads + group) * size;
        char* inside = (char*)windows + g.group(group / g.heads, t.window, group % g.heads, t.position + i) * size;
        if (i < t.tokens) std::memcpy(backward ? outside : inside, backward ? inside : outside, size);
        else if (!backward) std::memset(inside, 0, size);
      }
  }
}

void reference::merge_lim(const Inputs& in, const void* bias, const void* z, Strides z_strides, void* out) {
  with_type<c10::BFloat16, c10::Half>(in.type, [&](auto zero) {
    using T = decltype(zero);
    const Windows& g = in.g;
    const int64_t C = g.channels(), d = g.d;
    std::vector<Sum<T>> sum(g.M * d);
    for (int64_t s = 0; s < g.strips(); ++s) {
      const Strip t = g.strip(s);
      T* to = (T*)out + g.token(t.b, t.y, t.x) * C;
      for (int64_t c = 0; c < C; c += d) {  // head by head
        copy_tokens(t.tokens, d, (const T*)z + z_strides.at(t, c / d, 0), z_strides.position, sum.data(), d);
        add_lim<T>(in, bias, t, c, sum.data(), d);
        copy_tokens(t.tokens, d, sum.data(), d, to + c, C);
      }
    }
  });
}

void reference::merge_lim_backward(const Inputs& in, const void* grad, void* dz, void* dqkv, void* parts) {
  with_type<c10::BFloat16, c10::Half>(in.type, [&](auto zero) {
    using T = decltype(zero);
    const Windows& g = in.g;
    const int64_t C = g.channels(), d = g.d;
    sum_in_parts(g.strips(), in, (Sum<T>*)parts, [&](Sum<T>* sums, int64_t begin, int64_t end) {
      std::vector<Sum<T>> dv(g.M * d);
      for (int64_t s = begin; s < end; ++s) {
        const Strip t = g.strip(s);
        const int64_t token = g.token(t.b, t.y, t.x);
        T* to = (T*)dqkv + token * 3 * C;
        for (int64_t i = 0; i < t.tokens; ++i) std::fill_n(to + i * 3 * C, 2 * C, T(0));  // dQ = dK = 0
        for (int64_t c = 0; c < C; c += d) {
          T* own = (T*)dz + g.group(0, t.window, c / d, t.position) * d;
          copy_tokens(t.tokens, d, (const T*)grad + token * C + c, C, own, d);
          std::fill_n(own + t.tokens * d, (g.M - t.tokens) * d, T(0));
          std::fill(dv.begin(), dv.end(), Sum<T>(0));
          add_lim_backward<T>(in, grad, t, c, sums, dv.data(), d);
          copy_tokens(t.tokens, d, dv.data(), d, to + 2 * C + c, 3 * C);
        }
      }
    });
  });
}
