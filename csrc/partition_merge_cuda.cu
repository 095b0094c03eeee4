// Partition and merge + LIM on a GPU, in plain CUDA C++: nvcc compiles this file without PyTorch's headers, and so does
// a C++ compiler with the stubs in tests/cuda_on_cpu; every thread then runs on the CPU.  How work maps to threads:
// - A thread processes a pack of V channels, 16 bytes, for all tokens of a strip (windows.h): adjacent threads access
//   adjacent addresses.  A block is x packs wide and y strips high: its threads are busy whether C is 64 or 512.
// - LIM is 3 x 3 here.  A thread loads the 9 neighbors of its token from global memory; nearby threads load the same
//   ones at about that time, so most loads hit the caches.  The 9 loads are in flight at once and the 9 weights stay in
//   registers (seen in the machine code for sm_90; not yet run on a GPU).
// - The weight's gradient is a sum over all tokens.  A block sums one part of the strips: a thread in registers, then
//   the block in shared memory, always in the same order: deterministic.  Kernels can be captured in a CUDA graph.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "kernels.h"

// Upper limits for threads per block and blocks per grid; tests lower both.
#ifndef MAX_THREADS
#define MAX_THREADS block_threads
#define MAX_BLOCKS INT32_MAX
#endif

namespace {
constexpr int block_threads = 256, blocks_at_once = 2;  // per SM: 128 registers per thread

// V adjacent channels, loaded and stored together.
template <class T, int V> struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
  T x[V];
};
// Zeros if `there` is false.  Selecting all 16 bytes at once is much faster than selecting number by number.
template <int V, class T>
__device__ Pack<T, V> load(const T* p, bool there = true) {
  if constexpr (sizeof(Pack<T, V>) == sizeof(uint4)) {
    const uint4 words = there ? *reinterpret_cast<const uint4*>(p) : uint4{};
    return reinterpret_cast<const Pack<T, V>&>(words);
  } else return there ? *reinterpret_cast<const Pack<T, V>*>(p) : Pack<T, V>{};
}
template <int V, class T>
__device__ void store(T* p, const Pack<T, V>& pack) { *reinterpret_cast<Pack<T, V>*>(p) = pack; }

// A grid-stride loop over strips: a thread's first strip, and the stride to its next one.
__device__ int64_t first_strip() { return int64_t(blockIdx.x) * blockDim.y + threadIdx.y; }
__device__ int64_t strips_at_once() { return int64_t(gridDim.x) * blockDim.y; }

// ---------------------------------------------------------------- window partition and its backward
// Only copies bytes, in words of 16 or 2 bytes.  A head's d channels take `size` words.
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
// sum += weight * neighbor over the 3 x 3 neighbors of token (y, x); zeros beyond the border.  `here` points to the
// token's own pack, `stride` is the distance to the next token's.  mirrored: flipped weights, for the backward pass.
template <bool mirrored, class T, class A, int V>
__device__ void add_neighbors(Pack<A, V>& sum, const Windows& g, unsigned y, unsigned x, const T* here, int64_t stride,
                              const Pack<A, V> (&weights)[9]) {
  const unsigned H = g.H, W = g.W;
#pragma unroll
  for (int i = 0; i < 9; ++i) {
    const int dy = i / 3 - 1, dx = i % 3 - 1;  // as unsigned, -1 is out of range, too
    const auto neighbor = load<V>(here + (dy * g.W + dx) * stride, y + unsigned(dy) < H && x + unsigned(dx) < W);
    for (int u = 0; u < V; ++u) sum.x[u] += weights[mirrored ? 8 - i : i].x[u] * A(neighbor.x[u]);
  }
}

