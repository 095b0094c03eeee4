// The kernels that ops.cpp chooses from: cpu.cpp and cuda.cu have the same three functions, attention.cpp four more for the CPU.
// Pointers are to contiguous tensors, except z.  `Sum` is the type that sums are formed in: double for Float64, else float.
#pragma once
#include "windows.h"
#if defined(WITH_CUDA) || defined(__CUDACC__)
#include <cuda_runtime_api.h>
#endif

// Of SSA's attention: N queries and N_rn keys with d = C'/heads channels in each head, values with d_v = C/heads.
struct Sizes {
  int64_t B, N, N_rn, heads, d, d_v;
};

enum class Type { Float32, Float64, BFloat16, Float16 };

// On the GPU the weight's gradient is summed in this many parts and then over the parts, in order.
constexpr int64_t cuda_parts = 256;

namespace cpu {

// map (B, H, W, 3C) -> windows (3, B·h·w, heads, M², d) with zeros beyond the border, or, `backward`, the other way.
void partition(const Windows& g, int64_t itemsize, void* map, void* windows, bool backward);

// out (B, H, W, C) = z in place + depthwise convolution of V.  weight (C, 1, k, k) and bias (C) in Sum.
void merge_lim(const Windows& g, Type type, int64_t k, const void* z, Strides z_strides, const void* qkv,
               const void* weight, const void* bias, void* out);

// dz (B·h·w, heads, M², d), dqkv (B, H, W, 3C), and, in Sum, dweight (C, 1, k, k) and dbias (C).
void merge_lim_backward(const Windows& g, Type type, int64_t k, const void* grad, const void* qkv, const void* weight,
                        void* dz, void* dqkv, void* dweight, void* dbias);

// qkv (B, H, W, 3C) -> out (B, H, W, C): partition, attention, merge and LIM in one pass.
void iwsa(const Windows& g, Type type, int64_t k, const void* qkv, const void* weight, const void* bias, void* out);
void iwsa_backward(const Windows& g, Type type, int64_t k, const void* grad, const void* qkv, const void* weight,
                   void* dqkv, void* dweight, void* dbias);

// q (B, N, heads·d), k (B, N_rn, heads·d), v (B, N_rn, heads·d_v) -> out (B, N, heads·d_v): Softmax(Q Kᵀ · scale) V.
void ssa(const Sizes& n, Type type, double scale, const void* q, const void* k, const void* v, void* out);
void ssa_backward(const Sizes& n, Type type, double scale, const void* grad, const void* q, const void* k,
                  const void* v, void* dq, void* dk, void* dv);

}  // namespace cpu

#if defined(WITH_CUDA) || defined(__CUDACC__)
namespace cuda {

// The same, but for two things: weight is (k, k, C), and parts (cuda_parts, k² + 1, C) in Sum is room for the partial
// sums of the weight's gradient and the bias's.
cudaError_t partition(const Windows& g, int64_t itemsize, void* map, void* windows, bool backward, cudaStream_t stream);
cudaError_t merge_lim(const Windows& g, Type type, int64_t k, const void* z, Strides z_strides, const void* qkv,
                      const void* weight, const void* bias, void* out, cudaStream_t stream);
cudaError_t merge_lim_backward(const Windows& g, Type type, int64_t k, const void* grad, const void* qkv,
                               const void* weight, void* dz, void* dqkv, void* dweight, void* dbias, void* parts,
                               cudaStream_t stream);

}  // namespace cuda
#endif
