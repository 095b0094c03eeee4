"""The operators torch.ops.scalablevit.*: everything PyTorch needs besides the kernels (ops.cpp).

Each has a schema, argument checks, a kernel, a fake implementation (output shapes), a gradient and a FLOP formula.
"""
import torch
from torch import _check as require
from torch.autograd import forward_ad
from torch.library import Library, impl, register_autograd, register_fake
from torch.utils.flop_counter import bmm_flop, conv_backward_flop, conv_flop, register_flop_formula

from . import _C

LIBRARY = Library("scalablevit", "DEF")
ops = torch.ops.scalablevit


def windows(H, W, M):                                               # number of windows in a map
    return -(-H // M) * -(-W // M)


def check(qkv, heads, M, **others):
    """Check qkv (B, H, W, 3C) and the other tensors; returns B, H, W, C.  Raises RuntimeError with what is accepted."""
    require(qkv.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16),
            lambda: f"expected float32, float64, bfloat16 or float16, got {qkv.dtype}")
    require(qkv.ndim == 4, lambda: f"qkv must have shape (B, H, W, 3C), got {tuple(qkv.shape)}")
    B, H, W, channels = qkv.shape
    require(0 < H < 2 ** 31 and 0 < W < 2 ** 31, lambda: f"H and W must be at least 1 and below 2^31, got {H} x {W}")
    require(heads >= 1 and channels > 0 and channels % (3 * heads) == 0,
            lambda: f"qkv must have 3·heads·d channels, got {channels} channels and heads={heads}")
    require(0 < M < 2 ** 15 and M * channels < 2 ** 29,             # kernels use 32-bit offsets within a window's row
            lambda: f"window must be in 1 .. 2^15 - 1, and window · 3C below 2^29, got {M} with 3C = {channels}")
    C, d = channels // 3, channels // (3 * heads)
    sums = torch.promote_types(qkv.dtype, torch.float32)            # dtype of the parameters under autocast
    for name, tensor in others.items():
        k, like = tensor.shape[-1] if tensor.ndim else 0, others["weight"] if name == "bias" else qkv
        dtypes = (qkv.dtype, sums) if name == "weight" else (like.dtype,)
        shape = {"z": (B * windows(H, W, M), heads, M * M, d), "grad": (B, H, W, C), "bias": (C,),
                 "weight": (C, 1, k, k)}[name]
        require(tensor.ndim == len(shape) and all(n == m for n, m in zip(tensor.shape, shape)),
                lambda: f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
        require(name != "weight" or k % 2 == 1, lambda: f"weight must have shape (C, 1, k, k) with k odd, got k={k}")
        require(tensor.dtype in dtypes and tensor.device == qkv.device,
                lambda: f"{name} must have dtype {' or '.join(map(str, dict.fromkeys(dtypes)))} and be on "
                        f"{qkv.device}, as qkv is, got {tensor.dtype} on {tensor.device}")
    return B, H, W, C


def operator(schema, devices=_C.devices):
    """Define an operator.  The decorated function checks its arguments and returns a function making fake outputs."""
    def define(checked):
        name, kernel = f"scalablevit::{checked.__name__}", getattr(_C, checked.__name__)
        LIBRARY.define(checked.__name__ + schema)

        def run(*args):
            require(forward_ad._current_level < 0, lambda: "the kernels have no forward-mode AD: use unfuse(model)")
            checked(*args)
            return kernel(*args)

        impl(name, devices, run)
        register_fake(name, lambda *args: checked(*args)())
        return checked
    return define


@operator("(Tensor qkv, int heads, SymInt window) -> Tensor")
def window_partition(qkv, heads, M):                                # -> (3, B·windows, heads, M², d)
    B, H, W, C = check(qkv, heads, M)
    return lambda: qkv.new_empty(3, B * windows(H, W, M), heads, M * M, C // heads)


@operator("(Tensor grad, SymInt H, SymInt W, SymInt window) -> Tensor")
def window_partition_backward(grad, H, W, M):                       # -> (B, H, W, 3C)
    fits = grad.ndim == 5 and min(H, W, M) > 0 and max(H, W) < 2 ** 31 and grad.shape[0] == 3 and grad.shape[3] == M * M
    require(fits and grad.shape[1] % windows(H, W, M) == 0,
            lambda: f"grad must have shape (3, B·windows, heads, M², d), with H and W in 1 .. 2^31 - 1 and a window "
                    f"of at least 1, got {tuple(grad.shape)} with H={H}, W={W}, window={M}")
    shape = grad.shape[1] // windows(H, W, M), H, W, 3 * grad.shape[2] * grad.shape[4]
    check(torch.empty(shape, dtype=grad.dtype, device="meta"), grad.shape[2], M)
    return lambda: grad.new_empty(shape)


@operator("(Tensor z, Tensor qkv, Tensor weight, Tensor bias, SymInt window) -> Tensor")
def window_merge_lim(z, qkv, weight, bias, M):                      # -> Z + F(V), (B, H, W, C)
    require(z.ndim == 4, lambda: f"z must have shape (B·windows, heads, M², d), got {tuple(z.shape)}")
    B, H, W, C = check(qkv, z.shape[1], M, z=z, weight=weight, bias=bias)
    return lambda: qkv.new_empty(B, H, W, C)


@operator("(Tensor grad, Tensor qkv, Tensor weight, int heads, SymInt window) -> (Tensor, Tensor, Tensor, Tensor)")
def window_merge_lim_backward(grad, qkv, weight, heads, M):         # -> the gradients of z, qkv, weight and bias
    B, H, W, C = check(qkv, heads, M, weight=weight, grad=grad)
    return lambda: (qkv.new_empty(B * windows(H, W, M), heads, M * M, C // heads), qkv.new_empty(qkv.shape),
                    weight.new_empty(weight.shape), weight.new_empty(C))


@operator("(Tensor qkv, Tensor weight, Tensor bias, int heads, SymInt window) -> Tensor", "cpu")
def iwsa(qkv, weight, bias, heads, M):                              # -> Z + F(V), (B, H, W, C)
    B, H, W, C = check(qkv, heads, M, weight=weight, bias=bias)
    return lambda: qkv.new_empty(B, H, W, C)


@operator("(Tensor grad, Tensor qkv, Tensor weight, int heads, SymInt window) -> (Tensor, Tensor, Tensor)", "cpu")
def iwsa_backward(grad, qkv, weight, heads, M):                     # -> the gradients of qkv, weight and bias
    *_, C = check(qkv, heads, M, weight=weight, grad=grad)
    return lambda: (qkv.new_empty(qkv.shape), weight.new_empty(weight.shape), weight.new_empty(C))


# ---------------------------------------------------------------------------- gradients
def gradient(name, keep, backward):
    """Register `backward`; `keep` maps the operator's inputs to the tensors and sizes that it needs."""
    def save(ctx, inputs, output):
        tensors, ctx.sizes = keep(*inputs)
        ctx.save_for_backward(*tensors)

    register_autograd(f"scalablevit::{name}", backward, setup_context=save)


def no_second_derivative(ctx, *grads):
    raise NotImplementedError("LIM and IWSA kernels have no second derivatives: use scalablevit_kernels.unfuse(model)")


gradient("window_partition", lambda qkv, heads, M: ((), (*qkv.shape[1:3], M)),
         lambda ctx, grad: (ops.window_partition_backward(grad, *ctx.sizes), None, None))
gradient("window_partition_backward", lambda grad, H, W, M: ((), (grad.shape[2], M)),
         lambda ctx, grad: (ops.window_partition(grad, *ctx.sizes), None, None, None))
gradient("window_merge_lim", lambda z, qkv, weight, bias, M: ((qkv, weight), (z.shape[1], M)),
         lambda ctx, grad: (*ops.window_merge_lim_backward(grad, *ctx.saved_tensors, *ctx.sizes), None))
gradient("iwsa", lambda qkv, weight, bias, heads, M: ((qkv, weight), (heads, M)),
         lambda ctx, grad: (*ops.iwsa_backward(grad, *ctx.saved_tensors, *ctx.sizes), None, None))
gradient("window_merge_lim_backward", lambda *inputs: ((), ()), no_second_derivative)
gradient("iwsa_backward", lambda *inputs: ((), ()), no_second_derivative)


# ---------------------------------------------------------------------------- cost, as PyTorch counts the plain code
def flop(shape, weight, backward, heads=None, M=None):              # shape (B, H, W, C); with heads, M: plus attention
    B, H, W, C = shape
    image = B, C, H, W
    unused = [None] * 4                                             # bias, stride, padding, dilation
    lim = (conv_backward_flop(image, image, weight, *unused, False, None, C, [True] * 3, out_val=(image, weight, (C,)))
           if backward else conv_flop(image, weight, *unused, False, out_val=image))
    if heads is None:
        return lim
    n, d = B * windows(H, W, M) * heads, C // heads                 # counts whole windows, but no recomputation
    return lim + (4 if backward else 2) * bmm_flop((n, M * M, d), (n, d, M * M))


for op, formula in (
        (ops.window_merge_lim, lambda z, qkv, weight, *_, out_shape, **__: flop(out_shape, weight, False)),
        (ops.window_merge_lim_backward, lambda grad, qkv, weight, *_, **__: flop(grad, weight, True)),
        (ops.iwsa, lambda qkv, weight, bias, *sizes, out_shape, **_: flop(out_shape, weight, False, *sizes)),
        (ops.iwsa_backward, lambda grad, qkv, weight, *sizes, **_: flop(grad, weight, True, *sizes))):
    register_flop_formula(op)(formula)
