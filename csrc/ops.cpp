#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>
#include "kernels.h"
using at::Tensor;
static Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return Type::Float32;
    case at::kDouble: return Type::Float64;
    case at::kBFloat16: return Type::BFloat16;
    case at::kHalf: return Type::Float16;
    default: TORCH_CHECK(false, "float32, float64, bfloat16 or float16 expected, got ", t.scalar_type());
  }
}
Tensor window_partition(const Tensor& qkv_, int64_t heads, int64_t M) {
  Tensor qkv = qkv_.contiguous();
  Windows g{qkv.size(0), qkv.size(1), qkv.size(2), heads, qkv.size(3) / (3 * heads), M};
  Tensor out = at::empty({3, g.count(), heads, M * M, g.d}, qkv.options());
  cpu::partition(g, type_of(qkv), qkv.const_data_ptr(), out.mutable_data_ptr());
  return out;
}
Tensor window_partition_backward(const Tensor& grad_, int64_t H, int64_t W, int64_t M) {
  Tensor grad = grad_.contiguous();
  int64_t h = (H + M - 1) / M, w = (W + M - 1) / M;
  Windows g{grad.size(1) / (h * w), H, W, grad.size(2), grad.size(4), M};
  Tensor out = at::empty({g.B, H, W, 3 * g.channels()}, grad.options());
  cpu::partition_backward(g, type_of(grad), grad.const_data_ptr(), out.mutable_data_ptr());
  return out;
}
static Tensor taps(const Tensor& w, at::ScalarType acc) {
  return at::empty({w.size(2), w.size(3), w.size(0)}, w.options().dtype(acc)).copy_(w.squeeze(1).permute({1, 2, 0}));
}
Tensor window_merge_lim(const Tensor& z, const Tensor& qkv_, const Tensor& weight, const Tensor& bias, int64_t M) {
  Tensor qkv = qkv_.contiguous();
  Windows g{qkv.size(0), qkv.size(1), qkv.size(2), z.size(1), z.size(3), M};
  auto acc = at::toOpMathType(qkv.scalar_type());
  Tensor w = taps(weight, acc), b = bias.to(acc).contiguous();
  Tensor out = at::empty({g.B, g.H, g.W, g.channels()}, qkv.options());
  cpu::merge_lim(g, type_of(qkv), weight.size(2), z.const_data_ptr(), {z.stride(0), z.stride(1), z.stride(2)}, qkv.const_data_ptr(), w.const_data_ptr(), b.const_data_ptr(), out.mutable_data_ptr());
  return out;
}
std::tuple<Tensor, Tensor, Tensor, Tensor> window_merge_lim_backward(const Tensor& grad_, const Tensor& qkv_, const Tensor& weight, int64_t heads, int64_t M) {
  Tensor qkv = qkv_.contiguous(), grad = grad_.contiguous();
  Windows g{qkv.size(0), qkv.size(1), qkv.size(2), heads, grad.size(3) / heads, M};
  auto acc = at::toOpMathType(qkv.scalar_type());
  int64_t k = weight.size(2), C = g.channels();
  Tensor w = taps(weight, acc);
  Tensor dz = at::empty({g.count(), heads, M * M, g.d}, qkv.options()), dqkv = at::empty_like(qkv);
  const int64_t chunks = std::min<int64_t>(32, g.strips());
  Tensor partials = at::empty({chunks, k * k + 1, C}, w.options());
  cpu::merge_lim_backward(g, type_of(qkv), k, grad.const_data_ptr(), qkv.const_data_ptr(), w.const_data_ptr(), dz.mutable_data_ptr(), dqkv.mutable_data_ptr(), chunks, partials.mutable_data_ptr());
  Tensor sum = partials.sum(0);
  Tensor dw = sum.narrow(0, 0, k * k).t().reshape({C, 1, k, k}).to(weight.dtype());
  return {dz, dqkv, dw, sum[k * k].to(weight.dtype())};
}
TORCH_LIBRARY(scalablevit, m) {
  m.def("window_partition(Tensor qkv, int heads, int window) -> Tensor");
  m.def("window_partition_backward(Tensor grad, SymInt H, SymInt W, int window) -> Tensor");
  m.def("window_merge_lim(Tensor z, Tensor qkv, Tensor weight, Tensor bias, int window) -> Tensor");
  m.def("window_merge_lim_backward(Tensor grad, Tensor qkv, Tensor weight, int heads, int window) -> (Tensor, Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(scalablevit, CPU, m) {
  m.impl("window_partition", window_partition);
  m.impl("window_partition_backward", window_partition_backward);
  m.impl("window_merge_lim", window_merge_lim);
  m.impl("window_merge_lim_backward", window_merge_lim_backward);
}
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.attr("devices") = pybind11::make_tuple("cpu"); }
