// What ops.cpp calls: the same four functions on the CPU (cpu.cpp) and on the GPU (cuda.cu).
#pragma once
#include "windows.h"

#define DECLARE_KERNELS 
namespace cpu {
void partition(const Windows& g, Type type, const void* qkv, void* windows);
void partition_backward(const Windows& g, Type type, const void* grad, void* dqkv);
void merge_lim(const Windows& g, Type type, int64_t k, const void* z, Strides zs, const void* qkv, const void* weight, const void* bias, void* out);
void merge_lim_backward(const Windows& g, Type type, int64_t k, const void* grad, const void* qkv, const void* weight, void* dz, void* dqkv, int64_t chunks, void* partials);
}