template <class T, int V>
__global__ void __launch_bounds__(block_threads, blocks_at_once)
    merge_lim_kernel(Windows g, const T* __restrict__ z, Strides z_strides, const T* __restrict__ qkv,
                     const Sum<T>* __restrict__ weight, const Sum<T>* __restrict__ bias, T* __restrict__ out) {
  const unsigned C = g.channels(), d = g.d;
  for (unsigned c = threadIdx.x * V; c < C; c += blockDim.x * V) {
    Pack<Sum<T>, V> weights[9];  // in registers
    for (int i = 0; i < 9; ++i) weights[i] = load<V>(weight + i * C + c);
    for (int64_t s = first_strip(); s < g.strips(); s += strips_at_once()) {
      const Strip t = g.strip(s);
      const int64_t token = g.token(t.b, t.y, t.x);
      const T* own = z + z_strides.at(t, c / d, 0) + c % d;
      const T* here = qkv + (token * 3 + 2) * C + c;
      T* to = out + token * C + c;
      for (unsigned i = 0; i < t.tokens; ++i, own += z_strides.position, here += 3 * C, to += C) {
        Pack<Sum<T>, V> sum = load<V>(bias + c);
        add_neighbors<false>(sum, g, t.y, t.x + i, here, 3 * C, weights);
        const auto attention = load<V>(own);
        Pack<T, V> result;
        for (int u = 0; u < V; ++u) result.x[u] = T(sum.x[u] + Sum<T>(attention.x[u]));
        store(to, result);
      }
    }
  }
}

// Computes dz and dqkv.
template <class T, int V>
__global__ void __launch_bounds__(block_threads, blocks_at_once)
    merge_lim_backward_kernel(Windows g, const T* __restrict__ grad, const Sum<T>* __restrict__ weight,
                              T* __restrict__ dz, T* __restrict__ dqkv) {
  const unsigned C = g.channels(), d = g.d;
  for (unsigned c = threadIdx.x * V; c < C; c += blockDim.x * V) {
    Pack<Sum<T>, V> weights[9];  // in registers
    for (int i = 0; i < 9; ++i) weights[i] = load<V>(weight + i * C + c);
    for (int64_t s = first_strip(); s < g.strips(); s += strips_at_once()) {
      const Strip t = g.strip(s);
      const int64_t token = g.token(t.b, t.y, t.x);
      const T* here = grad + token * C + c;
      T* own = dz + g.group(0, t.window, c / d, t.position) * d + c % d;
      T* dq = dqkv + token * 3 * C + c;
      for (unsigned i = 0; i < g.M; ++i, here += C, own += d, dq += 3 * C) {
        store(own, load<V>(here, i < t.tokens));
        if (i >= t.tokens) continue;
        Pack<Sum<T>, V> sum = {};
        add_neighbors<true>(sum, g, t.y, t.x + i, here, C, weights);
        Pack<T, V> dv;
        for (int u = 0; u < V; ++u) dv.x[u] = T(sum.x[u]);
        store(dq, Pack<T, V>{});
        store(dq + C, Pack<T, V>{});
        store(dq + 2 * C, dv);
      }
    }
  }
}

// Computes parts (cuda_parts, 10, C), with one block per part of the strips and per blockDim.x packs of channels.  The
// last of the 10 rows is the bias's, a "tap" with input 1.
template <class T, int V>
__global__ void __launch_bounds__(block_threads, blocks_at_once)
    parts_kernel(Windows g, const T* __restrict__ grad, const T* __restrict__ qkv, Sum<T>* __restrict__ parts) {
  const int64_t C = g.channels(), part = blockIdx.y;
  const int64_t c0 = int64_t(blockIdx.x) * blockDim.x * V, c = c0 + threadIdx.x * V;
  const int64_t begin = g.strips() * part / cuda_parts, end = g.strips() * (part + 1) / cuda_parts;
  Pack<Sum<T>, V> sum[10] = {};
  for (int64_t s = begin + threadIdx.y; s < end && c < C; s += blockDim.y) {
    const Strip t = g.strip(s);
    const int64_t token = g.token(t.b, t.y, t.x);
    const T* here = grad + token * C + c;
    const T* own = qkv + (token * 3 + 2) * C + c;
    const unsigned y = t.y, H = g.H, W = g.W;
    for (unsigned x = t.x; x < t.x + t.tokens; ++x, here += C, own += 3 * C) {
      const auto value = load<V>(own);
#pragma unroll
      for (int i = 0; i < 10; ++i) {
        const int dy = i < 9 ? 1 - i / 3 : 0, dx = i < 9 ? 1 - i % 3 : 0;  // to the output that its V contributes to
        const auto neighbor = load<V>(here + (dy * g.W + dx) * C, y + unsigned(dy) < H && x + unsigned(dx) < W);
        for (int j = 0; j < V; ++j) sum[i].x[j] += (i < 9 ? Sum<T>(value.x[j]) : 1) * Sum<T>(neighbor.x[j]);
      }
    }
  }
  __shared__ Pack<Sum<T>, V> shared[block_threads];
  const unsigned me = threadIdx.y * blockDim.x + threadIdx.x, width = blockDim.x * V;
#pragma unroll
  for (int i = 0; i < 10; ++i) {  // add up the columns of the block's threads, in order
    shared[me] = sum[i];
    __syncthreads();
    for (unsigned j = me; j < width && j < C - c0; j += blockDim.x * blockDim.y) {
      Sum<T> total = 0;
      for (unsigned y = 0; y < blockDim.y; ++y) total += shared[0].x[y * width + j];
      parts[(part * 10 + i) * C + c0 + j] = total;
    }
    __syncthreads();
  }
}

