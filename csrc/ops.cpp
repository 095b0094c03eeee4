// Called by ops.py with checked arguments: each function allocates the outputs and starts a kernel (kernels.h).
#include <ATen/ATen.h>
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
    cpu::kernel(__VA_ARGS__)
#else
#define DEVICES "cpu"
#define RUN(t, kernel, ...) cpu::kernel(__VA_ARGS__)
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

// The weight (C, 1, k, k) or the bias (C) as the kernels take it: in the accumulation type, channels last.
Tensor in_sum_type(const Tensor& t, const Tensor& qkv) {
  const Tensor sum = t.to(at::toOpMathType(qkv.scalar_type()));
  return (sum.dim() == 4 ? sum.squeeze(1).permute({1, 2, 0}) : sum).contiguous();
}

Tensor parts_for(const Tensor& w) { return at::empty({sum_parts, w.size(0) * w.size(0) + 1, w.size(2)}, w.options()); }

Tensor window_partition(const Tensor& qkv, int64_t heads, int64_t window) {
  const Windows g = windows_of(qkv, heads, window);
  const Tensor map = qkv.contiguous(), windows = at::empty({3, g.count(), heads, window * window, g.d}, map.options());
  RUN(map, partition, g, map.element_size(), map.data_ptr(), windows.data_ptr(), false);
  return windows;
}

Tensor window_partition_backward(const Tensor& grad, int64_t H, int64_t W, int64_t window) {
  Windows g = {1, H, W, grad.size(2), grad.size(4), window};
  g.B = grad.size(1) / g.count();
  const Tensor windows = grad.contiguous(), map = at::empty({g.B, H, W, 3 * g.channels()}, windows.options());
  RUN(map, partition, g, map.element_size(), map.data_ptr(), windows.data_ptr(), true);
  return map;
}

Tensor window_merge_lim(const Tensor& z, const Tensor& qkv, const Tensor& weight, const Tensor& bias, int64_t window) {
  const Windows g = windows_of(qkv, z.size(1), window);
  const Tensor w = in_sum_type(weight, qkv), b = in_sum_type(bias, qkv), map = qkv.contiguous();
  const Tensor in = z.stride(3) == 1 ? z : z.contiguous();
  const Strides strides = {in.stride(0), in.stride(1), in.stride(2)};
  const Tensor out = at::empty({g.B, g.H, g.W, g.channels()}, map.options());
  RUN(map, merge_lim, g, type_of(map), w.size(0), in.data_ptr(), strides, map.data_ptr(), w.data_ptr(), b.data_ptr(),
      out.data_ptr());
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> window_merge_lim_backward(
    const Tensor& grad, const Tensor& qkv, const Tensor& weight, int64_t heads, int64_t window) {
  const Windows g = windows_of(qkv, heads, window);
  const Tensor w = in_sum_type(weight, qkv), from = grad.contiguous(), map = qkv.contiguous(), parts = parts_for(w);
  const Tensor dz = at::empty({g.count(), heads, window * window, g.d}, map.options()), dqkv = at::empty_like(map);
  const Tensor dweight = at::empty(weight.sizes(), w.options()), dbias = at::empty({g.channels()}, w.options());
  RUN(map, merge_lim_backward, g, type_of(map), w.size(0), from.data_ptr(), map.data_ptr(), w.data_ptr(), dz.data_ptr(),
      dqkv.data_ptr(), dweight.data_ptr(), dbias.data_ptr(), parts.data_ptr());
  return {dz, dqkv, dweight.to(weight.scalar_type()), dbias.to(weight.scalar_type())};
}

Tensor iwsa(const Tensor& qkv, const Tensor& weight, const Tensor& bias, int64_t heads, int64_t window) {
  const Windows g = windows_of(qkv, heads, window);
  const Tensor w = in_sum_type(weight, qkv), b = in_sum_type(bias, qkv), map = qkv.contiguous();
  const Tensor out = at::empty({g.B, g.H, g.W, g.channels()}, map.options());
  cpu::iwsa(g, type_of(map), w.size(0), map.data_ptr(), w.data_ptr(), b.data_ptr(), out.data_ptr());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> iwsa_backward(const Tensor& grad, const Tensor& qkv, const Tensor& weight,
                                                 int64_t heads, int64_t window) {
  const Windows g = windows_of(qkv, heads, window);
  const Tensor w = in_sum_type(weight, qkv), from = grad.contiguous(), map = qkv.contiguous(), parts = parts_for(w);
  const Tensor dqkv = at::empty_like(map), dweight = at::empty(weight.sizes(), w.options());
  const Tensor dbias = at::empty({g.channels()}, w.options());
  cpu::iwsa_backward(g, type_of(map), w.size(0), from.data_ptr(), map.data_ptr(), w.data_ptr(), dqkv.data_ptr(),
                     dweight.data_ptr(), dbias.data_ptr(), parts.data_ptr());
  return {dqkv, dweight.to(weight.scalar_type()), dbias.to(weight.scalar_type())};
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
