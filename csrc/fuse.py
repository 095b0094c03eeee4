"""`fuse(model)` makes attention faster and smaller by switching layers to subclasses that override `forward`.

    FusedIWSA   equations (4) and (5): on a CPU in one pass over memory; on a GPU in one kernel before
                PyTorch's attention and one after
    FusedSSA    equation (2) by PyTorch's attention, which never writes the N x N_rn scores to memory

Without the compiled kernels FusedIWSA, too, is PyTorch's attention.
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

import scalablevit
from scalablevit import IWSA, SSA, convolve, window_merge, window_partition

try:
    from . import ops as _ops  # noqa: F401  (defines torch.ops.scalablevit)
    from ._C import devices                             # "cpu", and "cuda" if it was built
    WHY_NO_KERNELS = None
except ImportError as error:
    devices = ()
    note = Path(__file__).with_name("not_built.txt")    # written by setup.py
    WHY_NO_KERNELS = note.read_text().strip() if note.exists() else str(error)

BUILD = "pip install setuptools wheel ninja && pip install --no-build-isolation ."


# ---------------------------------------------------------- the two layers
def attention(q, k, v, scale, mask=None):
    """scalablevit.attention by PyTorch's kernels, where they pay.

    q (…, n, d), k (…, m, d), v (…, m, d_v), mask (…, n or 1, m)  ->  (…, n, d_v)
    """
    if not pays(k):
        return scalablevit.attention(q, k, v, scale, mask)
    d_v = v.shape[-1]
    if q.device.type == "cpu":                          # its fast kernel needs d = d_v
        width = max(q.shape[-1], d_v)
        q, k, v = padded(q, width), padded(k, width), padded(v, width)
    z = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    return z[..., :d_v]


def pays(k):
    """Whether PyTorch's kernels are faster with these keys (…, m, d): on a GPU always, on a CPU if they are many.

    The limits on a CPU are measured, in inference and training (docs/kernels.md).  With few keys the scores
    fit in cache, and plain matrix products of 16-bit numbers are faster.
    """
    if k.device.type == "cpu":
        return k.shape[-2] >= (512 if k.element_size() == 2 else 128)
    return k.device.type == "cuda"


def padded(t, width):
    """Zeros as further channels: they change no score, and those of V are cut off."""
    missing = width - t.shape[-1]
    return F.pad(t, (0, missing)) if missing else t


class FusedSSA(SSA):
    def forward(self, x):
        B, H, W, C = x.shape
        reduced = x
        if self.s > 1:
            cells = F.pad(x, (0, 0, 0, -W % self.s, 0, -H % self.s))
            reduced = F.gelu(self.norm(convolve(self.reduce, cells)))  # (B, ⌈H/s⌉, ⌈W/s⌉, C')
        q = split_heads(self.q(x), self.heads)                      # (B, heads, N, C'/heads)
        k = split_heads(self.k(reduced), self.heads)                # (B, heads, N_rn, C'/heads)
        v = split_heads(self.v(reduced), self.heads)                # (B, heads, N_rn, C/heads)
        z = attention(q, k, v, self.scale)                          # (B, heads, N, C/heads)  (2)
        return self.proj(z.transpose(1, 2).reshape(B, H, W, C))


def split_heads(tokens, heads):
    """(B, H, W, heads · d) -> (B, heads, H · W, d)"""
    return tokens.flatten(1, 2).unflatten(2, (heads, -1)).transpose(1, 2)


class FusedIWSA(IWSA):
    def forward(self, x):
        device = x.device.type
        if device not in devices or not is_plain_lim(self.lim):
            return super().forward(x)                   # which calls `attend`
        kernels = torch.ops.scalablevit
        weight, bias = self.lim.weight, self.lim.bias
        qkv = self.qkv(x)                                                           # (B, H, W, 3C)
        M = min(self.window, max(qkv.shape[1:3]))
        if device == "cpu":
            return self.proj(kernels.iwsa(qkv, weight, bias, self.heads, M))
        q, k, v = kernels.window_partition(qkv, self.heads, M)      # (B·windows, heads, M², d)
        z = F.scaled_dot_product_attention(q, k, v, real_keys(qkv, M))  # (B·windows, heads, M², d)
        return self.proj(kernels.window_merge_lim(z, qkv, weight, bias, M))

    def attend(self, qkv, top=0, left=0):
        """WSA.attend with the `attention` above.  IWSA has no padding at the top or left."""
        H, W = qkv.shape[1:3]
        M = min(self.window, max(H, W))
        q, k, v = window_partition(qkv, self.heads, M)              # (B·windows, heads, M², d)
        z = attention(q, k, v, q.shape[-1] ** -0.5, real_keys(qkv, M))  # (B·windows, heads, M², d)
        return window_merge(z, H, W, M)


def real_keys(qkv, M):
    """Which tokens of each window are inside the map: (B·windows, 1, 1, M²), or None for all."""
    H, W = qkv.shape[1:3]
    if H % M == 0 and W % M == 0:
        return None
    inside = window_partition(torch.ones_like(qkv[..., :3]), 1, M)[0]  # (B·windows, 1, M², 1)
    return inside.transpose(-2, -1) > 0


def is_plain_lim(lim):
    """Whether LIM is a convolution as `scalablevit.depthwise` makes it, of any odd size, with no hooks."""
    if type(lim) is not nn.Conv2d or lim.bias is None or has_hooks(lim) or "forward" in vars(lim):
        return False
    k = lim.kernel_size[0]
    return (k % 2 == 1 and lim.kernel_size == (k, k) and lim.padding == (k // 2, k // 2)
            and lim.stride == lim.dilation == (1, 1) and lim.padding_mode == "zeros"
            and lim.groups == lim.in_channels == lim.out_channels)


def has_hooks(module):
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                or module._backward_pre_hooks or _has_any_global_hook())


# ---------------------------------------------------------- which layers can be switched
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
        expected = PARTS[cls].get(name) if name else cls
        if type(part) is not expected:
            return f"{name} is a {type(part).__module__}.{type(part).__qualname__}"
        if has_hooks(part):
            return f"{name or 'it'} has a hook"
        if "forward" in vars(part) or "attend" in vars(part):
            return f"{name or 'it'} has a method of its own"
    own = [*layer._parameters, *layer._buffers]
    if own:
        return f"it has a parameter or buffer of its own, {own[0]}"
    if any(p.is_meta for p in layer.parameters()):
        return "it is on the meta device: call fuse when it has weights"
    if cls is IWSA and not is_plain_lim(layer.lim):
        return "lim is not a convolution as built by scalablevit.depthwise"
    return None


def why_edited(cls):
    """Why layers of this class do not compute what their fused form does; None if they do.

    Finds an edited file by comparing outputs and gradients of small layers, with few and many keys, on maps
    with and without cut windows and narrower than one.
    """
    cases = {IWSA: [(dict(window=12), [(12, 24), (13, 20), (5, 17), (5, 4)])],
             SSA: [(dict(rc=1.25, rn=1 / 4), [(24, 23), (3, 5)]), (dict(rc=1.25), [(12, 11), (3, 5)])]}
    try:                                      # on a CPU with gradients, whatever the caller's modes
        with (torch.device("cpu"), torch.inference_mode(False), torch.enable_grad(),
              torch.autocast("cpu", enabled=False), torch.random.fork_rng([])):
            for kwargs, sizes in cases[cls]:
                if not computes_the_same(cls(8, 2, **kwargs), sizes):
                    return "it does not compute what its fused form computes"
    except Exception as error:
        return f"comparing it with its fused form raised {type(error).__name__}: {error}"
    return None


def computes_the_same(layer, sizes):
    """Compare a layer with its fused form, in float64, in train and eval mode."""
    generator = torch.Generator("cpu").manual_seed(0)
    plain, fused = type(layer), FUSED[type(layer)]
    layer.double()
    for p in layer.parameters():
        nn.init.normal_(p, std=p[0].numel() ** -0.5, generator=generator)
    for H, W in sizes:
        x = torch.randn(2, H, W, 8, dtype=torch.float64, generator=generator, requires_grad=True)
        for training in (True, False):
            layer.train(training)
            pairs = zip(results(layer, plain, x), results(layer, fused, x))
            if not all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in pairs):
                return False
    return True


def results(layer, cls, x):
    """Output, and the gradients of x and the parameters, of the layer as a `cls`."""
    layer.__class__ = cls
    out = layer(x)
    inputs = [x, *layer.parameters()]
    return [out, *torch.autograd.grad(out.square().sum(), inputs, materialize_grads=True)]


# ---------------------------------------------------------- fuse and unfuse
def fuse(model):
    """Switch the model's IWSA and SSA layers to FusedIWSA and FusedSSA, in place; returns the model.

    Parameters, state dict and results (up to rounding) stay the same.  Prints which layers are left as they
    are, and why.  Call it last, as torch.compile: later changes of a layer may go unnoticed.
    """
    layers = {}                                         # those that can be switched, by class
    left = {}                                           # names of the others, by reason
    for name, layer in model.named_modules():
        names_of_bases = {cls.__name__ for cls in type(layer).__mro__}  # also those of a copy of the file
        if names_of_bases & {"IWSA", "SSA"} and type(layer) not in FUSED.values():
            reason = why_not(layer)
            if reason is None:
                layers.setdefault(type(layer), []).append(layer)
            else:
                left.setdefault(reason, []).append(name or "the model")
    for reason, names in left.items():
        print(f"not fused: {', '.join(names)} ({reason})")
    for cls, own in layers.items():
        edited = why_edited(cls)
        if edited is not None:
            print(f"not fused: all layers of class {cls.__name__} ({edited})")
            continue
        for layer in own:
            layer.__class__ = FUSED[cls]
        if cls is IWSA and not devices:
            print(f"fused without compiled kernels: {WHY_NO_KERNELS}; to build them: {BUILD}")
    return model


def unfuse(model):
    """Undo `fuse`, in place; returns the model."""
    for layer in model.modules():
        if type(layer) in FUSED.values():
            layer.__class__ = type(layer).__base__
    return model
