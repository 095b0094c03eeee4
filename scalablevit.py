"""ScalableViT in one file, to be read beside the paper.

    ScalableViT: Rethinking the Context-oriented Generalization of Vision Transformer
    Rui Yang, Hailong Ma, Jie Wu, Yansong Tang, Xuefeng Xiao, Min Zheng, Xiu Li.  ECCV 2022.

In the paper's order: patch embedding (3.1), SSA (3.2), the window attentions with LIM (3.3), PEG (3.4), the
network of Table 1 (3.5).  Tokens are (B, H, W, C) from the first patch embedding to the head.

    B  batch                      M    window size (7)                r_n  SSA's spatial scale   N_rn = N r_n keys
    H, W  tokens; N = H W         d    channels of one head           r_c  SSA's channel scale   C' = int(C r_c)

    python scalablevit.py [--size H W]      shapes, parameters and cost of tiny, S, B and L beside the paper's Table 2
"""
import argparse
import math
import os
import re
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry, register_flop_formula


def to_map(tokens):
    """Tokens (B, H, W, C) as the map (B, C, H, W) that convolutions take: a view, channels last in memory."""
    return tokens.permute(0, 3, 1, 2)


def to_tokens(image):
    """The map (B, C, H, W) as tokens (B, H, W, C): a view."""
    return image.permute(0, 2, 3, 1)


def depthwise(dim, kernel_size=3):
    """One kernel_size x kernel_size filter per channel, zero padding, same size out: LIM, LEM and PEG."""
    return nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)


def macs(layer, positions):
    """Multiply-accumulates of a linear or convolution: each weight is used once per output position."""
    return positions * layer.weight.numel()


def attention(q, k, v, scale, mask=None):
    """Softmax(Q K^T · scale) V, equation (1): q (…, n, d), k (…, m, d), v (…, m, d_v) -> (…, n, d_v).

    mask (…, n, m) is True where a query may see a key.
    """
    if q.device.type == "cpu" and k.shape[-2] <= 256:              # few keys: as it is written is the faster way there
        scores = (q * scale) @ k.transpose(-2, -1)                                      # (…, n, m)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        return scores.softmax(dim=-1) @ v
    # PyTorch's fused form never stores the scores as a whole.  It wants heads of one size, which SSA's are not: zeros
    # after q and k change no score, and those after v are cut off again.
    d_v = v.shape[-1]
    q, k, v = (F.pad(t, (0, max(q.shape[-1], d_v) - t.shape[-1])) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[..., :d_v]


class Linear(nn.Linear):
    """A linear layer; for many tokens (B, H, W, C) on a CPU the 1x1 convolution that it is.

    PyTorch takes convolutions to oneDNN there, which is faster than its linears as soon as it pays to rearrange the
    weight first, in every call.
    """

    onednn = torch.backends.mkldnn.is_available()

    def forward(self, x):
        compiled = torch.compiler.is_compiling()                    # there, a choice by size would fix the batch's
        many = x.ndim == 4 and (compiled or math.prod(x.shape[:3]) >= self.in_features + self.out_features)
        if self.onednn and many and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16):
            return to_tokens(F.conv2d(to_map(x), self.weight[:, :, None, None], self.bias))
        return super().forward(x)


