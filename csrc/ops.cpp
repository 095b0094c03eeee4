// The operators torch.ops.scalablevit.*: schemas, checks of what comes in, tensors for what goes out.
// What they compute is in scalablevit.py, in plain PyTorch; their fake forms are in __init__.py beside this.
#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

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
  // Within a strip the GPU counts 2-byte words in 32 bits, and a float64 has four of them; what one device takes, all take.
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

// The convolution's weight (C, 1, k, k) as the kernels want it: in the type that sums are formed in, on CUDA as (k, k, C).
Tensor check_weight(const Tensor& weight, const Tensor& qkv) {
  TORCH_CHECK(weight.dim() == 4 && weight.size(0) == qkv.size(3) / 3 && weight.size(1) == 1 &&
                  weight.size(2) == weight.size(3) && weight.size(2) % 2 == 1,
              "weight must have shape (C, 1, k, k) with C=", qkv.size(3) / 3, " and k odd, got ", weight.sizes());
  const auto sum_type = at::toOpMathType(qkv.scalar_type());
  TORCH_CHECK(weight.scalar_type() == qkv.scalar_type() || weight.scalar_type() == sum_type,
              "weight must be ", sum_type, sum_type == qkv.scalar_type() ? "" : " or like qkv", " where qkv is ",
              qkv.scalar_type(), ", got ", weight.scalar_type());
  TORCH_CHECK(weight.device() == qkv.device(), "weight and qkv must be on the same device, got ", weight.device(),
              " and ", qkv.device());
  const Tensor w = weight.to(sum_type);
  return ON_CUDA(w) ? w.squeeze(1).permute({1, 2, 0}).contiguous() : w.contiguous();
}

Tensor check_bias(const Tensor& bias, const Tensor& weight, const Tensor& qkv) {
  check_same("bias", bias, "weight", weight);
  TORCH_CHECK(bias.dim() == 1 && bias.size(0) == qkv.size(3) / 3, "bias must have shape (", qkv.size(3) / 3, "), got ",
              bias.sizes());
  return bias.to(at::toOpMathType(qkv.scalar_type())).contiguous();
}

Tensor check_grad(const Tensor& grad, const Windows& g, const Tensor& qkv) {
  TORCH_CHECK(grad.sizes() == at::IntArrayRef({g.B, g.H, g.W, g.channels()}), "grad must have shape (", g.B, ", ", g.H,
              ", ", g.W, ", ", g.channels(), ") to fit qkv ", qkv.sizes(), ", got ", grad.sizes());
  check_same("grad", grad, "qkv", qkv);
  return grad.contiguous();
}

// A weight's gradient as the weight is: its dtype, its layout.
Tensor like(const Tensor& weight, const Tensor& dweight) {
  return weight.is_contiguous() ? dweight.to(weight.scalar_type()) : at::empty_like(weight).copy_(dweight);
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
  const Tensor w = check_weight(weight, qkv), b = check_bias(bias, weight, qkv), map = qkv.contiguous();
  const int64_t k = weight.size(2);
  const Tensor in = z.stride(3) == 1 ? z : z.contiguous();
  const Strides strides = {in.stride(0), in.stride(1), in.stride(2)};
  const Tensor out = at::empty({g.B, g.H, g.W, g.channels()}, map.options());
#ifdef WITH_CUDA
  if (ON_CUDA(map)) {
    on_stream(map, [&](cudaStream_t stream) {
      return cuda::merge_lim(g, type, k, in.data_ptr(), strides, map.data_ptr(), w.data_ptr(), b.data_ptr(),
                             out.data_ptr(), stream);
    });
    return out;
  }
#endif
  cpu::merge_lim(g, type, k, in.data_ptr(), strides, map.data_ptr(), w.data_ptr(), b.data_ptr(), out.data_ptr());
  return out;
}

