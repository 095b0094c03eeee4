"""The operators torch.ops.scalablevit.*: for each a schema, checks, outputs, a kernel, a gradient.

    qkv      (B, H, W, 3C)                  Q, K and V of every token
    windows  (3, B·windows, heads, M², d)   the same in M x M windows, zeros beyond the map
    z        (B·windows, heads, M², d)      attention's output; d = C / heads
    weight   (C, 1, k, k), bias (C)         LIM's; may be float32 with 16-bit qkv, as under autocast

One function for each operator checks the inputs and returns empty outputs.  The kernel (ops.cpp)
fills them; torch.compile and torch.export call only the function, as the fake implementation.
"""
import torch
from torch import _check as require
from torch.autograd import forward_ad
from torch.library import Library, impl, register_autograd, register_fake

from . import _C

LIBRARY = Library("scalablevit", "DEF")
UNFUSE = "call scalablevit_kernels.unfuse(model) first"


def no_second_derivative(ctx, *grads):
    raise NotImplementedError(f"the kernels have no second derivatives: {UNFUSE}")


def define(schema, empty_outputs, gradients=no_second_derivative, save=None, devices=_C.devices):
    """Define an operator.  `empty_outputs` checks its arguments, the kernel fills the outputs."""
    LIBRARY.define(schema)
    name = schema.partition("(")[0]
    kernel = getattr(_C, name)

    def run(*args):
        require(forward_ad._current_level < 0, lambda: f"{name} has no forward mode: {UNFUSE}")
        outputs = empty_outputs(*args)
        kernel(*args, *(outputs if isinstance(outputs, tuple) else [outputs]))
        return outputs

    def refuse(*args):
        raise RuntimeError(f"{name} has no torch.func transforms: {UNFUSE}")

    impl(f"scalablevit::{name}", devices, run)
    register_fake(f"scalablevit::{name}", empty_outputs)
    register_autograd(f"scalablevit::{name}", gradients, setup_context=save)
    LIBRARY.impl(name, refuse, "FuncTorchDynamicLayerFrontMode")    # where torch.func intercepts


# ---------------------------------------------------------- checks
def windows_in(H, W, M):
    return -(-H // M) * -(-W // M)


def check_qkv(qkv, heads, M):
    """Returns B, H, W, C.  All checks raise RuntimeError with what was given and is accepted."""
    require(qkv.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16),
            lambda: f"expected float32, float64, bfloat16 or float16, got {qkv.dtype}")
    require(qkv.ndim == 4, lambda: f"qkv must have shape (B, H, W, 3C), got {tuple(qkv.shape)}")
    B, H, W, channels = qkv.shape
    require(0 < H < 2 ** 31 and 0 < W < 2 ** 31,
            lambda: f"H and W must be at least 1 and below 2^31, got {H} x {W}")
    require(heads >= 1 and channels > 0 and channels % (3 * heads) == 0,
            lambda: f"qkv must have 3·heads·d channels, got {channels} channels and heads={heads}")
    require(0 < M < 2 ** 15 and M * channels < 2 ** 29,     # 32-bit offsets within a window's row
            lambda: f"window must be in 1 .. 2^15 - 1, and window · 3C below 2^29, "
                    f"got {M} with 3C = {channels}")
    return B, H, W, channels // 3


