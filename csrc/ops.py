"""The operators torch.ops.scalablevit.*: all that PyTorch has to know of them besides the kernels (ops.cpp).

Each is a schema, a check of what comes in, a kernel, the shapes that go out (for torch.compile and torch.export), a
gradient and a cost.  What they compute is in scalablevit.py, in plain PyTorch.
"""
import torch
from torch import _check as check
from torch.library import Library, impl, register_autograd, register_fake
from torch.utils.flop_counter import bmm_flop, conv_backward_flop, conv_flop, register_flop_formula

from . import _C

LIBRARY = Library("scalablevit", "DEF")
ops = torch.ops.scalablevit


def operator(schema, devices=_C.devices):
    """Defines the operator whose arguments the decorated function checks; it returns a function that makes what goes out.

    The check is the same whether a kernel runs or shapes are foretold.
    """
    def define(check_arguments):
        name = f"scalablevit::{check_arguments.__name__}"
        kernel = getattr(_C, check_arguments.__name__)
        LIBRARY.define(check_arguments.__name__ + schema)

        def run(*args):
            check_arguments(*args)
            return kernel(*args)

        impl(name, devices, run)
        register_fake(name, lambda *args: check_arguments(*args)())
        return check_arguments
    return define


# ---------------------------------------------------------------------------- what comes in
def check_map(H, W, heads, channels, M):
    check(0 < H < 2 ** 31 and 0 < W < 2 ** 31,
          lambda: f"the map must have at least one row and one column, and fewer than 2^31 of each, got {H} x {W}")
    check(heads >= 1 and channels > 0 and channels % (3 * heads) == 0,
          lambda: f"qkv must have 3·heads·d channels, got {channels} channels and heads={heads}")
    check(0 < M < 2 ** 15 and M * channels < 2 ** 29,       # within a window's row the kernels count in 32 bits
          lambda: f"window must be in 1 .. 2^15 - 1, and window · 3C below 2^29, got {M} with 3C = {channels}")


def check_qkv(qkv, heads, M):
    check_dtype(qkv)
    check(qkv.ndim == 4, lambda: f"qkv must have shape (B, H, W, 3C), got {tuple(qkv.shape)}")
    check_map(*qkv.shape[1:3], heads, qkv.shape[3], M)


def check_dtype(tensor):
    check(tensor.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16),
          lambda: f"expected float32, float64, bfloat16 or float16, got {tensor.dtype}")


def check_like(name, tensor, shape, other_name, other):
    check(tensor.ndim == len(shape) and all(n == m for n, m in zip(tensor.shape, shape)),
          lambda: f"{name} must have shape {tuple(shape)} to fit {other_name}, got {tuple(tensor.shape)}")
    check(tensor.dtype == other.dtype and tensor.device == other.device,
          lambda: f"{name} must have the dtype and be on the device of {other_name}, {other.dtype} on {other.device}, "
                  f"got {tensor.dtype} on {tensor.device}")


def check_weight(weight, qkv):
    C, k, sums = qkv.shape[3] // 3, weight.shape[-1], torch.promote_types(qkv.dtype, torch.float32)
    check(k % 2 == 1, lambda: f"weight must have shape (C, 1, k, k), k odd, got {tuple(weight.shape)}")
    check(weight.dtype in (qkv.dtype, sums),
          lambda: f"weight must be {sums} or {qkv.dtype} where qkv is {qkv.dtype}, got {weight.dtype}")
    check_like("weight", weight, (C, 1, k, k), "qkv", qkv.new_empty(0, dtype=weight.dtype))