// ---------------------------------------------------------------- launches, and dispatch on type and width
int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A block of x items by y strips.  If the items exceed a block's threads, x divides them into equal rounds.
dim3 block_for(int64_t items) {
  const int64_t x = divide_up(items, divide_up(items, MAX_THREADS));
  return dim3(x, MAX_THREADS / x);
}
dim3 grid_for(const Windows& g, dim3 block) { return std::min<int64_t>(divide_up(g.strips(), block.y), MAX_BLOCKS); }

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream, Arguments... arguments) {
  if (grid.x == 0) return cudaSuccess;  // an empty batch
  const cudaLaunchConfig_t config = {grid, block, 0, stream};
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

template <class... Pointers>
bool aligned(Pointers... p) { return ((reinterpret_cast<uintptr_t>(p) % 16 == 0) && ...); }

// Calls f with a kernel's T (as a zero of that type) and V, which is 1 if 16 bytes cannot be loaded together.
template <class F, class... Pointers>
cudaError_t with_kernel(const Inputs& in, Strides strides, F f, Pointers... pointers) {
  if (in.k != 3) return cudaErrorInvalidValue;  // ops.py has said so
  return with_type<__nv_bfloat16, __half>(in.type, [&](auto zero) {
    constexpr int V = 16 / sizeof(zero);
    const bool wide = in.g.d % V == 0 && strides.window % V == 0 && strides.head % V == 0 &&
                      strides.position % V == 0 && aligned(in.qkv, in.weight, pointers...);
    return wide ? f(zero, std::integral_constant<int, V>()) : f(zero, std::integral_constant<int, 1>());
  });
}
}  // namespace

cudaError_t cuda::partition(const Windows& g, int64_t itemsize, void* map, void* windows, bool backward,
                            cudaStream_t stream) {
  const auto move_words = [&](auto word) {
    using Word = decltype(word);
    const int64_t size = g.d * itemsize / sizeof(Word);
    const auto kernel = backward ? partition_kernel<Word, true> : partition_kernel<Word, false>;
    const dim3 block = block_for(3 * g.heads * size);
    return launch(kernel, grid_for(g, block), block, stream, g, size, map, windows);
  };
  return g.d * itemsize % 16 == 0 && aligned(map, windows) ? move_words(uint4{}) : move_words(uint16_t{});
}

cudaError_t cuda::merge_lim(const Inputs& in, const void* bias, const void* z, Strides z_strides, void* out,
                            cudaStream_t stream) {
  const auto run = [&](auto zero, auto V) {
    const dim3 block = block_for(in.g.channels() / V);
    return launch(merge_lim_kernel<decltype(zero), V>, grid_for(in.g, block), block, stream, in.g, z, z_strides, in.qkv,
                  in.weight, bias, out);
  };
  return with_kernel(in, z_strides, run, z, bias, out);
}

cudaError_t cuda::merge_lim_backward(const Inputs& in, const void* grad, void* dz, void* dqkv, void* parts,
                                     cudaStream_t stream) {
  const auto run = [&](auto zero, auto V) {
    using T = decltype(zero);
    const int64_t packs = in.g.channels() / V;
    const dim3 block = block_for(packs), parts_grid(divide_up(packs, block.x), cuda_parts);
    const cudaError_t error = launch(merge_lim_backward_kernel<T, V>, grid_for(in.g, block), block, stream, in.g, grad,
                                     in.weight, dz, dqkv);
    return error ? error : launch(parts_kernel<T, V>, parts_grid, block, stream, in.g, grad, in.qkv, parts);
  };
  return with_kernel(in, {}, run, grad, dz, dqkv);
}