def as_written(layer, cls):
    """Whether a call of the layer runs cls.forward and nothing else: only then may another operator use its weights."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return type(layer) is cls and not (hooks or "forward" in vars(layer))


def linear_gelu(linear, x):
    """GELU(linear(x)); in inference mode on a CPU oneDNN applies the GELU on the fly, as it does in compiled models."""
    eager = not (torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"))
    eager = eager and torch.is_inference_mode_enabled() and as_written(linear, Linear)
    if eager and linear.onednn and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16):
        w, tensors = linear.weight, [x, *linear.parameters(recurse=False)]
        if len({(t.device, t.dtype) for t in tensors}) == 1 and x.shape[-1] == w.shape[1]:    # else PyTorch says what is wrong
            return torch.ops.mkldnn._linear_pointwise(x, w, linear.bias, "gelu", [], "none")
    return F.gelu(linear(x))


if Linear.onednn and torch.ops.mkldnn._linear_pointwise not in flop_registry:
    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)     # so that PyTorch's counter sees it
    def _(x, weight, *args, **kwargs):
        return 2 * math.prod(x) * weight[0]


# ---------------------------------------------------------------------------- Kernels
def load_kernels():
    """The types of device that the C++/CUDA extension (csrc/) has kernels for; () if it is not installed.

    On a CPU it makes all that `IWSA` does between its two linears one pass over memory, and SSA's attention another; on a
    GPU `window_partition` and the end of `IWSA`.  Their plain PyTorch form, beside each call, says what the kernels
    compute, and runs wherever there are none or a layer is not as written.  SCALABLEVIT_KERNELS=0 turns them off.
    """
    if os.environ.get("SCALABLEVIT_KERNELS") == "0":
        return ()
    try:
        from scalablevit_kernels import devices
        return devices
    except ModuleNotFoundError:
        return ()
    except ImportError as error:
        warnings.warn(f"plain PyTorch is used, since scalablevit_kernels was built for another PyTorch: {error}")
        return ()


KERNELS = load_kernels()


# ---------------------------------------------------------------------------- 3.1 Overall architecture
class PatchEmbed(nn.Module):
    """Convolutional patch embedding (Section 3.1): (B, H, W, C_in) -> (B, ceil(H/stride), ceil(W/stride), C).

    7x7 with stride 4 before the first stage, 3x3 with stride 2 between stages, each followed by LayerNorm.
    """

    def __init__(self, in_dim, dim, kernel_size, stride):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(in_dim, dim, kernel_size, stride, padding=kernel_size // 2)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def out_size(self, H, W):
        return -(-H // self.stride), -(-W // self.stride)

    def forward(self, x):
        return self.norm(to_tokens(self.conv(to_map(x))))


# ---------------------------------------------------------------------------- 3.2 Scalable Self-Attention
class SSA(nn.Module):
    """Scalable (multi-head) Self-Attention, Section 3.2: every token attends to a map scaled by r_n and r_c.

    Z' = Softmax(Q' K'^T / sqrt(d_k')) V',  d_k' = C r_c / heads                            (2)
    Q' = f_q(X): N x C',   K' = f_k(X): N_rn x C',   V' = f_v(X): N_rn x C                  (3)

    (The paper prints f_v(V); its text and code take X.)
    f_k and f_v share one reduction, a depthwise s x s convolution of stride s = sqrt(1/r_n) and a 1x1 convolution
    to C' = int(C r_c) channels, LayerNorm and GELU; a linear layer each follows.  A map that s does not divide is
    padded with zeros right and bottom, so that no token is dropped.  With r_n = 1 there is nothing to reduce: as in
    the published model, K and V come straight from X, C' = C, and r_c is left in the scale of the softmax alone.

    Cost of (2): N N_rn (C + C').  The paper calls this linear in N, which holds for a fixed N_rn.  With the fixed
    ratio r_n of Table 1 it is r_n N^2 (C + C'): quadratic in N, with a small constant.
    """

    def __init__(self, dim, heads, rc=1.0, rn=1.0):
        super().__init__()
        s = math.isqrt(round(1 / rn)) if rn > 0 else 0
        if s < 1 or abs(rn * s * s - 1) > 1e-6:
            raise ValueError(f"rn must be 1/integer² (1, 1/4, 1/9, 1/16, ...), got {rn}")
        scaled = dim if s == 1 else int(dim * rc)                                       # C'
        if scaled < 1 or scaled % heads or dim % heads:
            raise ValueError(f"heads must divide the channels C and C' = int(C·rc): "
                             f"got heads={heads}, C={dim}, rc={rc}, C'={scaled}")
        self.heads, self.s = heads, s
        self.scale = (dim * rc / heads) ** -0.5                                         # 1/sqrt(d_k')
        self.q = Linear(dim, scaled)
        if s > 1:
            self.reduce = nn.Sequential(nn.Conv2d(dim, dim, s, stride=s, groups=dim), nn.Conv2d(dim, scaled, 1))
            self.norm = nn.LayerNorm(scaled)           # the one LayerNorm with PyTorch's eps of 1e-5, as published
        self.k = Linear(scaled, scaled)
        self.v = Linear(scaled, dim)
        self.proj = Linear(dim, dim)

    def forward(self, x):
        B, H, W, C = x.shape
        reduced = x
        if self.s > 1:
            reduced = F.pad(x, (0, 0, 0, -W % self.s, 0, -H % self.s))
            with torch.autocast("cpu", enabled=False):       # bfloat16's backward takes ten times as long as float32's
                if x.device.type == "cpu":
                    reduced = reduced.to(self.q.weight.dtype)
                reduced = self.reduce[0](to_map(reduced))                               # (B, C, ⌈H/s⌉, ⌈W/s⌉)
            reduced = to_tokens(self.reduce[1](reduced))                                # (B, ⌈H/s⌉, ⌈W/s⌉, C')
            reduced = F.gelu(self.norm(reduced))
        q = self.q(x).flatten(1, 2)                                                     # (B, N, C')
        k = self.k(reduced).flatten(1, 2)                                               # (B, N_rn, C')
        v = self.v(reduced).flatten(1, 2)                                               # (B, N_rn, C)
        return self.proj(self.attend(q, k, v).reshape(B, H, W, C))

    def attend(self, q, k, v):
        """Equation (2) for each head's share of the channels: (B, N, C)."""
        if q.device.type == "cpu" and "cpu" in KERNELS:
            return torch.ops.scalablevit.ssa(q, k, v, self.heads, self.scale)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))     # (B, heads, N or N_rn, …)
        return attention(q, k, v, self.scale).transpose(1, 2).flatten(2)

    def macs(self, H, W):
        N, N_rn = H * W, -(-H // self.s) * -(-W // self.s)
        modules = macs(self.q, N) + macs(self.k, N_rn) + macs(self.v, N_rn) + macs(self.proj, N)
        if self.s > 1:
            depthwise_conv, pointwise_conv = self.reduce
            # Stride = kernel: a token meets one of a filter's s² weights, once.
            modules += macs(depthwise_conv, N) // self.s ** 2 + macs(pointwise_conv, N_rn)
        return modules, N * N_rn * (self.k.out_features + self.v.out_features)


# ---------------------------------------------------------------------------- 3.3 Interactive Window-based Self-Attention
def window_partition(qkv, heads, M):
    """Cut (B, H, W, 3C) into M x M windows, zeros beyond the border: (3, B·windows, heads, M², d)."""
    if qkv.device.type in KERNELS:
        return torch.ops.scalablevit.window_partition(qkv, heads, M)
    B, H, W, C = qkv.shape
    h, w = -(-H // M), -(-W // M)
    qkv = F.pad(qkv, (0, 0, 0, w * M - W, 0, h * M - H))                                # (B, h·M, w·M, 3C)
    qkv = qkv.reshape(B, h, M, w, M, 3, heads, C // (3 * heads))
    qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7)                                           # (3, B, h, w, heads, M, M, d)
    return qkv.reshape(3, B * h * w, heads, M * M, C // (3 * heads))


def window_merge(z, H, W, M):
    """Put windows (B·windows, heads, M², d) back in place and cut the border off: (B, H, W, C)."""
    h, w = -(-H // M), -(-W // M)
    windows, heads, _, d = z.shape
    z = z.reshape(windows // (h * w), h, w, heads, M, M, d)
    z = z.permute(0, 1, 4, 2, 5, 3, 6)                                                  # (B, h, M, w, M, heads, d)
    return z.reshape(windows // (h * w), h * M, w * M, heads * d)[:, :H, :W]


def window_mask(H, W, M, shift=(0, 0), device=None):
    """Which query may see which key, (windows, 1, M², M²), or None where every window is full and whole.

    Tokens see each other when they are on the same side of every border that runs through their window: the image's
    right and bottom edge, beyond which lies padding, and the seam where a shifted map (`SWSA`) wraps around.
    """
    if H % M == 0 and W % M == 0 and shift == (0, 0):
        return None

    def sides(n, s):                         # along one axis: 0 for a token, 1 for padding, 2 for a wrapped-around token
        i = torch.arange(n + -n % M, device=device).roll(-s)
        return (i >= n) + 2 * (i < s)

    side = 3 * sides(H, shift[0])[:, None] + sides(W, shift[1])                         # (h·M, w·M)
    side = side.unflatten(1, (-1, M)).unflatten(0, (-1, M)).transpose(1, 2).flatten(2).flatten(0, 1)  # (windows, M²)
    return side[:, None, :, None] == side[:, None, None, :]                             # (windows, 1, M², M²)


class WSA(nn.Module):
    """Window-based Self-Attention: every M x M window attends within itself, Z_n of equation (4).

    Z_n = Softmax(Q_n K_n^T / sqrt(d_k)) V_n                                                (4)

    A window that the border cuts attends over its real tokens only, as if that smaller window stood alone.
    Cost of (4): 2 M² N C, linear in N.
    The three classes below are this one with one difference each.
    """

    def __init__(self, dim, heads, window=7):
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads must divide the channels C: got heads={heads}, C={dim}")
        self.heads, self.window = heads, window
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def side(self, H, W):
        """M, or less where a single smaller window covers the whole map: the same result with less padding."""
        return min(self.window, max(H, W))

    def shift(self, H, W):
        return 0, 0

    def forward(self, x):
        return self.proj(self.attend(self.qkv(x), *x.shape[1:3]))

    def attend(self, qkv, H, W, shift=(0, 0)):
        """(B, H, W, 3C) -> (B, H, W, C), where qkv may have been padded beyond the H x W tokens (`SWSA`)."""
        M = self.side(H, W)
        q, k, v = window_partition(qkv, self.heads, M)                                  # (B·windows, heads, M², d) each
        mask = window_mask(H, W, M, shift, qkv.device)
        if mask is not None:
            mask = mask.repeat(qkv.shape[0], 1, 1, 1)                                   # (B·windows, 1, M², M²)
        z = attention(q, k, v, q.shape[-1] ** -0.5, mask)                               # (B·windows, heads, M², d)  (4)
        return self.merge(z, v, qkv, M)

    def merge(self, z, v, qkv, M):
        return window_merge(z, *qkv.shape[1:3], M)

    def macs(self, H, W):
        def squares(n, s):                   # along one axis, over all windows: the sum of (real tokens in it)²
            tokens = [min(self.window, max(0, n - s - i * self.window)) for i in range(-(-n // self.window))]
            tokens[-1] += s                  # those that wrapped around
            return sum(t * t for t in tokens)

        pairs = math.prod(map(squares, (H, W), self.shift(H, W)))
        return macs(self.qkv, H * W) + macs(self.proj, H * W), 2 * pairs * self.proj.in_features


class SWSA(WSA):
    """WSA on windows that are shifted by half a window (Swin; Table 5(a)): the map is rolled, and rolled back.

    An axis on which one window spans the whole map is not shifted.
    """

    def shift(self, H, W):
        return tuple(self.window // 2 if n > self.window else 0 for n in (H, W))

    def forward(self, x):
        H, W = x.shape[1:3]
        M, (sh, sw) = self.side(H, W), self.shift(H, W)
        qkv = F.pad(self.qkv(x), (0, 0, 0, -W % M, 0, -H % M)).roll((-sh, -sw), (1, 2))  # (B, h·M, w·M, 3C)
        z = self.attend(qkv, H, W, (sh, sw))
        return self.proj(z.roll((sh, sw), (1, 2))[:, :H, :W])


class LEM(WSA):
    """WSA with a Local Enhanced Module (Section 3.3, Table 7): F is applied to each window's V_n on its own.

    Z'_n = Z_n + F(V_n): the convolution pads with zeros at every window's border and crosses none.
    """

    def __init__(self, dim, heads, window=7):
        super().__init__(dim, heads, window)
        self.lem = depthwise(dim)

    def merge(self, z, v, qkv, M):
        v = v.transpose(2, 3).reshape(v.shape[0], qkv.shape[3] // 3, M, M)              # (B·windows, C, M, M)
        y = self.lem(v).reshape(z.transpose(2, 3).shape).transpose(2, 3)                # (B·windows, heads, M², d)
        return super().merge(z + y, v, qkv, M)

    def macs(self, H, W):
        modules, attention = super().macs(H, W)
        return modules + macs(self.lem, H * W), attention


class IWSA(WSA):
    """Interactive Window-based Self-Attention: WSA with the Local Interactive Module (LIM), Section 3.3.

    Z' = Z + F(V)                                                                           (5)

    F, a depthwise convolution, is applied to the re-merged value map V, so that it links neighbouring windows; it
    pads with zeros at the image's border only.
    """

    def __init__(self, dim, heads, window=7):
        super().__init__(dim, heads, window)
        self.lim = depthwise(dim)

    def fusible(self):
        """Whether the kernels compute what this class does: nothing is overridden, and F is as `depthwise` makes it."""
        f = self.lim
        return (type(self) is IWSA and "merge" not in vars(self) and as_written(f, nn.Conv2d) and f.bias is not None
                and f.stride == f.dilation == (1, 1) and f.padding == (f.kernel_size[0] // 2,) * 2
                and f.groups == f.in_channels and f.padding_mode == "zeros")

    def attend(self, qkv, H, W, shift=(0, 0)):
        if qkv.device.type == "cpu" and "cpu" in KERNELS and self.fusible():
            # All of it in one pass; nothing is padded, nothing masked.
            return torch.ops.scalablevit.iwsa(qkv, self.lim.weight, self.lim.bias, self.heads, self.side(H, W))
        return super().attend(qkv, H, W, shift)

    def merge(self, z, v, qkv, M):
        if qkv.device.type in KERNELS and self.fusible():
            return torch.ops.scalablevit.window_merge_lim(z, qkv, self.lim.weight, self.lim.bias, M)
        value_map = qkv.chunk(3, dim=-1)[2]                                             # V (B, H, W, C)
        return super().merge(z, v, qkv, M) + to_tokens(self.lim(to_map(value_map)))        # (5)

    def macs(self, H, W):
        modules, attention = super().macs(H, W)
        return modules + macs(self.lim, H * W), attention


# ---------------------------------------------------------------------------- 3.4 Position encoding
class PEG(nn.Module):
    """Position encoding generator (Section 3.4): x + depthwise 3x3 convolution, whose zero padding tells positions.

    The paper speaks of fixed weights; the published models have learned ones, and so has this.
    """

    def __init__(self, dim):
        super().__init__()
        self.conv = depthwise(dim)

    def forward(self, x):
        return x + to_tokens(self.conv(to_map(x)))


# ---------------------------------------------------------------------------- 3.5 Architecture
class DropPath(nn.Module):
    """Stochastic depth: in training, a sample's residual branch is left out with probability p."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        keep = x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(1 - self.p)
        return x * (keep / (1 - self.p))


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(linear_gelu(self.fc1, x))


class Block(nn.Module):
    """A pre-norm Transformer block around one of the attentions above: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, attn, dim, mlp_ratio, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def macs(self, H, W):
        modules, attention = self.attn.macs(H, W)
        return modules + macs(self.mlp.fc1, H * W) + macs(self.mlp.fc2, H * W), attention


class Stage(nn.Module):
    """Patch embedding, the first block, PEG, the other blocks (Figure 2)."""

    def __init__(self, embed, blocks, peg):
        super().__init__()
        self.embed = embed
        self.blocks = nn.ModuleList(blocks)
        self.peg = peg
        self.grad_checkpointing = False

    def forward(self, x):
        x = self.embed(x)
        for i, block in enumerate(self.blocks):
            if self.grad_checkpointing:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
            if i == 0 and self.peg is not None:
                x = self.peg(x)
        return x

    def macs(self, H, W):
        """Of this stage for H x W tokens after its patch embedding."""
        counts = [block.macs(H, W) for block in self.blocks]
        modules = macs(self.embed.conv, H * W) + sum(m for m, _ in counts)
        if self.peg is not None:
            modules += macs(self.peg.conv, H * W)
        return modules, sum(a for _, a in counts)


ATTENTION = {"wsa": WSA, "swsa": SWSA, "lem": LEM, "iwsa": IWSA, "ssa": SSA}


class ScalableViT(nn.Module):
    """The network (Section 3.5, Table 1; the defaults are ScalableViT-S).

    Images (B, in_chans, H, W) of any size from 1x1 on -> logits (B, num_classes).

    in_chans        channels of an image
    num_classes     0: no classifier, the pooled features (B, C of the last stage) come out
    dim             channels C of the first stage; they double from stage to stage
    depths, heads, rc, rn   one entry per stage, as in Table 1: blocks, heads, and SSA's two scales (r_n is 1/integer²)
    window          M, the side of a window in tokens
    mlp_ratio       hidden channels of the MLP over C
    drop_path_rate  stochastic depth, rising linearly from 0 at the first block to this at the last
    peg             whether a PEG follows the first block of each stage (Table 5(b))
    pattern         two kinds of attention, taken in turn over the blocks of a stage: "wsa", "swsa", "lem", "iwsa" or
                    "ssa".  With `peg` and `rc` it spans Tables 5(a), 5(b) and 7.
    head_hidden     width of the two-layer head that the published models have; None: a single linear layer

    Raises ValueError for an argument or an image that does not fit, saying what was given and what is accepted.
    """

    def __init__(self, in_chans=3, num_classes=1000, dim=64, depths=(2, 2, 20, 2), heads=(2, 4, 8, 16),
                 rc=(1.25, 1.25, 1.25, 1.0), rn=(1 / 64, 1 / 16, 1 / 4, 1), window=7, mlp_ratio=4.0,
                 drop_path_rate=0.0, peg=True, pattern=("iwsa", "ssa"), head_hidden=4096):
        config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.config = config                                         # ScalableViT(**model.config) is its like
        per_stage = {"depths": depths, "heads": heads, "rc": rc, "rn": rn}
        if not all(isinstance(value, (list, tuple)) and len(value) == len(depths) > 0 for value in per_stage.values()):
            raise ValueError("depths, heads, rc and rn must be lists with one entry per stage each, got "
                             + ", ".join(f"{name}={value!r}" for name, value in per_stage.items()))
        if not isinstance(pattern, (list, tuple)) or len(pattern) != 2 or not all(kind in [*ATTENTION] for kind in pattern):
            raise ValueError(f"pattern must be two of {', '.join(ATTENTION)}, got {pattern!r}")
        integers = {"in_chans": [in_chans], "dim": [dim], "window": [window], "depths": depths, "heads": heads,
                    "head_hidden": [1 if head_hidden is None else head_hidden]}
        for name, value in [(name, value) for name, values in integers.items() for value in values]:
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer and at least 1, got {value!r}")
        numbers = {"rc": rc, "rn": rn, "mlp_ratio": [mlp_ratio]}
        for name, value in [(name, value) for name, values in numbers.items() for value in values]:
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number{' (rn: 1/integer²)' * (name == 'rn')}, got {value!r}")
        if not isinstance(drop_path_rate, (int, float)) or not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be a number in [0, 1), got {drop_path_rate!r}")

        self.in_chans, self.head_hidden = in_chans, head_hidden
        self.stages = nn.ModuleList()
        before = 0                                                   # blocks in the stages before this one
        for i, depth in enumerate(depths):
            C = dim * 2 ** i
            embed = PatchEmbed(in_chans, C, 7, 4) if i == 0 else PatchEmbed(C // 2, C, 3, 2)
            blocks = []
            for j in range(depth):
                kind = pattern[j % 2]
                attn = SSA(C, heads[i], rc[i], rn[i]) if kind == "ssa" else ATTENTION[kind](C, heads[i], window)
                drop_path = drop_path_rate * (before + j) / max(sum(depths) - 1, 1)
                blocks.append(Block(attn, C, mlp_ratio, drop_path))
            self.stages.append(Stage(embed, blocks, PEG(C) if peg else None))
            before += depth
        self.num_features = C
        self.norm = nn.LayerNorm(C, eps=1e-6)
        self.apply(init_weights)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes):
        """Put a freshly initialised head of the same form in place, for num_classes classes (0: none)."""
        if not isinstance(num_classes, int) or num_classes < 0:
            raise ValueError(f"num_classes must be an integer, 0 (no classifier) or more, got {num_classes!r}")
        self.num_classes, C, hidden = num_classes, self.num_features, self.head_hidden
        self.config["num_classes"] = num_classes
        if num_classes == 0:
            self.head = nn.Identity()
        elif hidden is None:
            self.head = nn.Linear(C, num_classes)
        else:
            self.head = nn.Sequential(nn.Linear(C, hidden), nn.LayerNorm(hidden, eps=1e-6), nn.GELU(),
                                      nn.Linear(hidden, num_classes))
        self.head.to(self.norm.weight.device, self.norm.weight.dtype).apply(init_weights)

    def forward_features(self, images):
        """Images (B, in_chans, H, W) -> one map per stage, (B, C_i, ⌈H/s⌉, ⌈W/s⌉) with s = 4, 8, 16, 32."""
        if images.ndim != 4 or images.shape[1] != self.in_chans or min(images.shape[2:]) < 1:
            raise ValueError(f"images must have shape (B, {self.in_chans}, H, W), H and W at least 1, "
                             f"got {tuple(images.shape)}")
        x, maps = to_tokens(images), []                                                 # (B, H, W, in_chans)
        for stage in self.stages:
            x = stage(x)                                                                # (B, H_i, W_i, C_i)
            maps.append(to_map(x))
        return maps

    def forward(self, images):
        x = to_tokens(self.forward_features(images)[-1])                                # (B, H_4, W_4, C_4)
        return self.head(self.norm(x).mean(dim=(1, 2)))                                 # (B, num_classes)

    def no_weight_decay(self):
        """Names of the parameters that the recipe leaves out of weight decay: biases, norms and the PEG."""
        return {name for name, p in self.named_parameters() if p.ndim == 1 or ".peg." in name}

    def set_grad_checkpointing(self, enable=True):
        """Recompute each block in the backward pass instead of keeping its activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable


def init_weights(module):
    """The published initialisation; LayerNorm keeps PyTorch's 1 and 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        nn.init.zeros_(module.bias)


def scalablevit_tiny(**kwargs):
    """Not in the paper: a small one for laptops and lessons, good at 64 to 112 pixels."""
    return ScalableViT(**dict(dim=24, depths=(2, 2, 4, 2), heads=(1, 2, 4, 8), head_hidden=None) | kwargs)


def scalablevit_s(**kwargs):
    """ScalableViT-S (Table 1); any argument of `ScalableViT` can be overridden."""
    return ScalableViT(**dict(dim=64, depths=(2, 2, 20, 2), heads=(2, 4, 8, 16), rc=(1.25, 1.25, 1.25, 1.0)) | kwargs)


def scalablevit_b(**kwargs):
    """ScalableViT-B (Table 1); any argument of `ScalableViT` can be overridden."""
    return ScalableViT(**dict(dim=96, depths=(2, 2, 14, 6), heads=(3, 6, 12, 24), rc=(2.0, 1.25, 1.25, 1.0)) | kwargs)


def scalablevit_l(**kwargs):
    """ScalableViT-L (Table 1); any argument of `ScalableViT` can be overridden."""
    return ScalableViT(**dict(dim=128, depths=(2, 6, 12, 4), heads=(4, 8, 16, 32), rc=(0.25, 0.5, 1.0, 1.0)) | kwargs)


# ---------------------------------------------------------------------------- Published weights
OFFICIAL_NAMES = [  # (published name, name here) without the closing .weight or .bias
    (r"patch_embeds\.(\d+)\.proj", r"stages.\1.embed.conv"),
    (r"patch_embeds\.(\d+)\.norm", r"stages.\1.embed.norm"),
    (r"pos_block\.(\d+)\.proj\.0", r"stages.\1.peg.conv"),
    (r"stages\.(\d+)\.(\d+)\.(norm1|norm2|mlp\.fc1|mlp\.fc2)", r"stages.\1.blocks.\2.\3"),
    (r"stages\.(\d+)\.(\d+)\.attn\.(qkv|q|k|v|kv|proj)", r"stages.\1.blocks.\2.attn.\3"),
    (r"stages\.(\d+)\.(\d+)\.attn\.lim_func", r"stages.\1.blocks.\2.attn.lim"),
    (r"stages\.(\d+)\.(\d+)\.attn\.reduction\.([01])", r"stages.\1.blocks.\2.attn.reduce.\3"),
    (r"stages\.(\d+)\.(\d+)\.attn\.norm_act\.0", r"stages.\1.blocks.\2.attn.norm"),
    (r"(norm|head|head\.[013])", r"\1"),                                        # the plain and the two-layer head
]


def convert_official(state_dict):
    """A published model's state dict under the names used here, for `load_state_dict`.

    Takes both head forms; where r_n = 1, the published layer `kv` becomes `k` and `v`.
    Raises ValueError for a name that the published models do not have.
    """
    converted = {}
    for key, tensor in state_dict.items():
        layer, _, parameter = str(key).rpartition(".")
        for theirs, ours in OFFICIAL_NAMES:
            match = re.fullmatch(theirs, layer)
            if match and parameter in ("weight", "bias"):
                name = match.expand(ours)
                break
        else:
            raise ValueError(f"{key!r} is not a parameter of a published ScalableViT")
        if name.endswith(".kv"):
            converted[f"{name[:-2]}k.{parameter}"], converted[f"{name[:-2]}v.{parameter}"] = tensor.chunk(2)
        else:
            converted[f"{name}.{parameter}"] = tensor
    return converted


def official_kwargs(state_dict):
    """The arguments beside those of Table 1 that a published state dict asks for: of the two heads there are.

    S, B and L were published with the two-layer head, which is the default here; and S once more with a plain one, and
    with r_c = 1.25 in all four stages.
    """
    return dict(head_hidden=None, rc=(1.25, 1.25, 1.25, 1.25)) if "head.weight" in state_dict else {}


# ---------------------------------------------------------------------------- Cost
def count_macs(model, size):
    """Multiply-accumulates of one image of `size` (H, W), in closed form: nothing is run.

    Raises ValueError for a size that is not two positive integers.
    Returns {"modules": convolutions and linear layers, which is what the paper calls FLOPs,
             "attention": the products Q K^T and A V, which the paper leaves out}.
    Windows and reductions that the border cuts count their real tokens, not padding.
    """
    if not isinstance(size, (list, tuple)) or len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise ValueError(f"size must be two positive integers (H, W), got {size!r}")
    modules, attention = 0, 0
    for stage in model.stages:
        size = stage.embed.out_size(*size)
        m, a = stage.macs(*size)
        modules, attention = modules + m, attention + a
    modules += sum(macs(layer, 1) for layer in model.head.modules() if isinstance(layer, nn.Linear))
    return {"modules": modules, "attention": attention}


def main():
    parser = argparse.ArgumentParser(description="Shapes, parameters and cost of the ScalableViT models.")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), default=(224, 224), help="of an image, in pixels")
    H, W = parser.parse_args().size
    if min(H, W) < 1:
        parser.error(f"--size takes two positive integers, got {H} {W}")
    table2 = {"tiny": "not in the paper", "s": "32M, 4.2G", "b": "81M, 8.6G", "l": "104M, 14.7G"}
    for name, paper in table2.items():
        with torch.device("meta"):                                                      # shapes without memory
            model = globals()[f"scalablevit_{name}"]()
        print(f"{f'scalablevit_{name} at {H}x{W}':<24}{'output':>16}{'parameters':>14}"
              f"{'modules':>12}{'QK^T, AV':>12}{'together':>12}   (MACs)")
        size, rows = (H, W), []
        for i, stage in enumerate(model.stages):
            size = stage.embed.out_size(*size)
            shape = f"{stage.embed.conv.out_channels} x {size[0]} x {size[1]}"
            rows.append((f"stage {i + 1}", shape, sum(p.numel() for p in stage.parameters()), *stage.macs(*size)))
        total = count_macs(model, (H, W))
        parameters = sum(p.numel() for p in model.parameters())
        rows.append(("norm, head", f"{model.num_classes}", parameters - sum(row[2] for row in rows),
                     total["modules"] - sum(row[3] for row in rows), 0))
        rows.append(("in all", "", parameters, total["modules"], total["attention"]))
        for label, shape, params, modules, attended in rows:
            print(f"  {label:<22}{shape:>16}{params:>14,}{modules / 1e9:>11.3f}G{attended / 1e9:>11.3f}G"
                  f"{(modules + attended) / 1e9:>11.3f}G")
        print(f"  paper, Table 2 at 224x224: {paper}\n")
    print("The paper's FLOPs are the multiply-accumulates of convolutions and linear layers (modules).  They leave out the\n"
          "two matrix products of attention, QK^T and AV, as well as norms, activations and additions.  For B and L that\n"
          "gives Table 2's figures; for S it gives 4.09G where Table 2 has 4.2G.  Of L, Table 2 prints 104M parameters; the\n"
          f"published code, and so this one, has 109.3M.\nkernels: {', '.join(KERNELS) or 'none, plain PyTorch'}")


if __name__ == "__main__":
    main()