// The gradient of the output (B, H, W, C) -> those of z, qkv, weight and bias
std::tuple<Tensor, Tensor, Tensor, Tensor> window_merge_lim_backward(const Tensor& grad, const Tensor& qkv,
                                                                     const Tensor& weight, int64_t heads,
                                                                     int64_t window) {
  const Windows g = windows_of(qkv, heads, window);
  const Type type = type_of(qkv);
  const Tensor w = check_weight(weight, qkv), from = check_grad(grad, g, qkv), map = qkv.contiguous();
  const int64_t k = weight.size(2), C = g.channels();
  const Tensor dz = at::empty({g.count(), heads, window * window, g.d}, map.options()), dqkv = at::empty_like(map);
  const Tensor dweight = at::empty_like(weight.contiguous(), w.options()), dbias = at::empty({C}, w.options());
#ifdef WITH_CUDA
  if (ON_CUDA(map)) {
    const Tensor parts = at::empty({cuda_parts, k * k + 1, C}, w.options());
    on_stream(map, [&](cudaStream_t stream) {
      return cuda::merge_lim_backward(g, type, k, from.data_ptr(), map.data_ptr(), w.data_ptr(), dz.data_ptr(),
                                      dqkv.data_ptr(), dweight.data_ptr(), dbias.data_ptr(), parts.data_ptr(), stream);
    });
  } else
#endif
    cpu::merge_lim_backward(g, type, k, from.data_ptr(), map.data_ptr(), w.data_ptr(), dz.data_ptr(), dqkv.data_ptr(),
                            dweight.data_ptr(), dbias.data_ptr());
  return {dz, dqkv, like(weight, dweight), dbias.to(weight.scalar_type())};
}

// qkv (B, H, W, 3C) -> Z + LIM(V) (B, H, W, C)
Tensor iwsa(const Tensor& qkv, const Tensor& weight, const Tensor& bias, int64_t heads, int64_t window) {
  const Windows g = windows_of(qkv, heads, window);
  const Type type = type_of(qkv);
  const Tensor w = check_weight(weight, qkv), b = check_bias(bias, weight, qkv), map = qkv.contiguous();
  const Tensor out = at::empty({g.B, g.H, g.W, g.channels()}, map.options());
  cpu::iwsa(g, type, weight.size(2), map.data_ptr(), w.data_ptr(), b.data_ptr(), out.data_ptr());
  return out;
}

// The gradient of the output (B, H, W, C) -> those of qkv, weight and bias
std::tuple<Tensor, Tensor, Tensor> iwsa_backward(const Tensor& grad, const Tensor& qkv, const Tensor& weight,
                                                 int64_t heads, int64_t window) {
  const Windows g = windows_of(qkv, heads, window);
  const Type type = type_of(qkv);
  const Tensor w = check_weight(weight, qkv), from = check_grad(grad, g, qkv), map = qkv.contiguous();
  const Tensor dqkv = at::empty_like(map), dweight = at::empty_like(weight.contiguous(), w.options());
  const Tensor dbias = at::empty({g.channels()}, w.options());
  cpu::iwsa_backward(g, type, weight.size(2), from.data_ptr(), map.data_ptr(), w.data_ptr(), dqkv.data_ptr(),
                     dweight.data_ptr(), dbias.data_ptr());
  return {dqkv, like(weight, dweight), dbias.to(weight.scalar_type())};
}

Sizes sizes_of(const Tensor& q, const Tensor& k, const Tensor& v, int64_t heads, double scale) {
  TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3, "q, k and v must have shapes (B, N, C'), (B, N_rn, C') and ",
              "(B, N_rn, C), got ", q.sizes(), ", ", k.sizes(), " and ", v.sizes());
  TORCH_CHECK(k.size(0) == q.size(0) && v.size(0) == q.size(0) && k.size(1) == v.size(1) && k.size(2) == q.size(2),
              "q, k and v must have shapes (B, N, C'), (B, N_rn, C') and (B, N_rn, C) that fit, got ", q.sizes(), ", ",
              k.sizes(), " and ", v.sizes());
  TORCH_CHECK(scale >= 0, "scale must be 0 or more, got ", scale);
  TORCH_CHECK(k.size(1) >= 1, "there must be at least one key, got k ", k.sizes());
  TORCH_CHECK(heads >= 1 && q.size(2) > 0 && v.size(2) > 0 && q.size(2) % heads == 0 && v.size(2) % heads == 0,
              "heads must divide the channels of q and of v, got ", q.size(2), " and ", v.size(2), " channels and heads=",
              heads);
  check_same("k", k, "q", q);
  check_same("v", v, "q", q);
  return {q.size(0), q.size(1), k.size(1), heads, q.size(2) / heads, v.size(2) / heads};
}

// q (B, N, C'), k (B, N_rn, C'), v (B, N_rn, C) -> (B, N, C)
Tensor ssa(const Tensor& q, const Tensor& k, const Tensor& v, int64_t heads, double scale) {
  const Sizes n = sizes_of(q, k, v, heads, scale);
  const Type type = type_of(q);
  const Tensor q_ = q.contiguous(), k_ = k.contiguous(), v_ = v.contiguous();
  const Tensor out = at::empty({n.B, n.N, v.size(2)}, q_.options());
  cpu::ssa(n, type, scale, q_.data_ptr(), k_.data_ptr(), v_.data_ptr(), out.data_ptr());
  return out;
}

