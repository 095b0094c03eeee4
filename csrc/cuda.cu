// The kernels on the GPU, in plain CUDA C++ without PyTorch's headers: nvcc alone compiles this file, and so does a C++
// compiler with the stand-ins of tests/cuda_on_cpu, which run every thread on a CPU.
//
// How work is mapped to threads:
// - Neighbouring threads touch neighbouring addresses, 16 bytes each: a "pack" of V channels.  A thread takes one pack and
//   walks along the tokens of a strip (windows.h).  A block is x packs wide and y strips high, so that its threads are
//   busy whether C is 64 or 512.
// - What a strip needs is worked out once: the 64-bit divisions that find it, the addresses, and, for the usual k = 3, the
//   pack's 9 weights, which stay in registers.  From token to token addresses are only added to.
// - A thread reads the k² neighbours of its token straight from memory: other threads of the block, and the blocks of
//   the rows above and below, read the same addresses at about the same time, so that the caches serve most of them.
//   With k = 3 known to the compiler the 9 loads are under way together.  Any other k runs the same text, more slowly.
// - The weight's gradient is a sum over all tokens.  A block takes one part of the strips; each thread keeps the sums of
//   its pack, for 9 taps and the bias, in registers.  The threads' sums are added in shared memory, and the parts by a
//   second kernel, always in the same order: no atomics, and the same result in every run.
// - Nothing waits for the device and nothing is allocated: the kernels can be captured in a CUDA graph.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "kernels.h"

// The threads of a block and the blocks of a grid, at most.  Tests make them small, so that loops have to turn.
#ifndef MAX_THREADS
#define MAX_THREADS most_threads
#define MAX_BLOCKS INT32_MAX
#endif

namespace {

constexpr int most_threads = 256;

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
// Zeros instead, where `on_map` says that there is nothing to load.  16 bytes are chosen as one and not number by number.
template <int V, class T>
__device__ Pack<T, V> load_if(bool on_map, const T* p) {
  if constexpr (sizeof(Pack<T, V>) == 16) {
    const uint4 words = on_map ? *reinterpret_cast<const uint4*>(p) : uint4{};
    return reinterpret_cast<const Pack<T, V>&>(words);
  } else {
    return on_map ? load<V>(p) : Pack<T, V>{};
  }
}
template <int V, class T>
__device__ void store(T* p, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(p) = pack;
}

// The strips of a thread: the first, and how far it is to the next one where the grid is smaller than the work.
__device__ int64_t first_strip() { return int64_t(blockIdx.x) * blockDim.y + threadIdx.y; }
__device__ int64_t strips_at_once() { return int64_t(gridDim.x) * blockDim.y; }

// ---------------------------------------------------------------- window partition and its backward
// Bytes are moved and no numbers computed, in words of 16 or 2 bytes; a head's d channels are `size` words.
template <class Word, bool backward>
__global__ void partition_kernel(Windows g, unsigned size, Word* __restrict__ map, Word* __restrict__ windows) {
  const unsigned heads = g.heads, words = 3 * heads * size;  // words per token
  for (int64_t s = first_strip(); s < g.strips(); s += strips_at_once()) {
    const Strip t = g.strip(s);
    const unsigned tokens = t.tokens, M = g.M;
    for (unsigned n = threadIdx.x; n < words; n += blockDim.x) {
      const unsigned group = n / size, third = group / heads, head = group % heads;
      Word* outside = map + g.token(t.b, t.y, t.x) * words + n;
      Word* inside = windows + g.group(third, t.window, head, t.position) * size + n % size;
      for (unsigned i = 0; i < (backward ? tokens : M); ++i) {
        if (backward) outside[i * words] = inside[i * size];
        else inside[i * size] = i < tokens ? outside[i * words] : Word{};
      }
    }
  }
}

// ---------------------------------------------------------------- window merge + LIM and its backward
// The weights of a thread's pack, from (k, k, C), where k = K is known to the compiler; K = 0: they are read when needed.
template <class A, int V, int K>
struct Weights {
  Pack<A, V> in_registers[K ? K * K : 1];
  const A* in_memory;
  int64_t C;

