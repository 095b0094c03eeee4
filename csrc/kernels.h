// The kernels, on the CPU (cpu.cpp, iwsa.cpp) and the GPU (cuda.cu, the same).  Tensors are contiguous, except z.
// Numbers are of `type`, and sums (weight, bias, their gradients, parts) in double for Float64, else in float.
#pragma once
#include "windows.h"

enum class Type { Float32, Float64, BFloat16, Float16 };

// The weight's gradient is summed in parts and then over the parts, in an order that the shape alone decides: the same
// bits in every run.  `parts` (sum_parts, k² + 1, C) is room for them; its last row is the bias's.
constexpr int64_t sum_parts = 256;

namespace cpu {
// map (B, H, W, 3C) -> windows (3, B·h·w, heads, M², d) with zeros beyond the border, or, `backward`, the other way.
void partition(const Windows& g, int64_t itemsize, void* map, void* windows, bool backward);

// out (B, H, W, C) = z in place + depthwise k x k convolution of V.  weight (k, k, C) and bias (C).
void merge_lim(const Windows& g, Type type, int64_t k, const void* z, Strides z_strides, const void* qkv,
               const void* weight, const void* bias, void* out);

// dz (B·h·w, heads, M², d), dqkv (B, H, W, 3C), dweight (C, 1, k, k) and dbias (C).
void merge_lim_backward(const Windows& g, Type type, int64_t k, const void* grad, const void* qkv, const void* weight,
                        void* dz, void* dqkv, void* dweight, void* dbias, void* parts);

// qkv (B, H, W, 3C) -> out (B, H, W, C): partition, attention, merge and LIM in one pass.
void iwsa(const Windows& g, Type type, int64_t k, const void* qkv, const void* weight, const void* bias, void* out);
void iwsa_backward(const Windows& g, Type type, int64_t k, const void* grad, const void* qkv, const void* weight,
                   void* dqkv, void* dweight, void* dbias, void* parts);
}  // namespace cpu

#if defined(WITH_CUDA) || defined(__CUDACC__)
#include <cuda_runtime_api.h>
namespace cuda {
cudaError_t partition(const Windows& g, int64_t itemsize, void* map, void* windows, bool backward, cudaStream_t stream);
cudaError_t merge_lim(const Windows& g, Type type, int64_t k, const void* z, Strides z_strides, const void* qkv,
                      const void* weight, const void* bias, void* out, cudaStream_t stream);
cudaError_t merge_lim_backward(const Windows& g, Type type, int64_t k, const void* grad, const void* qkv,
                               const void* weight, void* dz, void* dqkv, void* dweight, void* dbias, void* parts,
                               cudaStream_t stream);
}  // namespace cuda
#endif
