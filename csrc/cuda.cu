// The kernels on the GPU, in plain CUDA C++ without PyTorch's headers: nvcc alone compiles this file.
// Compiled for sm_80 and sm_90; not run, for want of a GPU.
//
// How work is mapped to threads:
// - All that is moved is bound by memory, so what counts is that neighbouring threads touch neighbouring addresses,
//   16 bytes each.  A block takes a strip (windows.h), and its threads run along the strip's tokens and their channels:
//   consecutive in the map, and consecutive in the windows for d channels at a time.
// - A strip is found with 64-bit divisions, once per block.  Within it, counts fit in 32 bits and divisions are cheap.
// - A thread reads the k² neighbours of its token straight from memory: other threads of the block, and the blocks of
//   the rows above and below, read the same addresses at about the same time, so that the caches serve most of them.
// - The weight's gradient is a sum over all tokens.  A block takes one part of the strips and 32 channels; a warp reads
//   one token's 32 channels, the 8 warps take every eighth token, and keep a sum for each tap in registers.  The 8 sums
//   are added in shared memory, and the parts by a second kernel, always in the same order: no atomics, and the same
//   result in every run.
// - Nothing waits for the device and nothing is allocated: the kernels can be captured in a CUDA graph.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "kernels.h"

namespace {

constexpr int threads = 128;

template <class T>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};
template <class T>
using Sum = typename SumOf<T>::type;

// By name, because PyTorch's build turns the implicit conversions off.
__device__ float widen(float x) { return x; }
__device__ double widen(double x) { return x; }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float widen(__half x) { return __half2float(x); }
__device__ void narrow(float x, float& to) { to = x; }
__device__ void narrow(double x, double& to) { to = x; }
__device__ void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }
__device__ void narrow(float x, __half& to) { to = __float2half_rn(x); }

// V neighbouring channels, loaded and stored together.
template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
  T x[V];
};
template <int V, class T>
__device__ Pack<T, V> load(const T* p) {
  return *reinterpret_cast<const Pack<T, V>*>(p);
}
template <int V, class T>
__device__ void store(T* p, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(p) = pack;
}

// Of a grid: the kernels loop where this is fewer than there is work for.
int blocks(int64_t n) { return static_cast<int>(std::min<int64_t>(n, INT32_MAX)); }

// ---------------------------------------------------------------- window partition and its backward
// Bytes are moved and no numbers computed, in words of 16 or 2 bytes; a head's d channels are `size` words.
template <class Word, bool backward>
__global__ void partition_kernel(Windows g, unsigned size, Word* map, Word* windows) {
  const unsigned heads = g.heads, words = 3 * heads * size, M = g.M;  // words per token
  for (int64_t s = blockIdx.x; s < g.strips(); s += gridDim.x) {
    const Strip t = g.strip(s);
    const unsigned tokens = t.tokens;
    for (unsigned n = threadIdx.x; n < (backward ? tokens : M) * words; n += blockDim.x) {
      const unsigned i = n / words, group = n % words / size, third = group / heads, head = group % heads;
      Word* outside = map + g.token(t.b, t.y, t.x) * words + n;
      Word* inside = windows + g.group(third, t.window, head, t.position + i) * size + n % size;
      if (backward) *outside = *inside;
      else *inside = i < tokens ? *outside : Word{};
    }
  }
}

template <class Word>
cudaError_t partition_words(const Windows& g, int64_t itemsize, void* map, void* windows, bool backward,
                            cudaStream_t stream) {
  const auto kernel = backward ? partition_kernel<Word, true> : partition_kernel<Word, false>;
  kernel<<<blocks(g.strips()), threads, 0, stream>>>(g, g.d * itemsize / sizeof(Word), static_cast<Word*>(map),
                                                     static_cast<Word*>(windows));
  return cudaGetLastError();
}

// ---------------------------------------------------------------- window merge + LIM and its backward
template <class T, int V>
__global__ void merge_lim_kernel(Windows g, int64_t k, const T* __restrict__ z, Strides z_strides,
                                 const T* __restrict__ v, const Sum<T>* __restrict__ weight,
                                 const Sum<T>* __restrict__ bias, T* __restrict__ out) {
  const int64_t C = g.channels(), r = k / 2;
  const unsigned packs = C / V, d = g.d;
  for (int64_t s = blockIdx.x; s < g.strips(); s += gridDim.x) {
    const Strip t = g.strip(s);
    for (unsigned n = threadIdx.x; n < t.tokens * packs; n += blockDim.x) {
      const unsigned i = n / packs, c = n % packs * V;
      const int64_t x = t.x + i;
      Pack<Sum<T>, V> sum = load<V>(bias + c);
      for (int64_t ky = 0; ky < k; ++ky)
        for (int64_t kx = 0; kx < k; ++kx) {
          const int64_t row = t.y + ky - r, column = x + kx - r;
          if (row < 0 || row >= g.H || column < 0 || column >= g.W) continue;
          const auto w = load<V>(weight + (ky * k + kx) * C + c);
          const auto neighbour = load<V>(v + g.token(t.b, row, column) * 3 * C + c);
          for (int u = 0; u < V; ++u) sum.x[u] += w.x[u] * widen(neighbour.x[u]);
        }
      const auto own = load<V>(z + z_strides.at(t, c / d, i) + c % d);
      Pack<T, V> result;
      for (int u = 0; u < V; ++u) narrow(sum.x[u] + widen(own.x[u]), result.x[u]);
      store(out + g.token(t.b, t.y, x) * C + c, result);
    }
  }
}

