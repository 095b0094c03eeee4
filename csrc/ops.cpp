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

Windows windows_of(const Tensor& qkv, int64_t heads, int64_t window) {
  return {qkv.size(0), qkv.size(1), qkv.size(2), heads, qkv.size(3) / 3 / heads, window};
}

// An input.  Its storage may have been freed, as FSDP does, and reading it would crash.
const Tensor& in_memory(const Tensor& t) {
  const size_t bytes = at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.element_size(), t.storage_offset());
  TORCH_CHECK(t.storage().nbytes() >= bytes, "got a tensor of shape ", t.sizes(), " whose storage was freed");
  return t;
}

// The weight (C, 1, k, k) or the bias (C) as the kernels take it: in the accumulation type, channels last.
Tensor in_sum_type(const Tensor& t, const Tensor& qkv) {
  const Tensor sum = in_memory(t).to(at::toOpMathType(qkv.scalar_type()));
  return (sum.dim() == 4 ? sum.squeeze(1).permute({1, 2, 0}) : sum).contiguous();
}

// Replaces qkv and weight by what the kernels take, and returns pointers to them.
Inputs prepare(Tensor& qkv, Tensor& weight, int64_t heads, int64_t window) {
  weight = in_sum_type(weight, qkv);
  qkv = in_memory(qkv).contiguous();
  return {windows_of(qkv, heads, window), Type(qkv.scalar_type()), weight.size(0), qkv.data_ptr(), weight.data_ptr()};
}

// For the gradients of LIM's parameters: empty parts, w being the weight (k, k, C); and their sum.
Tensor parts_for(const Tensor& w) {
  return at::empty({ON_CUDA(w) ? cuda_parts : cpu_parts, w.size(0) * w.size(0) + 1, w.size(2)}, w.options());
}
void add_parts(const Tensor& parts, Tensor& dweight, Tensor& dbias) {
  const Tensor sum = parts.sum(0), taps = sum.slice(0, 0, -1);
  dweight.copy_(taps.t().reshape(dweight.sizes()));
  dbias.copy_(sum[-1]);
}

void window_partition(Tensor qkv, int64_t heads, int64_t window, Tensor windows) {
  qkv = in_memory(qkv).contiguous();
  RUN(qkv, partition, windows_of(qkv, heads, window), qkv.element_size(), qkv.data_ptr(), windows.data_ptr(), false);
}

void window_partition_backward(Tensor grad, int64_t, int64_t, int64_t window, Tensor dqkv) {
  grad = in_memory(grad).contiguous();
  const Windows g = windows_of(dqkv, grad.size(2), window);
  RUN(grad, partition, g, grad.element_size(), dqkv.data_ptr(), grad.data_ptr(), true);
}

void window_merge_lim(Tensor z, Tensor qkv, Tensor weight, Tensor bias, int64_t window, Tensor out) {
  const Inputs in = prepare(qkv, weight, z.size(1), window);
  bias = in_sum_type(bias, qkv);
  z = in_memory(z).stride(3) == 1 ? z : z.contiguous();
  RUN(z, merge_lim, in, bias.data_ptr(), z.data_ptr(), {z.stride(0), z.stride(1), z.stride(2)}, out.data_ptr());
}

void window_merge_lim_backward(Tensor grad, Tensor qkv, Tensor weight, int64_t heads, int64_t window, Tensor dz,
                               Tensor dqkv, Tensor dweight, Tensor dbias) {
  const Inputs in = prepare(qkv, weight, heads, window);
  const Tensor dout = in_memory(grad).contiguous(), parts = parts_for(weight);
  RUN(dout, merge_lim_backward, in, dout.data_ptr(), dz.data_ptr(), dqkv.data_ptr(), parts.data_ptr());
  add_parts(parts, dweight, dbias);
}

void iwsa(Tensor qkv, Tensor weight, Tensor bias, int64_t heads, int64_t window, Tensor out) {
  const Inputs in = prepare(qkv, weight, heads, window);
  cpu::iwsa(in, in_sum_type(bias, qkv).data_ptr(), out.data_ptr());
}

void iwsa_backward(Tensor grad, Tensor qkv, Tensor weight, int64_t heads, int64_t window, Tensor dqkv, Tensor dweight,
                   Tensor dbias) {
  const Inputs in = prepare(qkv, weight, heads, window);
  const Tensor dout = in_memory(grad).contiguous(), parts = parts_for(weight);
  cpu::iwsa_backward(in, dout.data_ptr(), dqkv.data_ptr(), parts.data_ptr());
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
