"""The operators torch.ops.scalablevit.*: what PyTorch has to know of them besides the kernels.

Shapes without data (torch.compile, torch.export) and cost (FlopCounterMode).  The schemas, the gradients and the kernels
are in C++, in this folder; what they compute, in plain PyTorch, is in scalablevit.py.
"""
import torch
from torch.library import register_fake
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


@register_flop_formula(ops.window_merge_lim)                   # what PyTorch counts for the convolution in LIM
def _(z, qkv, weight, bias, M, out_shape, **_):
    B, H, W, C = out_shape
    return conv_flop((B, C, H, W), weight, None, None, None, None, False, out_val=(B, C, H, W))


@register_flop_formula(ops.window_merge_lim_backward)
def _(grad, qkv, weight, heads, M, out_shape, **_):
    B, H, W, C = grad
    return conv_backward_flop((B, C, H, W), (B, C, H, W), weight, None, None, None, None, False, None, C,
                              (True, True, True), out_val=((B, C, H, W), weight, (C,)))