// The gradient of the output (B, N, C) -> those of q, k and v
std::tuple<Tensor, Tensor, Tensor> ssa_backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                                                int64_t heads, double scale) {
  const Sizes n = sizes_of(q, k, v, heads, scale);
  const Type type = type_of(q);
  TORCH_CHECK(grad.sizes() == at::IntArrayRef({n.B, n.N, v.size(2)}), "grad must have shape (", n.B, ", ", n.N, ", ",
              v.size(2), ") to fit q and v, got ", grad.sizes());
  check_same("grad", grad, "q", q);
  const Tensor from = grad.contiguous(), q_ = q.contiguous(), k_ = k.contiguous(), v_ = v.contiguous();
  const Tensor dq = at::empty_like(q_), dk = at::empty_like(k_), dv = at::empty_like(v_);
  cpu::ssa_backward(n, type, scale, from.data_ptr(), q_.data_ptr(), k_.data_ptr(), v_.data_ptr(), dq.data_ptr(),
                    dk.data_ptr(), dv.data_ptr());
  return {dq, dk, dv};
}

// ---------------------------------------------------------------- autograd: each operator's backward is an operator
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The operators as PyTorch calls them: through the dispatcher, so that what traces or compiles sees them too.
template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}
Tensor call_partition(const Tensor& qkv, int64_t heads, const c10::SymInt& window) {
  static const auto op = find<Tensor(const Tensor&, int64_t, c10::SymInt)>("scalablevit::window_partition");
  return op.call(qkv, heads, window);
}
Tensor call_partition_backward(const Tensor& grad, const c10::SymInt& H, const c10::SymInt& W, const c10::SymInt& window) {
  static const auto op = find<Tensor(const Tensor&, c10::SymInt, c10::SymInt, c10::SymInt)>(
      "scalablevit::window_partition_backward");
  return op.call(grad, H, W, window);
}
Tensor call_merge_lim(const Tensor& z, const Tensor& qkv, const Tensor& weight, const Tensor& bias,
                      const c10::SymInt& window) {
  static const auto op = find<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, c10::SymInt)>(
      "scalablevit::window_merge_lim");
  return op.call(z, qkv, weight, bias, window);
}
std::tuple<Tensor, Tensor, Tensor, Tensor> call_merge_lim_backward(const Tensor& grad, const Tensor& qkv,
                                                                   const Tensor& weight, int64_t heads,
                                                                   const c10::SymInt& window) {
  static const auto op = find<std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                                         int64_t, c10::SymInt)>(
      "scalablevit::window_merge_lim_backward");
  return op.call(grad, qkv, weight, heads, window);
}

Tensor call_iwsa(const Tensor& qkv, const Tensor& weight, const Tensor& bias, int64_t heads, const c10::SymInt& window) {
  static const auto op =
      find<Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t, c10::SymInt)>("scalablevit::iwsa");
  return op.call(qkv, weight, bias, heads, window);
}
std::tuple<Tensor, Tensor, Tensor> call_iwsa_backward(const Tensor& grad, const Tensor& qkv, const Tensor& weight,
                                                      int64_t heads, const c10::SymInt& window) {
  static const auto op = find<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, int64_t,
                                                                 c10::SymInt)>("scalablevit::iwsa_backward");
  return op.call(grad, qkv, weight, heads, window);
}
Tensor call_ssa(const Tensor& q, const Tensor& k, const Tensor& v, int64_t heads, double scale) {
  static const auto op = find<Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t, double)>("scalablevit::ssa");
  return op.call(q, k, v, heads, scale);
}
std::tuple<Tensor, Tensor, Tensor> call_ssa_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                     const Tensor& v, int64_t heads, double scale) {
  static const auto op = find<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                                 const Tensor&, int64_t, double)>(
      "scalablevit::ssa_backward");
  return op.call(grad, q, k, v, heads, scale);
}

struct Partition : torch::autograd::Function<Partition> {
  static Tensor forward(AutogradContext* ctx, const Tensor& qkv, int64_t heads, const c10::SymInt& window) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor windows = call_partition(qkv, heads, window);
    ctx->saved_data["H"] = qkv.sym_size(1);
    ctx->saved_data["W"] = qkv.sym_size(2);
    ctx->saved_data["window"] = window;
    return windows;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    auto& saved = ctx->saved_data;
    return {call_partition_backward(grads[0], saved["H"].toSymInt(), saved["W"].toSymInt(), saved["window"].toSymInt()),
            Tensor(), Tensor()};
  }
};

