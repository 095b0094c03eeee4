"""`fuse(model)` switches attention layers to faster subclasses that need less memory.

    FusedSSA    equation (2) by PyTorch's attention, which never writes the N x N_rn scores
    FusedIWSA   equations (4) and (5): one pass over memory on a CPU; on a GPU a kernel before
                PyTorch's attention and one after; without compiled kernels PyTorch's attention
"""
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

import scalablevit
from scalablevit import (
    IWSA, SSA, convolve, merge_heads, pad_to_multiple, split_heads, window_merge, window_partition,
)

try:
    from . import ops as _                              # defines torch.ops.scalablevit
    from ._C import devices                             # "cpu", and "cuda" if it was built
except ImportError as error:
    devices = ()
    note = Path(__file__).with_name("not_built.txt")    # written by setup.py
    WHY_NO_KERNELS = note.read_text().strip() if note.exists() else str(error)

BUILD = "pip install setuptools wheel ninja && pip install --no-build-isolation ."


# ---------------------------------------------------------------- the two layers
SCORES_AT_ONCE = 2 ** 22                                # 8 MB in 16 bits, which fit in cache


def attention(q, k, v, scale, mask=None):
    """scalablevit.attention by PyTorch's where it pays: on a GPU, and with many keys on a CPU.

    q (…, n, d), k (…, m, d), v (…, m, d_v), mask (…, 1, m).  In 16-bit inference on a CPU plain
    products are faster, for some queries at a time.  Limits are measured (docs/kernels.md).
    """
    device, d, d_v, m = q.device.type, q.shape[-1], v.shape[-1], k.shape[-2]
    sixteen_bits = q.element_size() == 2
    if device == "cpu" and sixteen_bits and not torch.is_grad_enabled():
        queries = max(1, SCORES_AT_ONCE // max(1, q.shape[:-2].numel() * m))
        z = [scalablevit.attention(q_n, k, v, scale, mask) for q_n in q.split(queries, dim=-2)]
        return torch.cat(z, dim=-2)
    many = 512 if sixteen_bits else 128
    if device == "cpu" and m < many or device not in ("cpu", "cuda"):
        return scalablevit.attention(q, k, v, scale, mask)
    if device == "cpu" and d != d_v:                    # the fast kernel needs d = d_v: add zeros
        q = F.pad(q, (0, max(d_v - d, 0)))
        k = F.pad(k, (0, max(d_v - d, 0)))
        v = F.pad(v, (0, max(d - d_v, 0)))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)[..., :d_v]


class FusedSSA(SSA):
    def forward(self, x):
        tokens = reduced = x.flatten(1, 2)                          # (B, N, C)
        if self.s > 1:
            reduced = convolve(self.reduce, pad_to_multiple(x, self.s)).flatten(1, 2)
            reduced = F.gelu(self.norm(reduced))                    # (B, N_rn, C')
        q = split_heads(self.q(tokens), self.heads)                 # Q' (B, heads, N, C'/heads)
        k = split_heads(self.k(reduced), self.heads)                # K' (B, heads, N_rn, C'/heads)
        v = split_heads(self.v(reduced), self.heads)                # V' (B, heads, N_rn, C/heads)
        z = attention(q, k, v, self.scale)                          # (2): (B, heads, N, C/heads)
        return self.proj(merge_heads(z).view_as(x))


class FusedIWSA(IWSA):
    def forward(self, x):
        device, ops = x.device.type, torch.ops.scalablevit
        fits = device == "cpu" or self.lim.kernel_size == (3, 3)    # the CUDA kernels' only size
        if device not in devices or not fits or not is_plain_lim(self.lim):
            return super().forward(x)                               # with `attend` below
        weight, bias = self.lim.weight, self.lim.bias
        qkv = self.qkv(x)                                           # (B, H, W, 3C)
        M = min(self.window, max(qkv.shape[1:3]))
        if device == "cpu":
            return self.proj(ops.iwsa(qkv, weight, bias, self.heads, M))
        q, k, v = ops.window_partition(qkv, self.heads, M)          # (B·windows, heads, M², d)
        z = F.scaled_dot_product_attention(q, k, v, real_tokens(qkv, M))
        return self.proj(ops.window_merge_lim(z, qkv, weight, bias, M))

    def attend(self, qkv, top=0, left=0):
        """WSA.attend with the `attention` above; IWSA has no padding at the top and left."""
        H, W = qkv.shape[1:3]
        M = min(self.window, max(H, W))
        qkv_n = window_partition(qkv, M).unflatten(2, (3, -1)).movedim(2, 0)
        q, k, v = split_heads(qkv_n, self.heads).contiguous()       # (B·windows, heads, M², d)
        z = attention(q, k, v, q.shape[-1] ** -0.5, real_tokens(qkv, M))
        return window_merge(merge_heads(z), H, W, M)


def real_tokens(qkv, M):
    """Which tokens of each window are on the map, (B·windows, 1, 1, M²); None if all are."""
    H, W = qkv.shape[1:3]
    if H % M == 0 and W % M == 0:
        return None
    return window_partition(torch.ones_like(qkv[..., :1]), M).transpose(-2, -1)[:, None] > 0


