// What ops.cpp calls.  All tensors but z are contiguous.  Outputs have the type of qkv; weight, bias and parts have the
// accumulation type.
#pragma once
#include <type_traits>

#include "windows.h"

enum class Type { Float16 = 5, Float32 = 6, Float64 = 7, BFloat16 = 15 };  // PyTorch's numbers (c10::ScalarType)
template <class T> using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;  // the accumulation type

// Calls f with a zero of the C++ type; 16-bit types have other names on a GPU.
template <class BFloat16, class Float16, class F>
auto with_type(Type type, F f) {
  switch (type) {
    case Type::Float64: return f(double{});
    case Type::BFloat16: return f(BFloat16{});
    case Type::Float16: return f(Float16{});
    default: return f(float{});
  }
}

struct Inputs {
  Windows g;
  Type type;
  int64_t k;                  // LIM is a k x k convolution
  const void *qkv, *weight;   // (B, H, W, 3C), (k, k, C)
};

// The gradients of LIM's parameters are summed in parts (n, k² + 1, C): a row per tap, and the bias's.  ops.cpp adds
// the n = cpu_parts or cuda_parts.  A part's tokens, and so the rounding, depend only on the shape.
constexpr int64_t cpu_parts = 32, cuda_parts = 256;

namespace reference {  // partition_merge_cpu.cpp
// map (B, H, W, 3C) -> windows (3, B·h·w, heads, M², d), zero-padded; if `backward`, windows -> map.
void partition(const Windows& g, int64_t itemsize, void* map, void* windows, bool backward);
// out (B, H, W, C) = merged z + depthwise k x k convolution of V.
void merge_lim(const Inputs& in, const void* bias, const void* z, Strides z_strides, void* out);
// dz has the shape of z and is contiguous.
void merge_lim_backward(const Inputs& in, const void* grad, void* dz, void* dqkv, void* parts);
}  // namespace reference

namespace cpu {  // iwsa_cpu.cpp: partition, attention, merge and LIM in one pass
void iwsa(const Inputs& in, const void* bias, void* out);
void iwsa_backward(const Inputs& in, const void* grad, void* dqkv, void* parts);
}  // namespace cpu

#if defined(WITH_CUDA) || defined(__CUDACC__)
#include <cuda_runtime_api.h>
namespace cuda {  // partition_merge_cuda.cu: as the reference
cudaError_t partition(const Windows& g, int64_t itemsize, void* map, void* windows, bool backward, cudaStream_t);
cudaError_t merge_lim(const Inputs& in, const void* bias, const void* z, Strides z_strides, void* out, cudaStream_t);
cudaError_t merge_lim_backward(const Inputs& in, const void* grad, void* dz, void* dqkv, void* parts, cudaStream_t);
}  // namespace cuda
#endif