  __device__ Weights(const A* weight, int64_t C, unsigned c) : in_memory(weight + c), C(C) {
#pragma unroll
    for (int tap = 0; tap < K * K; ++tap) in_registers[tap] = load<V>(in_memory + tap * C);
  }
  __device__ Pack<A, V> operator[](int64_t tap) const { return K ? in_registers[tap] : load<V>(in_memory + tap * C); }
};

// sum += the k x k neighbours of the token (y, x), of which `here` is the thread's pack, times their weights.  Beyond the
// border there are zeros.  `stride`: from token to token; mirrored: V at a token went into the outputs around it, and tap
// (ky, kx) leads back to (y - ky + r, x - kx + r).
template <int K, bool mirrored, class T, class A, int V>
__device__ void add_neighbours(Pack<A, V>& sum, const Windows& g, int64_t any_k, unsigned y, unsigned x, const T* here,
                               int64_t stride, const Weights<A, V, K>& weights) {
  const int64_t k = K ? K : any_k, r = k / 2;
  const unsigned H = g.H, W = g.W;
#pragma unroll
  for (int64_t ky = 0; ky < k; ++ky)
#pragma unroll
    for (int64_t kx = 0; kx < k; ++kx) {
      const int64_t dy = ky - r, dx = kx - r, tap = ky * k + kx;
      const auto neighbour = load_if<V>(y + unsigned(dy) < H && x + unsigned(dx) < W, here + (dy * W + dx) * stride);
      const auto w = weights[mirrored ? k * k - 1 - tap : tap];
      for (int u = 0; u < V; ++u) sum.x[u] += w.x[u] * widen(neighbour.x[u]);
    }
}

template <class T, int V, int K>
__global__ void __launch_bounds__(most_threads)
    merge_lim_kernel(Windows g, int64_t k, const T* __restrict__ z, Strides z_strides, const T* __restrict__ v,
                     const Sum<T>* __restrict__ weight, const Sum<T>* __restrict__ bias, T* __restrict__ out) {
  const unsigned C = g.channels(), d = g.d;
  for (unsigned c = threadIdx.x * V; c < C; c += blockDim.x * V) {
    const Weights<Sum<T>, V, K> weights(weight, C, c);
    for (int64_t s = first_strip(); s < g.strips(); s += strips_at_once()) {
      const Strip t = g.strip(s);
      const int64_t token = g.token(t.b, t.y, t.x);
      const T* own = z + z_strides.at(t, c / d, 0) + c % d;
      const T* here = v + token * 3 * C + c;
      T* to = out + token * C + c;
      for (unsigned i = 0; i < t.tokens; ++i, own += z_strides.position, here += 3 * C, to += C) {
        Pack<Sum<T>, V> sum = load<V>(bias + c);
        add_neighbours<K, false>(sum, g, k, t.y, t.x + i, here, 3 * C, weights);
        const auto attention = load<V>(own);
        Pack<T, V> result;
        for (int u = 0; u < V; ++u) narrow(sum.x[u] + widen(attention.x[u]), result.x[u]);
        store(to, result);
      }
    }
  }
}

// dz and dqkv.
template <class T, int V, int K>
__global__ void __launch_bounds__(most_threads)
    merge_lim_backward_kernel(Windows g, int64_t k, const T* __restrict__ grad, const Sum<T>* __restrict__ weight,
                              T* __restrict__ dz, T* __restrict__ dqkv) {
  const unsigned C = g.channels(), d = g.d;
  for (unsigned c = threadIdx.x * V; c < C; c += blockDim.x * V) {
    const Weights<Sum<T>, V, K> weights(weight, C, c);
    for (int64_t s = first_strip(); s < g.strips(); s += strips_at_once()) {
      const Strip t = g.strip(s);
      const int64_t token = g.token(t.b, t.y, t.x);
      const T* here = grad + token * C + c;
      T* own = dz + g.group(0, t.window, c / d, t.position) * d + c % d;
      T* dq = dqkv + token * 3 * C + c;
      for (unsigned i = 0; i < g.M; ++i, here += C, own += d, dq += 3 * C) {
        if (i >= t.tokens) {
          store(own, Pack<T, V>{});
          continue;
        }
        Pack<Sum<T>, V> sum = {};
        add_neighbours<K, true>(sum, g, k, t.y, t.x + i, here, C, weights);
        Pack<T, V> dv;
        for (int u = 0; u < V; ++u) narrow(sum.x[u], dv.x[u]);
        store(dq, Pack<T, V>{});
        store(dq + C, Pack<T, V>{});
        store(dq + 2 * C, dv);
        store(own, load<V>(here));
      }
    }
  }
}

// Adds up, in order, what the threads of each column of a block hold, and calls put(number, sum) for the V numbers of each.
template <class A, int V, class Put>
__device__ void sum_columns(const Pack<A, V>& held, Put put) {
  __shared__ Pack<A, V> shared[most_threads];
  const unsigned me = threadIdx.y * blockDim.x + threadIdx.x, width = blockDim.x * V;
  const A* numbers = shared[0].x;
  shared[me] = held;
  __syncthreads();
  for (unsigned n = me; n < width; n += blockDim.x * blockDim.y) {
    A sum = 0;
    for (unsigned y = 0; y < blockDim.y; ++y) sum += numbers[y * width + n];
    put(n, sum);
  }
  __syncthreads();
}

// parts (cuda_parts, k² + 1, C): a block for each part, of the strips, and for each x packs of channels.  The last "tap" is
// the bias.  Taps are summed ten at a time: k = 3 and the bias fit.
template <class T, int V, int K>
__global__ void __launch_bounds__(most_threads, K ? 2 : 1)
    parts_kernel(Windows g, int64_t any_k, const T* __restrict__ grad, const T* __restrict__ v,
                 Sum<T>* __restrict__ parts) {
  constexpr int batch = 10;
  const int64_t k = K ? K : any_k, r = k / 2, taps = k * k, C = g.channels(), part = blockIdx.y;
  const int64_t c0 = int64_t(blockIdx.x) * blockDim.x * V, c = c0 + threadIdx.x * V;
  const int64_t begin = g.strips() * part / cuda_parts, end = g.strips() * (part + 1) / cuda_parts;
  for (int64_t first = 0; first <= taps; first += batch) {
    int64_t dy[batch], dx[batch];  // where the taps lead, from V at a token to the outputs around it
#pragma unroll
    for (int u = 0; u < batch; ++u) {
      dy[u] = first + u < taps ? r - (first + u) / k : 0;
      dx[u] = first + u < taps ? r - (first + u) % k : 0;
    }
    Pack<Sum<T>, V> sum[batch] = {};
    for (int64_t s = begin + threadIdx.y; s < end && c < C; s += blockDim.y) {
      const Strip t = g.strip(s);
      const int64_t token = g.token(t.b, t.y, t.x);
      const T* here = grad + token * C + c;
      const T* own = v + token * 3 * C + c;
      const unsigned y = t.y, H = g.H, W = g.W;
      for (unsigned x = t.x; x < t.x + t.tokens; ++x, here += C, own += 3 * C) {
        const auto value = load<V>(own);
#pragma unroll
        for (int u = 0; u < batch; ++u) {
          const bool on_map = first + u <= taps && y + unsigned(dy[u]) < H && x + unsigned(dx[u]) < W;
          const auto neighbour = load_if<V>(on_map, here + (dy[u] * W + dx[u]) * C);
          for (int j = 0; j < V; ++j)
            sum[u].x[j] += (first + u == taps ? 1 : widen(value.x[j])) * widen(neighbour.x[j]);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < batch; ++u)
      sum_columns(sum[u], [&](unsigned n, Sum<T> total) {
        if (first + u <= taps && c0 + n < C) parts[(part * (taps + 1) + first + u) * C + c0 + n] = total;
      });
  }
}

// The parts of each tap and channel: a column of a block's threads for each.
template <class A>
__global__ void total_kernel(int64_t taps, int64_t C, const A* __restrict__ parts, A* __restrict__ dweight,
                             A* __restrict__ dbias) {
  const int64_t size = (taps + 1) * C, first = int64_t(blockIdx.x) * blockDim.x;
  Pack<A, 1> sum = {};
  if (first + threadIdx.x < size)
    for (int64_t part = threadIdx.y; part < cuda_parts; part += blockDim.y)
      sum.x[0] += parts[part * size + first + threadIdx.x];
  sum_columns(sum, [&](unsigned column, A total) {
    const int64_t tap = (first + column) / C, c = (first + column) % C;
    if (tap < taps) dweight[c * taps + tap] = total;
    else if (tap == taps) dbias[c] = total;
  });
}

// ---------------------------------------------------------------- launches, and the choice of type, width and k
int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A block for `items` that lie side by side: they are x, or, where that is more than a block may have, taken in as few turns
// as possible, each as full as the others; and y such rows.
dim3 block_for(int64_t items) {
  const int64_t x = divide_up(items, divide_up(items, MAX_THREADS));
  return dim3(x, MAX_THREADS / x);
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

// A kernel that takes `items` of every strip.
template <class... Parameters, class... Arguments>
cudaError_t launch_on_strips(void (*kernel)(Windows, Parameters...), const Windows& g, int64_t items,
                             cudaStream_t stream, Arguments... arguments) {
  if (g.strips() == 0) return cudaSuccess;
  const dim3 block = block_for(items), grid(std::min<int64_t>(divide_up(g.strips(), block.y), MAX_BLOCKS));
  return launch(kernel, grid, block, stream, g, arguments...);
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// A kernel's template arguments.
template <class T_, int V_, int K_>
struct Form {
  using T = T_;
  static constexpr int V = V_, K = K_;
};

template <class T, class Wide, class F>
cudaError_t with_type(int64_t k, Wide wide, F f) {
  constexpr int V = 16 / sizeof(T);
  if (wide(V)) return k == 3 ? f(Form<T, V, 3>{}) : f(Form<T, V, 0>{});
  return k == 3 ? f(Form<T, 1, 3>{}) : f(Form<T, 1, 0>{});
}

// Calls f with the Form to use.  wide(V): whether V channels can be loaded together.
template <class Wide, class F>
cudaError_t with_form(Type type, int64_t k, Wide wide, F f) {
  switch (type) {
    case Type::Float32: return with_type<float>(k, wide, f);
    case Type::Float64: return with_type<double>(k, wide, f);
    case Type::BFloat16: return with_type<__nv_bfloat16>(k, wide, f);
    case Type::Float16: return with_type<__half>(k, wide, f);
  }
  return cudaErrorInvalidValue;
}

template <class Word>
cudaError_t partition_words(const Windows& g, int64_t itemsize, void* map, void* windows, bool backward,
                            cudaStream_t stream) {
  const int64_t size = g.d * itemsize / sizeof(Word);
  return launch_on_strips(backward ? partition_kernel<Word, true> : partition_kernel<Word, false>, g,
                          3 * g.heads * size, stream, size, static_cast<Word*>(map), static_cast<Word*>(windows));
}

}  // namespace

cudaError_t cuda::partition(const Windows& g, int64_t itemsize, void* map, void* windows, bool backward,
                            cudaStream_t stream) {
  const bool wide = g.d * itemsize % 16 == 0 && aligned(map) && aligned(windows);
  return (wide ? partition_words<uint4> : partition_words<ushort1>)(g, itemsize, map, windows, backward, stream);
}

cudaError_t cuda::merge_lim(const Windows& g, Type type, int64_t k, const void* z, Strides z_strides, const void* qkv,
                            const void* weight, const void* bias, void* out, cudaStream_t stream) {
  const auto wide = [&](int64_t V) {
    return g.d % V == 0 && z_strides.window % V == 0 && z_strides.head % V == 0 && z_strides.position % V == 0 &&
           aligned(z) && aligned(qkv) && aligned(weight) && aligned(bias) && aligned(out);
  };
  return with_form(type, k, wide, [&](auto form) {
    using F = decltype(form);
    using T = typename F::T;
    return launch_on_strips(merge_lim_kernel<T, F::V, F::K>, g, g.channels() / F::V, stream, k,
                            static_cast<const T*>(z), z_strides, static_cast<const T*>(qkv) + 2 * g.channels(),
                            static_cast<const Sum<T>*>(weight), static_cast<const Sum<T>*>(bias), static_cast<T*>(out));
  });
}

cudaError_t cuda::merge_lim_backward(const Windows& g, Type type, int64_t k, const void* grad, const void* qkv,
                                     const void* weight, void* dz, void* dqkv, void* dweight, void* dbias, void* parts,
                                     cudaStream_t stream) {
  const auto wide = [&](int64_t V) {
    return g.d % V == 0 && aligned(grad) && aligned(qkv) && aligned(weight) && aligned(dz) && aligned(dqkv);
  };
  return with_form(type, k, wide, [&](auto form) {
    using F = decltype(form);
    using T = typename F::T;
    using A = Sum<T>;
    const int64_t C = g.channels(), taps = k * k;
    const dim3 block = block_for(C / F::V), columns(32, MAX_THREADS / 32);
    const auto from = static_cast<const T*>(grad);
    cudaError_t error = launch_on_strips(merge_lim_backward_kernel<T, F::V, F::K>, g, C / F::V, stream, k, from,
                                         static_cast<const A*>(weight), static_cast<T*>(dz), static_cast<T*>(dqkv));
    if (error == cudaSuccess)
      error = launch(parts_kernel<T, F::V, F::K>, dim3(divide_up(C / F::V, block.x), cuda_parts), block, stream, g, k,
                     from, static_cast<const T*>(qkv) + 2 * C, static_cast<A*>(parts));
    if (error == cudaSuccess)
      error = launch(total_kernel<A>, divide_up((taps + 1) * C, 32), columns, stream, taps, C,
                     static_cast<const A*>(parts), static_cast<A*>(dweight), static_cast<A*>(dbias));
    return error;
  });
}
