// Called by ops.py with checked inputs and empty, contiguous outputs: each function starts one kernel (kernels.h).
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/OpMathType.h>
#include <torch/csrc/utils/pybind.h>

#include "kernels.h"

// RUN starts a kernel on t's device (on a GPU, on the current stream).  tests/cuda_on_cpu redefines ON_CUDA as true.
#ifdef WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#ifndef ON_CUDA
#define ON_CUDA(t) (t).is_cuda()
#endif
#define DEVICES "cpu", "cuda"
#define RUN(t, kernel, ...)                                                                 \
  if (ON_CUDA(t)) {                                                                         \
    const c10::cuda::CUDAGuard guard((t).device());                                         \
    C10_CUDA_CHECK(cuda::kernel(__VA_ARGS__, c10::cuda::getCurrentCUDAStream().stream()));  \
  } else                                                                                    \
    reference::kernel(__VA_ARGS__)
#else
#define ON_CUDA(t) false
#define DEVICES "cpu"
#define RUN(t, kernel, ...) reference::kernel(__VA_ARGS__)
#endif

namespace {
using at::Tensor;

Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble: return Type::Float64;
    case at::kBFloat16: return Type::BFloat16;
    case at::kHalf: return Type::Float16;
    default: return Type::Float32;
  }
}

Windows windows_of(const Tensor& qkv, int64_t heads, int64_t window) {
  return {qkv.size(0), qkv.size(1), qkv.size(2), heads, qkv.size(3) / 3 / heads, window};
}

// An input.  Its storage may have been freed, as FSDP does, and reading it would crash.
const Tensor& in_memory(const Tensor& t) {
  const size_t bytes = at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.element_size(), t.storage_offset());
  TORCH_CHECK(t.storage().nbytes() >= bytes, "expected a tensor with memory, got one of shape ", t.sizes(),
              " whose storage was freed");
  return t;
}

// The weight (C, 1, k, k) or the bias (C) as the kernels take it: in the accumulation type, channels last.
Tensor in_sum_type(const Tensor& t, const Tensor& qkv) {
  const Tensor sum = in_memory(t).to(at::toOpMathType(qkv.scalar_type()));
  return (sum.dim() == 4 ? sum.squeeze(1).permute({1, 2, 0}) : sum).contiguous();
}

// For the gradients of LIM's parameters: empty parts, w being the weight (k, k, C); and their sum.
Tensor parts_for(const Tensor& w) {
  return at::empty({ON_CUDA(w) ? cuda_parts : cpu_parts, w.size(0) * w.size(0) + 1, w.size(2)}, w.options());
}
void add_parts(const Tensor& parts, const Tensor& dweight, const Tensor& dbias) {
  const Tensor sum = parts.sum(0), taps = sum.slice(0, 0, -1);
  dweight.copy_(taps.t().reshape(dweight.sizes())), dbias.copy_(sum[-1]);
}

void window_partition(const Tensor& qkv, int64_t heads, int64_t window, const Tensor& windows) {
  const Tensor map = in_memory(qkv).contiguous();
  const Windows g = windows_of(map, heads, window);
  RUN(map, partition, g, map.element_size(), map.data_ptr(), windows.data_ptr(), false);
}

void window_partition_backward(const Tensor& grad, int64_t, int64_t, int64_t window, const Tensor& dqkv) {
  const Tensor windows = in_memory(grad).contiguous();
  const Windows g = windows_of(dqkv, grad.size(2), window);
  RUN(dqkv, partition, g, dqkv.element_size(), dqkv.data_ptr(), windows.data_ptr(), true);
}

void window_merge_lim(const Tensor& z, const Tensor& qkv, const Tensor& weight, const Tensor& bias, int64_t window,
                      const Tensor& out) {
  const Tensor w = in_sum_type(weight, qkv), b = in_sum_type(bias, qkv), map = in_memory(qkv).contiguous();
  const Tensor own = in_memory(z).stride(3) == 1 ? z : z.contiguous();
  const Windows g = windows_of(map, z.size(1), window);
  RUN(map, merge_lim, g, type_of(map), w.size(0), own.data_ptr(), {own.stride(0), own.stride(1), own.stride(2)},
      map.data_ptr(), w.data_ptr(), b.data_ptr(), out.data_ptr());
}

void window_merge_lim_backward(const Tensor& grad, const Tensor& qkv, const Tensor& weight, int64_t heads,
                               int64_t window, const Tensor& dz, const Tensor& dqkv, const Tensor& dweight,
                               const Tensor& dbias) {
  const Tensor w = in_sum_type(weight, qkv), map = in_memory(qkv).contiguous(), from = in_memory(grad).contiguous();
  const Tensor parts = parts_for(w);
  RUN(map, merge_lim_backward, windows_of(map, heads, window), type_of(map), w.size(0), from.data_ptr(), map.data_ptr(),
      w.data_ptr(), dz.data_ptr(), dqkv.data_ptr(), parts.data_ptr());
  add_parts(parts, dweight, dbias);
}

void iwsa(const Tensor& qkv, const Tensor& weight, const Tensor& bias, int64_t heads, int64_t window,
          const Tensor& out) {
  const Tensor w = in_sum_type(weight, qkv), b = in_sum_type(bias, qkv), map = in_memory(qkv).contiguous();
  cpu::iwsa(windows_of(map, heads, window), type_of(map), w.size(0), map.data_ptr(), w.data_ptr(), b.data_ptr(),
            out.data_ptr());
}

void iwsa_backward(const Tensor& grad, const Tensor& qkv, const Tensor& weight, int64_t heads, int64_t window,
                   const Tensor& dqkv, const Tensor& dweight, const Tensor& dbias) {
  const Tensor w = in_sum_type(weight, qkv), map = in_memory(qkv).contiguous(), from = in_memory(grad).contiguous();
  const Tensor parts = parts_for(w);
  cpu::iwsa_backward(windows_of(map, heads, window), type_of(map), w.size(0), from.data_ptr(), map.data_ptr(),
                     w.data_ptr(), dqkv.data_ptr(), parts.data_ptr());
  add_parts(parts, dweight, dbias);
}
}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  const pybind11::call_guard<pybind11::gil_scoped_release> release;
  m.def("window_partition", window_partition, release);
  m.def("window_partition_backward", window_partition_backward, release);
  m.def("window_merge_lim", window_merge_lim, release);
  m.def("window_merge_lim_backward", window_merge_lim_backward, release);
  m.def("iwsa", iwsa, release);
  m.def("iwsa_backward", iwsa_backward, release);
  m.attr("devices") = pybind11::make_tuple(DEVICES);
}
