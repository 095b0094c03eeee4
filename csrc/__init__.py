"""Kernels for ScalableViT, asked for by name:

    from scalablevit_kernels import fuse
    model = fuse(scalablevit_s())       # the same parameters, the same state dict; IWSA runs in one pass over memory
    model = unfuse(model)               # as it was

scalablevit.py knows nothing of this package.  `fuse` gives a layer a subclass of its class that overrides `forward`, and
does so only where the layer computes what the kernels compute.
"""
import copy

import torch
import torch.nn.functional as F
from torch import nn

from scalablevit import IWSA

from . import ops  # noqa: F401  (registers torch.ops.scalablevit)
from ._C import devices  # the types of device that there are kernels for


def is_plain_lim(lim):
    """Whether LIM is a depthwise convolution as `scalablevit.depthwise` makes it, with nothing attached to it."""
    hooks = type(lim) is nn.Conv2d and (lim._forward_hooks or lim._forward_pre_hooks or lim._backward_hooks or
                                        lim._backward_pre_hooks or "forward" in vars(lim))
    return (type(lim) is nn.Conv2d and not hooks and lim.bias is not None and lim.padding_mode == "zeros"
            and lim.stride == lim.dilation == (1, 1) and lim.kernel_size[0] % 2 == 1
            and lim.padding == (lim.kernel_size[0] // 2,) * 2 and lim.kernel_size[0] == lim.kernel_size[1]
            and lim.groups == lim.in_channels == lim.out_channels)


class FusedIWSA(IWSA):
    """IWSA whose two equations, (4) and (5), are one operator on a CPU; on a GPU two, around PyTorch's attention."""

    def forward(self, x):
        if x.device.type not in devices or not is_plain_lim(self.lim):
            return super().forward(x)
        qkv, lim = self.qkv(x), self.lim                                                # (B, H, W, 3C)
        H, W = qkv.shape[1:3]
        M = min(self.window, max(H, W))
        if x.device.type == "cpu":
            return self.proj(torch.ops.scalablevit.iwsa(qkv, lim.weight, lim.bias, self.heads, M))
        q, k, v = torch.ops.scalablevit.window_partition(qkv, self.heads, M)            # (B·windows, heads, M², d) each
        real = None
        if H % M or W % M:                                                              # (B·windows, 1, 1, M²)
            real = torch.ops.scalablevit.window_partition(torch.ones_like(qkv[..., :3]), 1, M)[0].transpose(-2, -1) > 0
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=real)
        return self.proj(torch.ops.scalablevit.window_merge_lim(z, qkv, lim.weight, lim.bias, M))


class FusedLinear(nn.Linear):
    """A linear layer; for many tokens on a CPU the 1x1 convolution that it is, which is faster there.

    PyTorch gives convolutions to oneDNN, which rearranges the weight in every call: that pays from some tokens on.
    """

    def forward(self, x):
        many = x.ndim == 4 and x.device.type == "cpu" and (
            torch.compiler.is_compiling() or x.shape[:3].numel() >= self.in_features + self.out_features)
        if not many or x.dtype not in (torch.float32, torch.bfloat16):
            return super().forward(x)
        return F.conv2d(x.permute(0, 3, 1, 2), self.weight[:, :, None, None], self.bias).permute(0, 2, 3, 1)


def computes_the_same(layer):
    """Whether the kernels compute what the layer does, whose text or parts a reader may have changed.

    Both are tried on a small map of several windows, cut ones among them, in float64 on a CPU, with random weights and in
    both modes; gradients too.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    layer = copy.deepcopy(layer).to("cpu", torch.float64)
    for module in layer.modules():
        module._forward_hooks.clear(), module._forward_pre_hooks.clear()                # a probe is not for them to see
        module._backward_hooks.clear(), module._backward_pre_hooks.clear()
    for p in layer.parameters():
        p.data = random(*p.shape) / max(p[0].numel(), 1) ** 0.5
        p.requires_grad_()
    M = min(layer.window, 7)
    x = random(2, M + 2, 2 * M + 1, layer.proj.in_features).requires_grad_()

    def results(cls):
        layer.__class__, seen = cls, []
        for mode in (True, False):
            out = layer.train(mode)(x)
            seen += [out, *torch.autograd.grad(out, [x, *layer.parameters()], torch.ones_like(out) + out.detach())]
        return seen

    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False), torch.random.fork_rng([]):
        return all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(results(type(layer)), results(FusedIWSA)))


def fuse(model):
    """Let `model` run on the kernels, in place.  What is left alone is said in one line, with the reason."""
    alone = {}
    for name, layer in model.named_modules():
        if type(layer) is nn.Linear:
            layer.__class__ = FusedLinear
        if not any(cls.__name__ == "IWSA" for cls in type(layer).__mro__) or type(layer) is FusedIWSA:
            continue
        if type(layer) is not IWSA:
            alone.setdefault(f"a {type(layer).__module__}.{type(layer).__name__}, not scalablevit.IWSA", []).append(name)
        elif not is_plain_lim(layer.lim):
            alone.setdefault("its LIM is no plain depthwise convolution", []).append(name)
        elif not computes_the_same(layer):
            alone.setdefault("it computes something else than the kernels do", []).append(name)
        else:
            layer.__class__ = FusedIWSA
    if alone:
        print("fuse left alone: " + "; ".join(f"{', '.join(names)} ({reason})" for reason, names in alone.items()))
    return model


def unfuse(model):
    """Undo `fuse`, in place."""
    for layer in model.modules():
        if type(layer) in (FusedIWSA, FusedLinear):
            layer.__class__ = type(layer).__base__
    return model
