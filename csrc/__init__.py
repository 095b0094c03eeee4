"""The operators torch.ops.scalablevit.*: what PyTorch has to know of them besides the kernels.

Shapes without data (torch.compile, torch.export) and cost (FlopCounterMode).  The schemas, the gradients and the kernels
are in C++, in this folder; what they compute, in plain PyTorch, is in scalablevit.py.
"""
import torch
from torch.library import register_fake
from torch.utils.flop_counter import bmm_flop, conv_backward_flop, conv_flop, register_flop_formula

from ._C import devices  # the types of device that there are kernels for

ops = torch.ops.scalablevit


def check_devices(*tensors):
    """One that is on the meta device by mistake would bring all of a call here."""
    torch._check(len({t.device for t in tensors}) == 1, lambda: "tensors must be on one device, got "
                 + ", ".join(str(t.device) for t in tensors))


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
    check_devices(z, qkv, weight, bias)
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)


@register_fake("scalablevit::window_merge_lim_backward")
def _(grad, qkv, weight, heads, M):
    check_devices(grad, qkv, weight)
    B, H, W, C = grad.shape
    dz = grad.new_empty(B * -(-H // M) * -(-W // M), heads, M * M, C // heads)
    return dz, qkv.new_empty(qkv.shape), torch.empty_like(weight), weight.new_empty(C)


@register_fake("scalablevit::iwsa")
def _(qkv, weight, bias, heads, M):
    check_devices(qkv, weight, bias)
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)


@register_fake("scalablevit::iwsa_backward")
def _(grad, qkv, weight, heads, M):
    check_devices(grad, qkv, weight)
    return qkv.new_empty(qkv.shape), torch.empty_like(weight), weight.new_empty(grad.shape[3])


@register_fake("scalablevit::ssa")
def _(q, k, v, heads, scale):
    check_devices(q, k, v)
    return q.new_empty(*q.shape[:2], v.shape[2])


@register_fake("scalablevit::ssa_backward")
def _(grad, q, k, v, heads, scale):
    check_devices(grad, q, k, v)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def lim_flop(B, H, W, C, weight):                              # what PyTorch counts for the convolution in LIM
    return conv_flop((B, C, H, W), weight, None, None, None, None, False, out_val=(B, C, H, W))


def lim_backward_flop(B, H, W, C, weight):
    return conv_backward_flop((B, C, H, W), (B, C, H, W), weight, None, None, None, None, False, None, C,
                              (True, True, True), out_val=((B, C, H, W), weight, (C,)))


def product_flop(B, H, W, C, heads, M):                        # of Q K^T or of A V, over padded windows as the plain form
    windows = B * -(-H // M) * -(-W // M)
    return bmm_flop((windows * heads, M * M, C // heads), (windows * heads, C // heads, M * M))


@register_flop_formula(ops.window_merge_lim)
def _(z, qkv, weight, bias, M, out_shape, **_):
    return lim_flop(*out_shape, weight)


@register_flop_formula(ops.window_merge_lim_backward)
def _(grad, qkv, weight, heads, M, out_shape, **_):
    return lim_backward_flop(*grad, weight)


@register_flop_formula(ops.iwsa)
def _(qkv, weight, bias, heads, M, out_shape, **_):
    return 2 * product_flop(*out_shape, heads, M) + lim_flop(*out_shape, weight)


@register_flop_formula(ops.iwsa_backward)                      # two products for each, and not what is computed again
def _(grad, qkv, weight, heads, M, out_shape, **_):
    return 4 * product_flop(*grad, heads, M) + lim_backward_flop(*grad, weight)


def ssa_flop(q, k, v):                                         # of both products
    B, N, C = q
    return bmm_flop((B, N, C), (B, C, k[1])) + bmm_flop((B, N, v[1]), (B, v[1], v[2]))


@register_flop_formula(ops.ssa)
def _(q, k, v, heads, scale, out_shape, **_):
    return ssa_flop(q, k, v)


@register_flop_formula(ops.ssa_backward)
def _(grad, q, k, v, heads, scale, out_shape, **_):
    return 2 * ssa_flop(q, k, v)