def is_plain_lim(lim):
    """Whether LIM is as `scalablevit.depthwise` makes it, of any odd size, and has no hooks."""
    if type(lim) is not nn.Conv2d or lim.bias is None or has_hooks(lim) or "forward" in vars(lim):
        return False
    k = lim.kernel_size[0]
    return (k % 2 == 1 and lim.kernel_size == (k, k) and lim.padding == (k // 2, k // 2)
            and lim.stride == lim.dilation == (1, 1) and lim.padding_mode == "zeros"
            and lim.groups == lim.in_channels == lim.out_channels)


def has_hooks(module):
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                or module._backward_pre_hooks or _has_any_global_hook())


# ---------------------------------------------------------------- which layers can be switched
FUSED = {IWSA: FusedIWSA, SSA: FusedSSA}
PARTS = {
    IWSA: {"qkv": nn.Linear, "proj": nn.Linear, "lim": nn.Conv2d},
    SSA: {"q": nn.Linear, "k": nn.Linear, "v": nn.Linear, "proj": nn.Linear, "norm": nn.LayerNorm,
          "reduce": nn.Sequential, "reduce.0": nn.Conv2d, "reduce.1": nn.Conv2d},
}


def why_not(layer):
    """Why this layer must stay as it is; None if it can be switched."""
    cls = type(layer)
    if cls not in FUSED:
        return f"a {cls.__module__}.{cls.__qualname__}, not scalablevit.IWSA or scalablevit.SSA"
    if _has_any_global_hook():
        return "PyTorch has global module hooks"
    for name, part in layer.named_modules():            # the layer itself has the name ""
        if name and type(part) is not PARTS[cls].get(name):
            return f"{name} is a {type(part).__module__}.{type(part).__qualname__}"
        if has_hooks(part):
            return f"{name or 'it'} has a hook"
        if {"forward", "attend"} & set(vars(part)):
            return f"{name or 'it'} has a method of its own"
    if any(p.is_meta for p in layer.parameters()):
        return "it is on the meta device: call fuse when it has weights"
    if cls is IWSA and not is_plain_lim(layer.lim):
        return "lim is not a convolution as built by scalablevit.depthwise"
    return None


# Small layers and maps to compare: few and many keys, windows cut or not, maps smaller than one.
CASES = {IWSA: [(dict(window=12), [(12, 24), (13, 20), (5, 17), (5, 4)])],
         SSA: [(dict(rc=1.25, rn=1 / 4), [(24, 23), (3, 5)]), (dict(rc=1.25), [(12, 11), (3, 5)])]}


def why_edited(cls):
    """Why an edited file forbids to switch this class; None if it computes what FUSED[cls] does."""
    try:                                # on a CPU with gradients, whatever the caller's modes
        with (torch.device("cpu"), torch.inference_mode(False), torch.enable_grad(),
              torch.autocast("cpu", enabled=False), torch.random.fork_rng([])):
            for kwargs, sizes in CASES[cls]:
                layer = cls(8, 2, **kwargs).double()
                for H, W in sizes:
                    x = torch.randn(2, H, W, 8, dtype=torch.float64, requires_grad=True)
                    for a, b in zip(results(layer, cls, x), results(layer, FUSED[cls], x)):
                        if not torch.allclose(a, b, rtol=1e-9, atol=1e-9):
                            return "it does not compute what its fused form computes"
    except Exception as error:
        message = f"comparing it with its fused form raised {type(error).__name__}: {error}"
        return message.splitlines()[0]
    return None


def results(layer, cls, x):
    """Outputs and gradients of a layer as one of class cls, in train and eval mode."""
    layer.__class__ = cls
    together = []
    for training in (True, False):
        out = layer.train(training)(x)
        inputs = [x, *layer.parameters()]
        together += [out, *torch.autograd.grad(out.square().sum(), inputs, materialize_grads=True)]
    return together


# ---------------------------------------------------------------- fuse and unfuse
def fuse(model):
    """Switch the model's IWSA and SSA to FusedIWSA and FusedSSA, in place; returns the model.

    Parameters, state dict and results (up to rounding) stay the same.  Prints which layers are left
    as they are, and why.  Call it last, as torch.compile: later changes may go unnoticed.
    """
    edited = {}                         # class: why none of its layers can be switched, or None
    left = defaultdict(list)            # reason: names of layers left alone
    for name, layer in model.named_modules():
        cls = type(layer)
        bases = {base.__name__ for base in cls.__mro__}     # also those of a copy of the file
        if not bases & {"IWSA", "SSA"} or cls in FUSED.values():
            continue
        reason = why_not(layer)
        if reason is not None:
            left[reason].append(name or "the model")
            continue
        if cls not in edited:
            edited[cls] = why_edited(cls)
        if edited[cls] is None:
            layer.__class__ = FUSED[cls]
    for reason, names in left.items():
        print(f"not fused: {', '.join(names)} ({reason})")
    for cls, reason in edited.items():
        if reason is not None:
            print(f"not fused: all layers of class {cls.__name__} ({reason})")
        elif cls is IWSA and not devices:
            print(f"fused without the compiled kernels: {WHY_NO_KERNELS}; to build them: {BUILD}")
    return model


def unfuse(model):
    """Undo `fuse`, in place; returns the model."""
    for layer in model.modules():
        if type(layer) in FUSED.values():
            layer.__class__ = type(layer).__base__
    return model
