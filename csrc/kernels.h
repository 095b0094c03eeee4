// What ops.cpp calls.  All tensors but z are contiguous.  Tensors are of `type`; weight, bias and parts have the
// accumulation type: double for Float64, else float.
#pragma once
#include "windows.h"

enum class Type { Float32, Float64, BFloat16, Float16 };

// The gradients of LIM's parameters are summed in parts (n, k² + 1, C), one row per tap and the last for the bias; n is
// cpu_parts or cuda_parts.  ops.cpp adds the parts.  A part's tokens, and so the rounding, depend only on the shape.
constexpr int64_t cpu_parts = 32, cuda_parts = 256;

namespace reference {  // partition_merge_cpu.cpp
// map (B, H, W, 3C) -> windows (3, B·h·w, heads, M², d), zero-padded; if `backward`, windows -> map.
void partition(const Windows& g, int64_t itemsize, void* map, void* windows, bool backward);

// out (B, H, W, C) = merged z + depthwise k x k convolution of V.  weight (k, k, C), bias (C).
void merge_lim(const Windows& g, Type type, int64_t k, const void* z, Strides z_strides, const void* qkv,
               const void* weight, const void* bias, void* out);

// Outputs: dz (B·h·w, heads, M², d), dqkv (B, H, W, 3C), parts.
void merge_lim_backward(const Windows& g, Type type, int64_t k, const void* grad, const void* qkv, const void* weight,
                        void* dz, void* dqkv, void* parts);
}  // namespace reference

namespace cpu {  // iwsa_cpu.cpp
// qkv (B, H, W, 3C) -> out (B, H, W, C): partition, attention, merge and LIM in one pass.
void iwsa(const Windows& g, Type type, int64_t k, const void* qkv, const void* weight, const void* bias, void* out);
void iwsa_backward(const Windows& g, Type type, int64_t k, const void* grad, const void* qkv, const void* weight,
                   void* dqkv, void* parts);
}  // namespace cpu

#if defined(WITH_CUDA) || defined(__CUDACC__)
#include <cuda_runtime_api.h>
namespace cuda {  // partition_merge_cuda.cu
cudaError_t partition(const Windows& g, int64_t itemsize, void* map, void* windows, bool backward, cudaStream_t stream);
cudaError_t merge_lim(const Windows& g, Type type, int64_t k, const void* z, Strides z_strides, const void* qkv,
                      const void* weight, const void* bias, void* out, cudaStream_t stream);
cudaError_t merge_lim_backward(const Windows& g, Type type, int64_t k, const void* grad, const void* qkv,
                               const void* weight, void* dz, void* dqkv, void* parts, cudaStream_t stream);
}  // namespace cuda
#endif
