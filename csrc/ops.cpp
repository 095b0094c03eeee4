// What ops.py calls: each function makes the tensors that go out and starts the kernel of the device.  What comes in is
// checked in ops.py.
#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <torch/csrc/utils/pybind.h>

#ifdef WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include "kernels.h"

// Whether the GPU's kernels take this tensor.  tests/cuda_on_cpu runs them on a CPU, where the answer is always yes.
#ifndef ON_CUDA
#define ON_CUDA(tensor) (tensor).is_cuda()
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

// The weight (C, 1, k, k) or the bias (C) as the kernels want it: in the type that sums are formed in, channels last.
Tensor in_sum_type(const Tensor& t, const Tensor& qkv) {
  const Tensor sum = t.to(at::toOpMathType(qkv.scalar_type()));
  return (sum.dim() == 4 ? sum.squeeze(1).permute({1, 2, 0}) : sum).contiguous();
}

// Calls f, which starts kernels, on the current stream of t's device.
#ifdef WITH_CUDA
template <class F>
void on_stream(const Tensor& t, F f) {
  const c10::cuda::CUDAGuard guard(t.device());
  C10_CUDA_CHECK(f(c10::cuda::getCurrentCUDAStream().stream()));
}
#endif

void run_partition(const Windows& g, const Tensor& map, const Tensor& windows, bool backward) {
#ifdef WITH_CUDA
  if (ON_CUDA(map))
    return on_stream(map, [&](cudaStream_t stream) {
      return cuda::partition(g, map.element_size(), map.data_ptr(), windows.data_ptr(), backward, stream);
    });
#endif
  cpu::partition(g, map.element_size(), map.data_ptr(), windows.data_ptr(), backward);
}

// (B, H, W, 3C) -> (3, B·windows, heads, M², d)
Tensor window_partition(const Tensor& qkv, int64_t heads, int64_t window) {
  const Windows g = windows_of(qkv, heads, window);
  const Tensor map = qkv.contiguous();
  const Tensor windows = at::empty({3, g.count(), heads, window * window, g.d}, map.options());
  run_partition(g, map, windows, false);
  return windows;
}

// (3, B·windows, heads, M², d) -> (B, H, W, 3C)
Tensor window_partition_backward(const Tensor& grad, int64_t H, int64_t W, int64_t window) {
  Windows g = {1, H, W, grad.size(2), grad.size(4), window};
  g.B = grad.size(1) / g.count();
  const Tensor windows = grad.contiguous(), map = at::empty({g.B, H, W, 3 * g.channels()}, windows.options());
  run_partition(g, map, windows, true);
  return map;
}

// z (B·windows, heads, M², d) and V in qkv (B, H, W, 3C) -> Z + F(V) (B, H, W, C)
Tensor window_merge_lim(const Tensor& z, const Tensor& qkv, const Tensor& weight, const Tensor& bias, int64_t window) {
  const Windows g = windows_of(qkv, z.size(1), window);
  const Tensor w = in_sum_type(weight, qkv), b = in_sum_type(bias, qkv), map = qkv.contiguous();
  const Tensor in = z.stride(3) == 1 ? z : z.contiguous();
  const Strides strides = {in.stride(0), in.stride(1), in.stride(2)};
  const Tensor out = at::empty({g.B, g.H, g.W, g.channels()}, map.options());
  const auto run = [&](auto kernel, auto... stream) {
    return kernel(g, type_of(map), weight.size(2), in.data_ptr(), strides, map.data_ptr(), w.data_ptr(), b.data_ptr(),
                  out.data_ptr(), stream...);
  };
#ifdef WITH_CUDA
  if (ON_CUDA(map)) on_stream(map, [&](cudaStream_t stream) { return run(cuda::merge_lim, stream); });
  else
#endif
    run(cpu::merge_lim);
  return out;
}

// The gradient of the output (B, H, W, C) -> those of z, qkv, weight and bias
std::tuple<Tensor, Tensor, Tensor, Tensor> window_merge_lim_backward(const Tensor& grad, const Tensor& qkv,
                                                                     const Tensor& weight, int64_t heads,
                                                                     int64_t window) {
  const Windows g = windows_of(qkv, heads, window);
  const int64_t k = weight.size(2), C = g.channels();
  const Tensor w = in_sum_type(weight, qkv), from = grad.contiguous(), map = qkv.contiguous();
  const Tensor dz = at::empty({g.count(), heads, window * window, g.d}, map.options()), dqkv = at::empty_like(map);
  const Tensor dweight = at::empty({C, 1, k, k}, w.options()), dbias = at::empty({C}, w.options());
  const auto run = [&](auto kernel, auto... room) {
    return kernel(g, type_of(map), k, from.data_ptr(), map.data_ptr(), w.data_ptr(), dz.data_ptr(), dqkv.data_ptr(),
                  dweight.data_ptr(), dbias.data_ptr(), room...);
  };
#ifdef WITH_CUDA
  const Tensor parts = ON_CUDA(map) ? at::empty({cuda_parts, k * k + 1, C}, w.options()) : Tensor();
  if (ON_CUDA(map))
    on_stream(map, [&](cudaStream_t stream) { return run(cuda::merge_lim_backward, parts.data_ptr(), stream); });
  else
#endif
    run(cpu::merge_lim_backward);
  return {dz, dqkv, dweight.to(weight.scalar_type()), dbias.to(weight.scalar_type())};
}

// qkv (B, H, W, 3C) -> Z + F(V) (B, H, W, C)
Tensor iwsa(const Tensor& qkv, const Tensor& weight, const Tensor& bias, int64_t heads, int64_t window) {
  const Windows g = windows_of(qkv, heads, window);
  const Tensor w = in_sum_type(weight, qkv), b = in_sum_type(bias, qkv), map = qkv.contiguous();
  const Tensor out = at::empty({g.B, g.H, g.W, g.channels()}, map.options());
  cpu::iwsa(g, type_of(map), weight.size(2), map.data_ptr(), w.data_ptr(), b.data_ptr(), out.data_ptr());
  return out;
}

// The gradient of the output (B, H, W, C) -> those of qkv, weight and bias
std::tuple<Tensor, Tensor, Tensor> iwsa_backward(const Tensor& grad, const Tensor& qkv, const Tensor& weight,
                                                 int64_t heads, int64_t window) {
  const Windows g = windows_of(qkv, heads, window);
  const Tensor w = in_sum_type(weight, qkv), from = grad.contiguous(), map = qkv.contiguous();
  const Tensor dqkv = at::empty_like(map), dweight = at::empty(weight.sizes(), w.options());
  const Tensor dbias = at::empty({g.channels()}, w.options());
  cpu::iwsa_backward(g, type_of(map), weight.size(2), from.data_ptr(), map.data_ptr(), w.data_ptr(), dqkv.data_ptr(),
                     dweight.data_ptr(), dbias.data_ptr());
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
#ifdef WITH_CUDA
  m.attr("devices") = pybind11::make_tuple("cpu", "cuda");
#else
  m.attr("devices") = pybind11::make_tuple("cpu");
#endif
}