struct PartitionBackward : torch::autograd::Function<PartitionBackward> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad, const c10::SymInt& H, const c10::SymInt& W,
                        const c10::SymInt& window) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor map = call_partition_backward(grad, H, W, window);
    ctx->saved_data["heads"] = grad.sym_size(2).guard_int(__FILE__, __LINE__);
    ctx->saved_data["window"] = window;
    return map;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    auto& saved = ctx->saved_data;
    return {call_partition(grads[0], saved["heads"].toInt(), saved["window"].toSymInt()), Tensor(), Tensor(), Tensor()};
  }
};

struct MergeLIM : torch::autograd::Function<MergeLIM> {
  static Tensor forward(AutogradContext* ctx, const Tensor& z, const Tensor& qkv, const Tensor& weight,
                        const Tensor& bias, const c10::SymInt& window) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor out = call_merge_lim(z, qkv, weight, bias, window);
    ctx->save_for_backward({qkv, weight});
    ctx->saved_data["heads"] = z.sym_size(1).guard_int(__FILE__, __LINE__);
    ctx->saved_data["window"] = window;
    return out;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto inputs = ctx->get_saved_variables();
    const auto [dz, dqkv, dweight, dbias] = call_merge_lim_backward(
        grads[0], inputs[0], inputs[1], ctx->saved_data["heads"].toInt(), ctx->saved_data["window"].toSymInt());
    return {dz, dqkv, dweight, dbias, Tensor()};
  }
};

struct MergeLIMBackward : torch::autograd::Function<MergeLIMBackward> {
  static variable_list forward(AutogradContext*, const Tensor& grad, const Tensor& qkv, const Tensor& weight,
                               int64_t heads, const c10::SymInt& window) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto [dz, dqkv, dweight, dbias] = call_merge_lim_backward(grad, qkv, weight, heads, window);
    return {dz, dqkv, dweight, dbias};
  }
  static variable_list backward(AutogradContext*, variable_list) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, "the kernels have no second derivative of LIM: set SCALABLEVIT_KERNELS=0");
  }
};

struct IWSA : torch::autograd::Function<IWSA> {
  static Tensor forward(AutogradContext* ctx, const Tensor& qkv, const Tensor& weight, const Tensor& bias,
                        int64_t heads, const c10::SymInt& window) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor out = call_iwsa(qkv, weight, bias, heads, window);
    ctx->save_for_backward({qkv, weight});
    ctx->saved_data["heads"] = heads;
    ctx->saved_data["window"] = window;
    return out;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto inputs = ctx->get_saved_variables();
    const auto [dqkv, dweight, dbias] = call_iwsa_backward(grads[0], inputs[0], inputs[1],
                                                           ctx->saved_data["heads"].toInt(),
                                                           ctx->saved_data["window"].toSymInt());
    return {dqkv, dweight, dbias, Tensor(), Tensor()};
  }
};

struct IWSABackward : torch::autograd::Function<IWSABackward> {
  static variable_list forward(AutogradContext*, const Tensor& grad, const Tensor& qkv, const Tensor& weight,
                               int64_t heads, const c10::SymInt& window) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto [dqkv, dweight, dbias] = call_iwsa_backward(grad, qkv, weight, heads, window);
    return {dqkv, dweight, dbias};
  }
  static variable_list backward(AutogradContext*, variable_list) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, "the kernels have no second derivative of IWSA: set SCALABLEVIT_KERNELS=0");
  }
};

struct SSA : torch::autograd::Function<SSA> {
  static Tensor forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v, int64_t heads,
                        double scale) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor out = call_ssa(q, k, v, heads, scale);
    ctx->save_for_backward({q, k, v});
    ctx->saved_data["heads"] = heads;
    ctx->saved_data["scale"] = scale;
    return out;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto inputs = ctx->get_saved_variables();
    const auto [dq, dk, dv] = call_ssa_backward(grads[0], inputs[0], inputs[1], inputs[2],
                                                ctx->saved_data["heads"].toInt(), ctx->saved_data["scale"].toDouble());
    return {dq, dk, dv, Tensor(), Tensor()};
  }
};