def check_tensor(name, tensor, shape, dtypes, device):
    require(tensor.ndim == len(shape) and all(n == m for n, m in zip(tensor.shape, shape)),
            lambda: f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    require(tensor.dtype in dtypes and tensor.device == device,
            lambda: f"{name} must have dtype {' or '.join(map(str, dtypes))} and be on {device}, "
                    f"got {tensor.dtype} on {tensor.device}")


def check_lim(qkv, heads, M, weight):
    """Check qkv and LIM's weight.  Returns B, H, W, C."""
    B, H, W, C = check_qkv(qkv, heads, M)
    k = weight.shape[-1] if weight.ndim else 0
    sixteen_bits = qkv.dtype in (torch.bfloat16, torch.float16)
    dtypes = [qkv.dtype, torch.float32] if sixteen_bits else [qkv.dtype]
    check_tensor("weight", weight, (C, 1, k, k), dtypes, qkv.device)
    require(k == 3 or k % 2 == 1 and qkv.device.type != "cuda",
            lambda: f"weight must have shape (C, 1, k, k), k odd, on a GPU 3, got k={k}")
    return B, H, W, C


# ---------------------------------------------------------- window_partition: qkv -> windows
def empty_windows(qkv, heads, M):
    B, H, W, C = check_qkv(qkv, heads, M)
    return qkv.new_empty(3, B * windows_in(H, W, M), heads, M * M, C // heads)


def empty_map(grad, H, W, M):
    fits = grad.ndim == 5 and grad.shape[0] == 3 and grad.shape[3] == M * M and min(H, W, M) > 0
    require(fits and max(H, W) < 2 ** 31 and grad.shape[1] % windows_in(H, W, M) == 0,
            lambda: f"grad must have shape (3, B·windows, heads, M², d), with H and W in 1 .. 2^31 "
                    f"- 1 and window at least 1, got {tuple(grad.shape)} with {H=}, {W=}, window={M}")
    _, n, heads, _, d = grad.shape
    shape = (n // windows_in(H, W, M), H, W, 3 * heads * d)
    check_qkv(torch.empty(shape, dtype=grad.dtype, device="meta"), heads, M)
    return grad.new_empty(shape)


def save_for_partition(ctx, inputs, output):
    qkv, _, M = inputs
    ctx.sizes = (*qkv.shape[1:3], M)


def partition_gradients(ctx, grad):
    return torch.ops.scalablevit.window_partition_backward(grad, *ctx.sizes), None, None


define("window_partition(Tensor qkv, int heads, SymInt window) -> Tensor",
       empty_windows, partition_gradients, save_for_partition)
define("window_partition_backward(Tensor grad, SymInt H, SymInt W, SymInt window) -> Tensor",
       empty_map)


# ---------------------------------------------------------- iwsa, on a CPU: qkv -> Z + F(V)
def empty_iwsa(qkv, weight, bias, heads, M):
    B, H, W, C = check_lim(qkv, heads, M, weight)
    check_tensor("bias", bias, (C,), [weight.dtype], qkv.device)
    return qkv.new_empty(B, H, W, C)


def empty_iwsa_gradients(grad, qkv, weight, heads, M):
    B, H, W, C = check_lim(qkv, heads, M, weight)
    check_tensor("grad", grad, (B, H, W, C), [qkv.dtype], qkv.device)
    return qkv.new_empty(qkv.shape), weight.new_empty(weight.shape), weight.new_empty(C)


def save_for_iwsa(ctx, inputs, output):
    qkv, weight, _, *ctx.sizes = inputs                             # sizes: heads, M
    ctx.save_for_backward(qkv, weight)


def iwsa_gradients(ctx, grad):
    return *torch.ops.scalablevit.iwsa_backward(grad, *ctx.saved_tensors, *ctx.sizes), None, None


define("iwsa(Tensor qkv, Tensor weight, Tensor bias, int heads, SymInt window) -> Tensor",
       empty_iwsa, iwsa_gradients, save_for_iwsa, devices="cpu")
define("iwsa_backward(Tensor grad, Tensor qkv, Tensor weight, int heads, SymInt window)"
       " -> (Tensor, Tensor, Tensor)", empty_iwsa_gradients, devices="cpu")


# ---------------------------------------------------------- window_merge_lim: z, qkv -> Z + F(V)
def empty_merged(z, qkv, weight, bias, M):
    require(z.ndim == 4,
            lambda: f"z must have shape (B·windows, heads, M², d), got {tuple(z.shape)}")
    heads = z.shape[1]
    out = empty_iwsa(qkv, weight, bias, heads, M)
    B, H, W, C = out.shape
    shape = (B * windows_in(H, W, M), heads, M * M, C // heads)
    check_tensor("z", z, shape, [qkv.dtype], qkv.device)
    return out


def empty_merge_gradients(grad, qkv, weight, heads, M):
    others = empty_iwsa_gradients(grad, qkv, weight, heads, M)
    B, H, W, C = grad.shape
    return qkv.new_empty(B * windows_in(H, W, M), heads, M * M, C // heads), *others


def save_for_merge(ctx, inputs, output):
    z, qkv, weight, _, M = inputs
    ctx.save_for_backward(qkv, weight)
    ctx.sizes = (z.shape[1], M)


def merge_gradients(ctx, grad):
    backward = torch.ops.scalablevit.window_merge_lim_backward
    return *backward(grad, *ctx.saved_tensors, *ctx.sizes), None


define("window_merge_lim(Tensor z, Tensor qkv, Tensor weight, Tensor bias, SymInt window)"
       " -> Tensor", empty_merged, merge_gradients, save_for_merge)
define("window_merge_lim_backward(Tensor grad, Tensor qkv, Tensor weight, int heads, SymInt window)"
       " -> (Tensor, Tensor, Tensor, Tensor)", empty_merge_gradients)
