// The operators torch.ops.scalablevit.*: schemas, checks of what comes in, tensors for what goes out.
// What they compute is in scalablevit.py, in plain PyTorch; their autograd and fake forms are in __init__.py beside this.
#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#ifdef WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include "kernels.h"

namespace {

using at::Tensor;

Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return Type::Float32;
    case at::kDouble: return Type::Float64;
    case at::kBFloat16: return Type::BFloat16;
    case at::kHalf: return Type::Float16;
    default: TORCH_CHECK(false, "expected float32, float64, bfloat16 or float16, got ", t.scalar_type());
  }
}

void check_same(const char* a_name, const Tensor& a, const char* b_name, const Tensor& b) {
  TORCH_CHECK(a.scalar_type() == b.scalar_type() && a.device() == b.device(), a_name, " and ", b_name,
              " must have the same dtype and device, got ", a.scalar_type(), " on ", a.device(), " and ", b.scalar_type(),
              " on ", b.device());
}

Windows windows_of(int64_t B, int64_t H, int64_t W, int64_t heads, int64_t d, int64_t M) {
  TORCH_CHECK(H >= 1 && W >= 1 && H < (1LL << 31) && W < (1LL << 31),
              "the map must have at least one row and one column, and fewer than 2^31 of each, got H=", H, ", W=", W);
  // Within a strip the GPU counts 2-byte words in 32 bits, and a float64 has four of them.
  TORCH_CHECK(M >= 1 && M < (1 << 15) && 3 * heads * d < (1 << 29) / M,
              "window must be at least 1, below 2^15, and window · 3C below 2^29, got window=", M, " and 3C=", 3 * heads * d);
  return {B, H, W, heads, d, M};
}

Windows windows_of(const Tensor& qkv, int64_t heads, int64_t M) {
  TORCH_CHECK(qkv.dim() == 4, "qkv must have shape (B, H, W, 3C), got ", qkv.sizes());
  TORCH_CHECK(heads >= 1 && qkv.size(3) > 0 && qkv.size(3) % 3 == 0 && qkv.size(3) / 3 % heads == 0,
              "qkv must have 3·heads·d channels, got ", qkv.size(3), " channels and heads=", heads);
  return windows_of(qkv.size(0), qkv.size(1), qkv.size(2), heads, qkv.size(3) / 3 / heads, M);
}

// The convolution's weight (C, 1, k, k) as the kernels want it: (k, k, C), in the type that sums are formed in.
Tensor check_weight(const Tensor& weight, const Tensor& qkv) {
  TORCH_CHECK(weight.dim() == 4 && weight.size(0) == qkv.size(3) / 3 && weight.size(1) == 1 &&
                  weight.size(2) == weight.size(3) && weight.size(2) % 2 == 1,
              "weight must have shape (C, 1, k, k) with C=", qkv.size(3) / 3, " and k odd, got ", weight.sizes());
  const auto sum_type = at::toOpMathType(qkv.scalar_type());
  TORCH_CHECK(weight.scalar_type() == qkv.scalar_type() || weight.scalar_type() == sum_type,
              "weight must be ", qkv.scalar_type(), " like qkv or ", sum_type, ", got ", weight.scalar_type());
  TORCH_CHECK(weight.device() == qkv.device(), "weight and qkv must be on the same device, got ", weight.device(),
              " and ", qkv.device());
  Tensor taps = at::empty({weight.size(2), weight.size(3), weight.size(0)}, qkv.options().dtype(sum_type));
  return taps.copy_(weight.squeeze(1).permute({1, 2, 0}));
}

#ifdef WITH_CUDA
// Calls f on the current stream of t's device.
template <class F>
void on_stream(const Tensor& t, F f) {
  const c10::cuda::CUDAGuard guard(t.device());
  C10_CUDA_CHECK(f(c10::cuda::getCurrentCUDAStream().stream()));
}
#endif

void run_partition(const Windows& g, const Tensor& map, const Tensor& windows, bool backward) {
#ifdef WITH_CUDA
  if (map.is_cuda())
    return on_stream(map, [&](cudaStream_t stream) {
      return cuda::partition(g, map.element_size(), map.data_ptr(), windows.data_ptr(), backward, stream);
    });
#endif
  cpu::partition(g, map.element_size(), map.data_ptr(), windows.data_ptr(), backward);
}

// (B, H, W, 3C) -> (3, B·windows, heads, M², d)
Tensor window_partition(const Tensor& qkv, int64_t heads, int64_t window) {
  const Windows g = windows_of(qkv, heads, window);
  type_of(qkv);
  const Tensor map = qkv.contiguous();
  const Tensor windows = at::empty({3, g.count(), heads, window * window, g.d}, map.options());
  run_partition(g, map, windows, false);
  return windows;
}

// (3, B·windows, heads, M², d) -> (B, H, W, 3C)
Tensor window_partition_backward(const Tensor& grad, int64_t H, int64_t W, int64_t window) {
  TORCH_CHECK(grad.dim() == 5 && grad.size(0) == 3 && grad.size(2) > 0 && grad.size(4) > 0,
              "grad must have shape (3, B·windows, heads, M², d), got ", grad.sizes());
  Windows g = windows_of(0, H, W, grad.size(2), grad.size(4), window);
  g.B = grad.size(1) / (g.h * g.w);
  TORCH_CHECK(grad.size(1) == g.count() && grad.size(3) == window * window, "grad ", grad.sizes(), " does not fit H=", H,
              ", W=", W, ", window=", window);
  type_of(grad);
  const Tensor windows = grad.contiguous(), map = at::empty({g.B, H, W, 3 * g.channels()}, windows.options());
  run_partition(g, map, windows, true);
  return map;
}

