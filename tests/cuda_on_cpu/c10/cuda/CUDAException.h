#pragma once
#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

inline void C10_CUDA_CHECK(cudaError_t error) {
  TORCH_CHECK(error == cudaSuccess, "CUDA error on a CPU: ", int(error));
}
