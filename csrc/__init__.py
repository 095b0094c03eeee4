"""The operators torch.ops.scalablevit.*: what PyTorch has to know of them besides the kernels.

Shapes without data (torch.compile, torch.export), gradients (autograd), and cost (FlopCounterMode).
The schemas and the kernels are in C++, in this folder; what they compute, in plain PyTorch, is in scalablevit.py.
"""
import torch
from torch.library import register_autograd, register_fake
from torch.utils.flop_counter import conv_backward_flop, conv_flop, register_flop_formula

from ._C import devices  # the types of device that there are kernels for

ops = torch.ops.scalablevit


@register_fake("scalablevit::window_partition")
def _(qkv, heads, M):
    B, H, W, C = qkv.shape
    return qkv.new_empty(3, B * -(-H // M) * -(-W // M), heads, M * M, C // (3 * heads))


@register_fake("scalablevit::window_partition_backward")
def _(grad, H, W, M):
    _, windows, heads, _, d = grad.shape
    return grad.new_empty(windows // (-(-H // M) * -(-W // M)), H, W, 3 * heads * d)


@register_fake("scalablevit::window_merge_lim")
def _(z, qkv, weight, bias, M):
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)


@register_fake("scalablevit::window_merge_lim_backward")
def _(grad, qkv, weight, heads, M):
    B, H, W, C = grad.shape
    dz = grad.new_empty(B * -(-H // M) * -(-W // M), heads, M * M, C // heads)
    return dz, qkv.new_empty(qkv.shape), torch.empty_like(weight), weight.new_empty(C)


def save_partition(ctx, inputs, output):
    qkv, _, M = inputs
    ctx.args = *qkv.shape[1:3], M


def partition_backward(ctx, grad):
    return ops.window_partition_backward(grad, *ctx.args), None, None


def save_partition_backward(ctx, inputs, output):
    grad, _, _, M = inputs
    ctx.args = grad.shape[2], M


def partition_backward_backward(ctx, grad):
    return ops.window_partition(grad, *ctx.args), None, None, None


def save_merge_lim(ctx, inputs, output):
    z, qkv, weight, _, M = inputs
    ctx.save_for_backward(qkv, weight)
    ctx.args = z.shape[1], M


def merge_lim_backward(ctx, grad):
    return *ops.window_merge_lim_backward(grad, *ctx.saved_tensors, *ctx.args), None


def merge_lim_backward_backward(ctx, *grads):
    raise NotImplementedError("the kernels have no second derivative of LIM: set SCALABLEVIT_KERNELS=0")


register_autograd("scalablevit::window_partition", partition_backward, setup_context=save_partition)
register_autograd("scalablevit::window_partition_backward", partition_backward_backward,
                  setup_context=save_partition_backward)
register_autograd("scalablevit::window_merge_lim", merge_lim_backward, setup_context=save_merge_lim)
register_autograd("scalablevit::window_merge_lim_backward", merge_lim_backward_backward)


@register_flop_formula(ops.window_merge_lim)                   # what PyTorch counts for the convolution in LIM
def _(z, qkv, weight, bias, M, out_shape, **_):
    B, H, W, C = out_shape
    return conv_flop((B, C, H, W), weight, None, None, None, None, False, out_val=(B, C, H, W))


@register_flop_formula(ops.window_merge_lim_backward)
def _(grad, qkv, weight, heads, M, out_shape, **_):
    B, H, W, C = grad
    return conv_backward_flop((B, C, H, W), (B, C, H, W), weight, None, None, None, None, False, None, C,
                              (True, True, True), out_val=((B, C, H, W), weight, (C,)))
