"""Fused C++/CUDA kernels for ScalableViT, used only where `fuse` is called:

    from scalablevit_kernels import fuse, unfuse
    model = fuse(scalablevit_s())       # same parameters, same state dict; on a CPU IWSA is one pass over memory

scalablevit.py does not depend on this package: `fuse` switches layers to subclasses that override `forward`.
"""
import contextlib
import copy
import itertools

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

from scalablevit import IWSA, PEG, SSA

from . import ops  # noqa: F401  (defines torch.ops.scalablevit)
from ._C import devices  # "cpu", and "cuda" if it was built

LINEAR = torch.ops.mkldnn._linear_pointwise         # oneDNN's linear layer with an optional activation; inference only
if LINEAR not in flop_registry:
    register_flop_formula(LINEAR)(lambda x, weight, *_, **__: 2 * x.numel() * weight[0])


def hooks_of(layer):
    return layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks


def is_bare(layer):                                 # calling it runs the forward of its class and nothing else
    return not any(hooks_of(layer)) and "forward" not in vars(layer)


def is_plain_lim(lim):
    """Whether LIM is a depthwise convolution as built by `scalablevit.depthwise`, without hooks or other changes."""
    if type(lim) is not nn.Conv2d or not is_bare(lim) or lim.bias is None:
        return False
    k, C = lim.kernel_size[0], lim.in_channels
    own = (lim.kernel_size, lim.padding, lim.stride, lim.dilation, lim.padding_mode, lim.groups, lim.out_channels)
    return k % 2 == 1 and own == ((k, k), (k // 2, k // 2), (1, 1), (1, 1), "zeros", C, C)


class FusedIWSA(IWSA):
    """IWSA with equations (4) and (5) in one operator on a CPU, and in two around PyTorch's attention on a GPU."""

    def forward(self, x):
        if x.device.type not in devices or "attend" in vars(self) or not is_plain_lim(self.lim):
            return super().forward(x)
        scalablevit, lim, qkv = torch.ops.scalablevit, self.lim, self.qkv(x)            # (B, H, W, 3C)
        H, W = qkv.shape[1:3]
        M = min(self.window, max(H, W))
        if x.device.type == "cpu":
            return self.proj(scalablevit.iwsa(qkv, lim.weight, lim.bias, self.heads, M))
        q, k, v = scalablevit.window_partition(qkv, self.heads, M)                      # (B·windows, heads, M², d)
        real = None
        if H % M or W % M:                                                              # (B·windows, 1, 1, M²)
            real = scalablevit.window_partition(torch.ones_like(qkv[..., :3]), 1, M)[0].transpose(-2, -1) > 0
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=real)
        return self.proj(scalablevit.window_merge_lim(z, qkv, lim.weight, lim.bias, M))


def takes_onednn(x, layer):                         # whether oneDNN's linear layer can be used: inference on a CPU
    return (x.device.type == "cpu" and x.dtype == layer.weight.dtype in (torch.float32, torch.bfloat16)
            and x.shape[-1] == layer.in_features
            and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
                     or torch.jit.is_tracing()))


class FusedLinear(nn.Linear):                       # computed by oneDNN
    def forward(self, x):
        return LINEAR(x, self.weight, self.bias, "none", [], "none") if takes_onednn(x, self) else super().forward(x)


class FusedMLP(nn.Sequential):                      # fc1, GELU, fc2: oneDNN fuses the GELU into fc1
    def forward(self, x):
        plain = [type(layer) for layer in self] == [FusedLinear, nn.GELU, FusedLinear] and self[1].approximate == "none"
        if not (plain and is_bare(self[0]) and is_bare(self[1]) and takes_onednn(x, self[0])):
            return super().forward(x)
        return self[2](LINEAR(x, self[0].weight, self[0].bias, "gelu", [], "none"))


class FusedDepthwise(nn.Conv2d):    # float32 even under autocast on a CPU: the bfloat16 backward takes 10x as long
    def forward(self, x):
        if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.to(self.weight.dtype))


def computes_the_same(layer):
    """Whether the kernels give the same outputs and gradients as this IWSA, whose code or submodules may have been
    edited.  Tested in float64 with random weights, in train and eval mode, on maps larger and smaller than a window."""
    generator, M = torch.Generator().manual_seed(0), min(layer.window, 7)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    def results(cls):
        layer.__class__, seen = cls, []
        for mode, x in itertools.product((True, False), maps):
            out = layer.train(mode)(x)
            seen += [out, *torch.autograd.grad(out.square().sum(), [x, *parameters], materialize_grads=True)]
        return seen

    with (contextlib.suppress(Exception), torch.inference_mode(False), torch.enable_grad(),
          torch.autocast("cpu", enabled=False), torch.random.fork_rng([])):     # any exception means: not the same
        layer = copy.deepcopy(layer).to("cpu", torch.float64)
        for hooks in [hooks for module in layer.modules() for hooks in hooks_of(module)]:
            hooks.clear()                                           # the user's hooks must not see this test
        parameters = [*layer.requires_grad_().parameters()]
        for p in parameters:
            p.data = random(*p.shape).detach() / p.shape[1:].numel() ** 0.5
        maps = [random(2, H, W, layer.proj.in_features)
                for H, W in ((M + 2, 2 * M + 1), (max(M - 2, 1), M + 3), (max(M - 1, 1), max(M - 2, 1)))]
        return all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(results(IWSA), results(FusedIWSA)))
    return False


def fuse(model):
    """Switch `model` to the kernels, in place.  Prints which IWSA layers are not fused, and why."""
    skipped = []
    for name, layer in model.named_modules():
        if type(layer) is nn.Linear:
            layer.__class__ = FusedLinear
        elif type(layer) is nn.Sequential and [type(own) for own in layer] == [nn.Linear, nn.GELU, nn.Linear]:
            layer.__class__ = FusedMLP
        elif type(layer) in (SSA, PEG):
            for conv in layer.modules():
                if type(conv) is nn.Conv2d and conv.groups == conv.in_channels:
                    conv.__class__ = FusedDepthwise
        elif any(cls.__name__ == "IWSA" for cls in type(layer).__mro__) and type(layer) is not FusedIWSA:
            if type(layer) is not IWSA:
                skipped.append(f"{name} ({type(layer).__module__}.{type(layer).__name__} is not scalablevit.IWSA)")
            elif not is_plain_lim(getattr(layer, "lim", None)):
                skipped.append(f"{name} (its LIM is not a plain depthwise convolution)")
            elif {"attend", "forward"} & {*vars(layer)} or not computes_the_same(layer):
                skipped.append(f"{name} (it does not compute what the kernels compute)")
            else:
                layer.__class__ = FusedIWSA
    if skipped:
        print(f"not fused: {', '.join(skipped)}")
    return model


def unfuse(model):
    """Undo `fuse`, in place."""
    for layer in model.modules():
        if type(layer) in (FusedIWSA, FusedLinear, FusedMLP, FusedDepthwise):
            layer.__class__ = type(layer).__base__
    return model