// z (B·windows, heads, M², d) and V in qkv (B, H, W, 3C) -> Z + LIM(V) (B, H, W, C)
Tensor window_merge_lim(const Tensor& z, const Tensor& qkv, const Tensor& weight, const Tensor& bias, int64_t window) {
  TORCH_CHECK(z.dim() == 4, "z must have shape (B·windows, heads, M², d), got ", z.sizes());
  const Windows g = windows_of(qkv, z.size(1), window);
  TORCH_CHECK(z.size(0) == g.count() && z.size(2) == window * window && z.size(3) == g.d, "z must have shape (",
              g.count(), ", heads, ", window * window, ", ", g.d, ") to fit qkv ", qkv.sizes(), " and window=", window,
              ", got ", z.sizes());
  const Type type = type_of(qkv);
  check_same("z", z, "qkv", qkv);
  check_same("bias", bias, "weight", weight);
  TORCH_CHECK(bias.dim() == 1 && bias.size(0) == g.channels(), "bias must have shape (", g.channels(), "), got ",
              bias.sizes());
  const Tensor taps = check_weight(weight, qkv), b = bias.to(taps.scalar_type()).contiguous(), map = qkv.contiguous();
  const Tensor in = z.stride(3) == 1 ? z : z.contiguous();
  const Strides strides = {in.stride(0), in.stride(1), in.stride(2)};
  const Tensor out = at::empty({g.B, g.H, g.W, g.channels()}, map.options());
#ifdef WITH_CUDA
  if (map.is_cuda()) {
    on_stream(map, [&](cudaStream_t stream) {
      return cuda::merge_lim(g, type, taps.size(0), in.data_ptr(), strides, map.data_ptr(), taps.data_ptr(),
                             b.data_ptr(), out.data_ptr(), stream);
    });
    return out;
  }
#endif
  cpu::merge_lim(g, type, taps.size(0), in.data_ptr(), strides, map.data_ptr(), taps.data_ptr(), b.data_ptr(),
                 out.data_ptr());
  return out;
}

// The gradient of the output (B, H, W, C) -> those of z, qkv, weight and bias
std::tuple<Tensor, Tensor, Tensor, Tensor> window_merge_lim_backward(const Tensor& grad, const Tensor& qkv,
                                                                     const Tensor& weight, int64_t heads,
                                                                     int64_t window) {
  const Windows g = windows_of(qkv, heads, window);
  TORCH_CHECK(grad.sizes() == at::IntArrayRef({g.B, g.H, g.W, g.channels()}), "grad must have shape (", g.B, ", ", g.H,
              ", ", g.W, ", ", g.channels(), ") to fit qkv ", qkv.sizes(), ", got ", grad.sizes());
  const Type type = type_of(qkv);
  check_same("grad", grad, "qkv", qkv);
  const Tensor taps = check_weight(weight, qkv), from = grad.contiguous(), map = qkv.contiguous();
  const int64_t k = taps.size(0), C = g.channels();
  const Tensor dz = at::empty({g.count(), heads, window * window, g.d}, map.options()), dqkv = at::empty_like(map);
  const Tensor dweight = at::empty({C, 1, k, k}, taps.options()), dbias = at::empty({C}, taps.options());
  const Tensor parts = at::empty({map.is_cuda() ? cuda_parts : cpu_parts, k * k + 1, C}, taps.options());
#ifdef WITH_CUDA
  if (map.is_cuda())
    on_stream(map, [&](cudaStream_t stream) {
      return cuda::merge_lim_backward(g, type, k, from.data_ptr(), map.data_ptr(), taps.data_ptr(), dz.data_ptr(),
                                      dqkv.data_ptr(), dweight.data_ptr(), dbias.data_ptr(), parts.data_ptr(), stream);
    });
  else
#endif
    cpu::merge_lim_backward(g, type, k, from.data_ptr(), map.data_ptr(), taps.data_ptr(), dz.data_ptr(),
                            dqkv.data_ptr(), dweight.data_ptr(), dbias.data_ptr(), parts.data_ptr());
  return {dz, dqkv, at::empty_like(weight).copy_(dweight), dbias.to(weight.scalar_type())};  // laid out as the weight is
}

void implement(torch::Library& m) {
  m.impl("window_partition", window_partition);
  m.impl("window_partition_backward", window_partition_backward);
  m.impl("window_merge_lim", window_merge_lim);
  m.impl("window_merge_lim_backward", window_merge_lim_backward);
}

}  // namespace

TORCH_LIBRARY(scalablevit, m) {
  m.def("window_partition(Tensor qkv, int heads, SymInt window) -> Tensor");
  m.def("window_partition_backward(Tensor grad, SymInt H, SymInt W, SymInt window) -> Tensor");
  m.def("window_merge_lim(Tensor z, Tensor qkv, Tensor weight, Tensor bias, SymInt window) -> Tensor");
  m.def("window_merge_lim_backward(Tensor grad, Tensor qkv, Tensor weight, int heads, SymInt window)"
        " -> (Tensor dz, Tensor dqkv, Tensor dweight, Tensor dbias)");
}

TORCH_LIBRARY_IMPL(scalablevit, CPU, m) { implement(m); }
#ifdef WITH_CUDA
TORCH_LIBRARY_IMPL(scalablevit, CUDA, m) { implement(m); }
#endif

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Registers torch.ops.scalablevit.*; `devices` are the types of device that it has kernels for.";
#ifdef WITH_CUDA
  m.attr("devices") = pybind11::make_tuple("cpu", "cuda");
#else
  m.attr("devices") = pybind11::make_tuple("cpu");
#endif
}
