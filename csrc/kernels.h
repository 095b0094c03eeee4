// The kernels that ops.cpp calls.  Pointers are to contiguous tensors, except z.  `Sum` is the type that sums are formed
// in: double for Float64, else float.
#pragma once
#include "windows.h"
#if defined(WITH_CUDA) || defined(__CUDACC__)
#include <cuda_runtime_api.h>
#endif

enum class Type { Float32, Float64, BFloat16, Float16 };

namespace cpu {  // cpu.cpp, iwsa.cpp

// map (B, H, W, 3C) -> windows (3, B·h·w, heads, M², d) with zeros beyond the border, or, `backward`, the other way.
void partition(const Windows& g, int64_t itemsize, void* map, void* windows, bool backward);

// out (B, H, W, C) = z in place + depthwise k x k convolution of V.  weight (k, k, C) and bias (C) in Sum.
void merge_lim(const Windows& g, Type type, int64_t k, const void* z, Strides z_strides, const void* qkv,
               const void* weight, const void* bias, void* out);

// dz (B·h·w, heads, M², d), dqkv (B, H, W, 3C), and, in Sum, dweight (C, 1, k, k) and dbias (C).
void merge_lim_backward(const Windows& g, Type type, int64_t k, const void* grad, const void* qkv, const void* weight,
                        void* dz, void* dqkv, void* dweight, void* dbias);

// qkv (B, H, W, 3C) -> out (B, H, W, C): partition, attention, merge and LIM in one pass.
void iwsa(const Windows& g, Type type, int64_t k, const void* qkv, const void* weight, const void* bias, void* out);
void iwsa_backward(const Windows& g, Type type, int64_t k, const void* grad, const void* qkv, const void* weight,
                   void* dqkv, void* dweight, void* dbias);

}  // namespace cpu

#if defined(WITH_CUDA) || defined(__CUDACC__)
constexpr int64_t cuda_parts = 256;

namespace cuda {  // cuda.cu: the same; parts (cuda_parts, k² + 1, C) in Sum is room for sums of the weight's gradient

cudaError_t partition(const Windows& g, int64_t itemsize, void* map, void* windows, bool backward, cudaStream_t stream);
cudaError_t merge_lim(const Windows& g, Type type, int64_t k, const void* z, Strides z_strides, const void* qkv,
                      const void* weight, const void* bias, void* out, cudaStream_t stream);
cudaError_t merge_lim_backward(const Windows& g, Type type, int64_t k, const void* grad, const void* qkv,
                               const void* weight, void* dz, void* dqkv, void* dweight, void* dbias, void* parts,
                               cudaStream_t stream);

}  // namespace cuda
#endif