// dz and dqkv.  V at a token went into the outputs around it: tap (ky, kx) leads to (y - ky + r, x - kx + r).
template <class T, int V>
__global__ void merge_lim_backward_kernel(Windows g, int64_t k, const T* __restrict__ grad,
                                          const Sum<T>* __restrict__ weight, T* __restrict__ dz,
                                          T* __restrict__ dqkv) {
  const int64_t C = g.channels(), r = k / 2;
  const unsigned packs = C / V, d = g.d, M = g.M;
  for (int64_t s = blockIdx.x; s < g.strips(); s += gridDim.x) {
    const Strip t = g.strip(s);
    for (unsigned n = threadIdx.x; n < M * packs; n += blockDim.x) {
      const unsigned i = n / packs, c = n % packs * V;
      T* dz_group = dz + g.group(0, t.window, c / d, t.position + i) * d + c % d;
      if (i >= t.tokens) {
        store(dz_group, Pack<T, V>{});
        continue;
      }
      const int64_t x = t.x + i, token = g.token(t.b, t.y, x);
      Pack<Sum<T>, V> sum = {};
      for (int64_t ky = 0; ky < k; ++ky)
        for (int64_t kx = 0; kx < k; ++kx) {
          const int64_t row = t.y - ky + r, column = x - kx + r;
          if (row < 0 || row >= g.H || column < 0 || column >= g.W) continue;
          const auto w = load<V>(weight + (ky * k + kx) * C + c);
          const auto neighbour = load<V>(grad + g.token(t.b, row, column) * C + c);
          for (int u = 0; u < V; ++u) sum.x[u] += w.x[u] * widen(neighbour.x[u]);
        }
      Pack<T, V> dv;
      for (int u = 0; u < V; ++u) narrow(sum.x[u], dv.x[u]);
      T* dq = dqkv + token * 3 * C + c;
      store(dq, Pack<T, V>{});
      store(dq + C, Pack<T, V>{});
      store(dq + 2 * C, dv);
      store(dz_group, load<V>(grad + token * C + c));
    }
  }
}

constexpr int warps = 8, batch = 10;  // taps that are summed together: k = 3 and the bias fit

// parts (cuda_parts, k² + 1, C): one block per part and 32 channels, sums over its strips.  The last "tap" is the bias.
template <class T>
__global__ void parts_kernel(Windows g, int64_t k, const T* __restrict__ grad, const T* __restrict__ v,
                             Sum<T>* __restrict__ parts) {
  const int64_t C = g.channels(), r = k / 2, taps = k * k;
  const int64_t begin = g.strips() * blockIdx.x / cuda_parts, end = g.strips() * (blockIdx.x + 1) / cuda_parts;
  __shared__ Sum<T> shared[warps][32];
  for (int64_t c0 = int64_t(blockIdx.y) * 32; c0 < C; c0 += int64_t(gridDim.y) * 32)
    for (int64_t first = 0; first <= taps; first += batch) {
      const int64_t c = c0 + threadIdx.x;
      Sum<T> sum[batch] = {};
      if (c < C)
        for (int64_t n = begin * g.M + threadIdx.y; n < end * g.M; n += warps) {
          const Strip t = g.strip(n / g.M);
          const int64_t i = n % g.M, x = t.x + i;
          if (i >= t.tokens) continue;
          const int64_t token = g.token(t.b, t.y, x);
          const Sum<T> value = widen(v[token * 3 * C + c]);
#pragma unroll
          for (int u = 0; u < batch; ++u) {
            const int64_t tap = first + u, row = t.y - tap / k + r, column = x - tap % k + r;
            if (tap == taps) sum[u] += widen(grad[token * C + c]);
            else if (tap < taps && row >= 0 && row < g.H && column >= 0 && column < g.W)
              sum[u] += value * widen(grad[g.token(t.b, row, column) * C + c]);
          }
        }
#pragma unroll
      for (int u = 0; u < batch; ++u) {
        shared[threadIdx.y][threadIdx.x] = sum[u];
        __syncthreads();
        if (threadIdx.y == 0 && c < C && first + u <= taps) {
          Sum<T> total = 0;
          for (int i = 0; i < warps; ++i) total += shared[i][threadIdx.x];
          parts[(blockIdx.x * (taps + 1) + first + u) * C + c] = total;
        }
        __syncthreads();
      }
    }
}