struct SSABackward : torch::autograd::Function<SSABackward> {
  static variable_list forward(AutogradContext*, const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                               int64_t heads, double scale) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto [dq, dk, dv] = call_ssa_backward(grad, q, k, v, heads, scale);
    return {dq, dk, dv};
  }
  static variable_list backward(AutogradContext*, variable_list) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, "the kernels have no second derivative of SSA: set SCALABLEVIT_KERNELS=0");
  }
};

// What the dispatcher calls where gradients may be wanted.  In inference the bookkeeping would cost as much as the call;
// it stays where a tensor has a forward-mode gradient, to say that there is no such thing here.
template <class... Tensors>
bool inference(const Tensors&... tensors) {
  return !at::GradMode::is_enabled() && !(tensors._fw_grad(0).defined() || ...);
}
Tensor partition_autograd(const Tensor& qkv, int64_t heads, c10::SymInt window) {
  if (!inference(qkv)) return Partition::apply(qkv, heads, window);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_partition(qkv, heads, window);
}
Tensor partition_backward_autograd(const Tensor& grad, c10::SymInt H, c10::SymInt W, c10::SymInt window) {
  return PartitionBackward::apply(grad, H, W, window);
}
Tensor merge_lim_autograd(const Tensor& z, const Tensor& qkv, const Tensor& weight, const Tensor& bias,
                          c10::SymInt window) {
  if (!inference(z, qkv, weight, bias)) return MergeLIM::apply(z, qkv, weight, bias, window);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_merge_lim(z, qkv, weight, bias, window);
}
std::tuple<Tensor, Tensor, Tensor, Tensor> merge_lim_backward_autograd(const Tensor& grad, const Tensor& qkv,
                                                                       const Tensor& weight, int64_t heads,
                                                                       c10::SymInt window) {
  const variable_list out = MergeLIMBackward::apply(grad, qkv, weight, heads, window);
  return {out[0], out[1], out[2], out[3]};
}

Tensor iwsa_autograd(const Tensor& qkv, const Tensor& weight, const Tensor& bias, int64_t heads, c10::SymInt window) {
  if (!inference(qkv, weight, bias)) return IWSA::apply(qkv, weight, bias, heads, window);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_iwsa(qkv, weight, bias, heads, window);
}
std::tuple<Tensor, Tensor, Tensor> iwsa_backward_autograd(const Tensor& grad, const Tensor& qkv, const Tensor& weight,
                                                          int64_t heads, c10::SymInt window) {
  const variable_list out = IWSABackward::apply(grad, qkv, weight, heads, window);
  return {out[0], out[1], out[2]};
}

Tensor ssa_autograd(const Tensor& q, const Tensor& k, const Tensor& v, int64_t heads, double scale) {
  if (!inference(q, k, v)) return SSA::apply(q, k, v, heads, scale);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_ssa(q, k, v, heads, scale);
}
std::tuple<Tensor, Tensor, Tensor> ssa_backward_autograd(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                         const Tensor& v, int64_t heads, double scale) {
  const variable_list out = SSABackward::apply(grad, q, k, v, heads, scale);
  return {out[0], out[1], out[2]};
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
  m.def("iwsa(Tensor qkv, Tensor weight, Tensor bias, int heads, SymInt window) -> Tensor");
  m.def("iwsa_backward(Tensor grad, Tensor qkv, Tensor weight, int heads, SymInt window)"
        " -> (Tensor dqkv, Tensor dweight, Tensor dbias)");
  m.def("ssa(Tensor q, Tensor k, Tensor v, int heads, float scale) -> Tensor");
  m.def("ssa_backward(Tensor grad, Tensor q, Tensor k, Tensor v, int heads, float scale)"
        " -> (Tensor dq, Tensor dk, Tensor dv)");
}

TORCH_LIBRARY_IMPL(scalablevit, Autograd, m) {
  m.impl("window_partition", partition_autograd);
  m.impl("window_partition_backward", partition_backward_autograd);
  m.impl("window_merge_lim", merge_lim_autograd);
  m.impl("window_merge_lim_backward", merge_lim_backward_autograd);
  m.impl("iwsa", iwsa_autograd);
  m.impl("iwsa_backward", iwsa_backward_autograd);
  m.impl("ssa", ssa_autograd);
  m.impl("ssa_backward", ssa_backward_autograd);
}
TORCH_LIBRARY_IMPL(scalablevit, CPU, m) {
  implement(m);
  m.impl("iwsa", iwsa);
  m.impl("iwsa_backward", iwsa_backward);
  m.impl("ssa", ssa);
  m.impl("ssa_backward", ssa_backward);
}
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