def windows(H, W, M):
    return -(-H // M) * -(-W // M)


# ---------------------------------------------------------------------------- window partition
@operator("(Tensor qkv, int heads, SymInt window) -> Tensor")
def window_partition(qkv, heads, M):
    """(B, H, W, 3C) -> (3, B·windows, heads, M², d)"""
    check_qkv(qkv, heads, M)
    B, H, W, channels = qkv.shape
    return lambda: qkv.new_empty(3, B * windows(H, W, M), heads, M * M, channels // (3 * heads))


@operator("(Tensor grad, SymInt H, SymInt W, SymInt window) -> Tensor")
def window_partition_backward(grad, H, W, M):
    check_dtype(grad)
    check(grad.ndim == 5, lambda: f"grad must have shape (3, B·windows, heads, M², d), got {tuple(grad.shape)}")
    third, n, heads, tokens, d = grad.shape
    check_map(H, W, heads, 3 * heads * d, M)
    check(third == 3 and tokens == M * M and n % windows(H, W, M) == 0,
          lambda: f"grad must have shape (3, B·windows, heads, M², d) to fit a map of {H} x {W} and window={M}, "
                  f"got {tuple(grad.shape)}")
    return lambda: grad.new_empty(n // windows(H, W, M), H, W, 3 * heads * d)


def keep_partition(ctx, inputs, output):
    ctx.H, ctx.W, ctx.heads, ctx.M = *inputs[0].shape[1:3], *inputs[1:]


def keep_partition_backward(ctx, inputs, output):
    ctx.heads, ctx.M = inputs[0].shape[2], inputs[3]


register_autograd(
    "scalablevit::window_partition", lambda ctx, grad: (ops.window_partition_backward(grad, ctx.H, ctx.W, ctx.M), None, None),
    setup_context=keep_partition)
register_autograd(
    "scalablevit::window_partition_backward", lambda ctx, grad: (ops.window_partition(grad, ctx.heads, ctx.M), None, None, None),
    setup_context=keep_partition_backward)


# ---------------------------------------------------------------------------- window merge + LIM
@operator("(Tensor z, Tensor qkv, Tensor weight, Tensor bias, SymInt window) -> Tensor")
def window_merge_lim(z, qkv, weight, bias, M):
    """z (B·windows, heads, M², d), V in qkv (B, H, W, 3C), F's weight (C, 1, k, k) and bias (C) -> Z + F(V), (B, H, W, C)"""
    check(z.ndim == 4, lambda: f"z must have shape (B·windows, heads, M², d), got {tuple(z.shape)}")
    check_qkv(qkv, z.shape[1], M)
    B, H, W, channels = qkv.shape
    check_like("z", z, (B * windows(H, W, M), z.shape[1], M * M, channels // (3 * z.shape[1])), "qkv", qkv)
    check_weight(weight, qkv)
    check_like("bias", bias, (channels // 3,), "weight", weight)
    return lambda: qkv.new_empty(B, H, W, channels // 3)


@operator("(Tensor grad, Tensor qkv, Tensor weight, int heads, SymInt window) -> (Tensor, Tensor, Tensor, Tensor)")
def window_merge_lim_backward(grad, qkv, weight, heads, M):
    check_qkv(qkv, heads, M)
    check_weight(weight, qkv)
    B, H, W, channels = qkv.shape
    check_like("grad", grad, (B, H, W, channels // 3), "qkv", qkv)
    return lambda: (grad.new_empty(B * windows(H, W, M), heads, M * M, channels // (3 * heads)),
                    qkv.new_empty(qkv.shape), weight.new_empty(weight.shape), weight.new_empty(channels // 3))


# ---------------------------------------------------------------------------- IWSA in one pass
@operator("(Tensor qkv, Tensor weight, Tensor bias, int heads, SymInt window) -> Tensor", devices="cpu")
def iwsa(qkv, weight, bias, heads, M):
    """All that lies between IWSA's two linear layers: (B, H, W, 3C) -> (B, H, W, C)"""
    check_qkv(qkv, heads, M)
    check_weight(weight, qkv)
    B, H, W, channels = qkv.shape
    check_like("bias", bias, (channels // 3,), "weight", weight)
    return lambda: qkv.new_empty(B, H, W, channels // 3)


@operator("(Tensor grad, Tensor qkv, Tensor weight, int heads, SymInt window) -> (Tensor, Tensor, Tensor)", devices="cpu")
def iwsa_backward(grad, qkv, weight, heads, M):
    check_qkv(qkv, heads, M)
    check_weight(weight, qkv)
    check_like("grad", grad, (*qkv.shape[:3], qkv.shape[3] // 3), "qkv", qkv)
    return lambda: (qkv.new_empty(qkv.shape), weight.new_empty(weight.shape), weight.new_empty(qkv.shape[3] // 3))


# ---------------------------------------------------------------------------- gradients of the last two
def keep_merge_lim(ctx, inputs, output):
    z, qkv, weight, _, ctx.M = inputs
    ctx.heads = z.shape[1]
    ctx.save_for_backward(qkv, weight)


def keep_iwsa(ctx, inputs, output):
    qkv, weight, _, ctx.heads, ctx.M = inputs
    ctx.save_for_backward(qkv, weight)


def no_second_derivative(ctx, *grads):
    raise NotImplementedError("the kernels have no second derivative of LIM or IWSA: scalablevit_kernels.unfuse(model)")


register_autograd(
    "scalablevit::window_merge_lim", lambda ctx, grad: (*ops.window_merge_lim_backward(grad, *ctx.saved_tensors, ctx.heads, ctx.M), None),
    setup_context=keep_merge_lim)
register_autograd(
    "scalablevit::iwsa", lambda ctx, grad: (*ops.iwsa_backward(grad, *ctx.saved_tensors, ctx.heads, ctx.M), None, None),
    setup_context=keep_iwsa)
register_autograd("scalablevit::window_merge_lim_backward", no_second_derivative)
register_autograd("scalablevit::iwsa_backward", no_second_derivative)


# ---------------------------------------------------------------------------- cost, as FlopCounterMode has it of the plain form
def lim_flop(grad, weight):                                         # grad: a shape (B, H, W, C)
    image = (grad[0], grad[3], *grad[1:3])
    return conv_flop(image, weight, None, None, None, None, False, out_val=image)


def lim_backward_flop(grad, weight):
    image = (grad[0], grad[3], *grad[1:3])
    return conv_backward_flop(image, image, weight, None, None, None, None, False, None, grad[3], (True, True, True),
                              out_val=(image, weight, (grad[3],)))


def product_flop(grad, heads, M):                                   # of Q K^T, or of A V: whole windows, padding and all
    n, d = grad[0] * windows(*grad[1:3], M) * heads, grad[3] // heads
    return bmm_flop((n, M * M, d), (n, d, M * M))


@register_flop_formula(ops.window_merge_lim)
def _(z, qkv, weight, bias, M, out_shape, **_):
    return lim_flop(out_shape, weight)


@register_flop_formula(ops.window_merge_lim_backward)
def _(grad, qkv, weight, heads, M, out_shape, **_):
    return lim_backward_flop(grad, weight)


@register_flop_formula(ops.iwsa)
def _(qkv, weight, bias, heads, M, out_shape, **_):
    return 2 * product_flop(out_shape, heads, M) + lim_flop(out_shape, weight)


@register_flop_formula(ops.iwsa_backward)                           # what is computed again is not counted again
def _(grad, qkv, weight, heads, M, out_shape, **_):
    return 4 * product_flop(grad, heads, M) + lim_backward_flop(grad, weight)