// One thread per tap and channel: the parts, in order.
template <class A>
__global__ void total_kernel(int64_t taps, int64_t C, const A* __restrict__ parts, A* __restrict__ dweight,
                             A* __restrict__ dbias) {
  const int64_t size = (taps + 1) * C, step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; n < size; n += step) {
    A total = 0;
    for (int64_t i = 0; i < cuda_parts; ++i) total += parts[i * size + n];
    const int64_t tap = n / C, c = n % C;
    if (tap < taps) dweight[c * taps + tap] = total;
    else dbias[c] = total;
  }
}

// ---------------------------------------------------------------- choice of type and width
bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Calls f with a T*, null, that says the type.
template <class F>
cudaError_t with_type(Type type, F f) {
  switch (type) {
    case Type::Float32: return f(static_cast<float*>(nullptr));
    case Type::Float64: return f(static_cast<double*>(nullptr));
    case Type::BFloat16: return f(static_cast<__nv_bfloat16*>(nullptr));
    case Type::Float16: return f(static_cast<__half*>(nullptr));
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t cuda::partition(const Windows& g, int64_t itemsize, void* map, void* windows, bool backward,
                            cudaStream_t stream) {
  if (g.strips() == 0) return cudaSuccess;
  const bool wide = g.d * itemsize % 16 == 0 && aligned(map) && aligned(windows);
  return (wide ? partition_words<uint4> : partition_words<ushort1>)(g, itemsize, map, windows, backward, stream);
}

cudaError_t cuda::merge_lim(const Windows& g, Type type, int64_t k, const void* z, Strides z_strides, const void* qkv,
                            const void* weight, const void* bias, void* out, cudaStream_t stream) {
  if (g.strips() == 0) return cudaSuccess;
  return with_type(type, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    constexpr int V = 16 / sizeof(T);
    const bool wide = g.d % V == 0 && z_strides.window % V == 0 && z_strides.head % V == 0 &&
                      z_strides.position % V == 0 && aligned(z) && aligned(qkv) && aligned(weight) && aligned(bias) &&
                      aligned(out);
    const auto kernel = wide ? merge_lim_kernel<T, V> : merge_lim_kernel<T, 1>;
    kernel<<<blocks(g.strips()), threads, 0, stream>>>(
        g, k, static_cast<const T*>(z), z_strides, static_cast<const T*>(qkv) + 2 * g.channels(),
        static_cast<const Sum<T>*>(weight), static_cast<const Sum<T>*>(bias), static_cast<T*>(out));
    return cudaGetLastError();
  });
}

cudaError_t cuda::merge_lim_backward(const Windows& g, Type type, int64_t k, const void* grad, const void* qkv,
                                     const void* weight, void* dz, void* dqkv, void* dweight, void* dbias, void* parts,
                                     cudaStream_t stream) {
  return with_type(type, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    constexpr int V = 16 / sizeof(T);
    const int64_t C = g.channels(), taps = k * k;
    if (g.strips() > 0) {
      const bool wide = g.d % V == 0 && aligned(grad) && aligned(weight) && aligned(dz) && aligned(dqkv);
      const auto kernel = wide ? merge_lim_backward_kernel<T, V> : merge_lim_backward_kernel<T, 1>;
      kernel<<<blocks(g.strips()), threads, 0, stream>>>(g, k, static_cast<const T*>(grad),
                                                         static_cast<const Sum<T>*>(weight), static_cast<T*>(dz),
                                                         static_cast<T*>(dqkv));
    }
    const dim3 grid(cuda_parts, static_cast<unsigned>(std::min<int64_t>((C + 31) / 32, 65535)));
    parts_kernel<<<grid, dim3(32, warps), 0, stream>>>(g, k, static_cast<const T*>(grad),
                                                       static_cast<const T*>(qkv) + 2 * C,
                                                       static_cast<Sum<T>*>(parts));
    total_kernel<<<blocks(((taps + 1) * C + threads - 1) / threads), threads, 0, stream>>>(
        taps, C, static_cast<const Sum<T>*>(parts), static_cast<Sum<T>*>(dweight), static_cast<Sum<T>*>(dbias));
    return cudaGetLastError();
  });
}
