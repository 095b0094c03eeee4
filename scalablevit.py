"""ScalableViT in one file, to be read alongside the paper.  MIT license.

    ScalableViT: Rethinking the Context-oriented Generalization of Vision Transformer
    Rui Yang, Hailong Ma, Jie Wu, Yansong Tang, Xuefeng Xiao, Min Zheng, Xiu Li.  ECCV 2022.

The file follows the paper's order: patch embedding (Section 3.1), SSA (3.2), window attention and LIM (3.3), PEG (3.4)
and the network (3.5, Table 1).  Tokens have shape (B, H, W, C) throughout: batch, rows, columns, channels; N = H W.

    M   window size (7 x 7 tokens)       r_n   SSA's spatial scale: N_rn = N r_n keys and values
    d   channels per head                r_c   SSA's channel scale: C' = int(C r_c)
"""
import argparse
import math
import re
from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode


def convolve(conv, x):
    """Apply a convolution, which expects (B, C, H, W), to tokens (B, H, W, C).  `permute` does not copy."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def depthwise(dim, kernel_size=3):
    """Depthwise convolution (one filter per channel), zero-padded to keep the size: used for LIM, LEM and PEG."""
    return nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)


# ---------------------------------------------------------------------------- 3.1 Overall architecture
class PatchEmbed(nn.Module):
    """Convolutional patch embedding (Section 3.1): (B, H, W, C_in) -> (B, ceil(H/stride), ceil(W/stride), C).

    A strided convolution (7x7, stride 4 in the first stage; 3x3, stride 2 in the others), then LayerNorm.
    """

    def __init__(self, in_dim, dim, kernel_size, stride):
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, kernel_size, stride, padding=kernel_size // 2)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x):
        return self.norm(convolve(self.conv, x))


# ---------------------------------------------------------------------------- 3.2 Scalable Self-Attention
def attention(q, k, v, scale, mask=None):
    """Softmax(Q K^T · scale) V: equation (1), with scale = 1/sqrt(d).  q (…, n, d), k (…, m, d), v (…, m, d_v).

    mask (…, n or 1, m) is True where a query may attend to a key.  Returns (…, n, d_v).
    """
    scores = (q * scale) @ k.transpose(-2, -1)                                          # (…, n, m)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1) @ v


class SSA(nn.Module):
    """Scalable Self-Attention (Section 3.2): all tokens attend to N r_n cells of the map, compared in C r_c channels.

    Z' = Softmax(Q' K'^T / sqrt(d_k')) V',  d_k' = C r_c / heads                            (2)
    Q' = f_q(X): N x C',   K' = f_k(X): N_rn x C',   V' = f_v(X): N_rn x C                  (3)

    Why r_n: neighboring tokens are redundant; one patch of sky looks like the next.  With one key and one value for a
    cell of s x s tokens (r_n = 1/s²), attention stays global at a fraction of the cost.  Deeper stages have fewer and
    less redundant tokens, so r_n grows to 1.
    Why r_c: Q and K need not be as wide as the input.  Extra channels (r_c > 1 in S and B) compensate for the detail
    lost by merging tokens into cells; L is wide already, with r_c < 1 in its first two stages.

    f_k and f_v share one reduction: a depthwise s x s convolution with stride s, a 1x1 convolution to C' channels,
    LayerNorm, GELU.  Each then has its own linear layer.  (These are the published code's layers; the paper says only
    "convolutions" and "linear projections".  It prints f_v(V) in (3), but means X.)  Zeros on the right and bottom
    complete the last cells.  If r_n = 1, nothing is reduced, C' = C, and r_c changes only the scale in (2), as in the
    published code.

    MACs of (2): N N_rn (C + C').  The paper calls this linear in N, which is true for a fixed number of keys, N_rn.
    With a fixed r_n the keys grow with N, and it is r_n N² (C + C'): quadratic with a small constant.
    """

    def __init__(self, dim, heads, rc=1.0, rn=1.0):
        super().__init__()
        self.heads, self.s = heads, round(rn ** -0.5)                                   # r_n = 1/s²
        self.scale = (dim * rc / heads) ** -0.5                                         # 1/sqrt(d_k')
        scaled = int(dim * rc) if self.s > 1 else dim                                   # C'
        self.q = nn.Linear(dim, scaled)
        if self.s > 1:
            self.reduce = nn.Sequential(nn.Conv2d(dim, dim, self.s, stride=self.s, groups=dim),
                                        nn.Conv2d(dim, scaled, kernel_size=1))
            self.norm = nn.LayerNorm(scaled)           # eps 1e-5, all others 1e-6: both as published
        self.k = nn.Linear(scaled, scaled)
        self.v = nn.Linear(scaled, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, H, W, C = x.shape
        reduced = x
        if self.s > 1:
            reduced = convolve(self.reduce, F.pad(x, (0, 0, 0, -W % self.s, 0, -H % self.s)))
            reduced = F.gelu(self.norm(reduced))                                        # (B, ⌈H/s⌉, ⌈W/s⌉, C')
        q, k, v = self.q(x), self.k(reduced), self.v(reduced)                           # (3)
        q, k, v = (t.flatten(1, 2).unflatten(2, (self.heads, -1)).transpose(1, 2)       # Q' (B, heads, N, C'/heads),
                   for t in (q, k, v))                                                  # K', V' (B, heads, N_rn, …)
        z = attention(q, k, v, self.scale)                                              # (B, heads, N, C/heads)  (2)
        return self.proj(z.transpose(1, 2).reshape(B, H, W, C))


# ---------------------------------------------------------------------------- 3.3 Interactive window-based attention
def window_partition(qkv, heads, M):
    """Split (B, H, W, 3C), zero-padded right and bottom, into M x M windows: (3, B·windows, heads, M², d)."""
    H, W = qkv.shape[1:3]
    qkv = F.pad(qkv, (0, 0, 0, -W % M, 0, -H % M))                                      # (B, h·M, w·M, 3C)
    qkv = qkv.unflatten(3, (3, heads, -1)).unflatten(2, (-1, M)).unflatten(1, (-1, M))  # (B, h, M, w, M, 3, heads, d)
    qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7)                                           # (3, B, h, w, heads, M, M, d)
    return qkv.flatten(5, 6).flatten(1, 3)


def window_merge(z, H, W, M):
    """Undo the partition: windows (B·windows, heads, M², d) -> map (B, H, W, C), with the padding cropped."""
    z = z.unflatten(2, (M, M)).unflatten(0, (-1, -(-H // M), -(-W // M)))               # (B, h, w, heads, M, M, d)
    z = z.permute(0, 1, 4, 2, 5, 3, 6)                                                  # (B, h, M, w, M, heads, d)
    return z.flatten(5, 6).flatten(3, 4).flatten(1, 2)[:, :H, :W]


class WSA(nn.Module):
    """Window-based Self-Attention: tokens attend only within their own M x M window.

    Z_n = Softmax(Q_n K_n^T / sqrt(d_k)) V_n                                                (4)

    Padding is masked: a window cut off by the map's border attends over its real tokens only.  (At 224 x 224 there is
    no padding.)  MACs of (4): 2 M² N C, linear in N.  The three classes below change one thing each.
    """

    def __init__(self, dim, heads, window=7):
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        return self.proj(self.attend(self.qkv(x)))

    def attend(self, qkv, top=0, left=0):
        """qkv (B, H, W, 3C) -> merged Z_n of (4), (B, H, W, C).  The first `top` rows, `left` columns are padding."""
        B, H, W, _ = qkv.shape
        M = min(self.window, max(H, W))                             # a small map is one window
        q, k, v = window_partition(qkv, self.heads, M)                                  # (B·windows, heads, M², d)
        real = F.pad(qkv.new_ones(B, H - top, W - left, 3), (0, 0, left, 0, top, 0))  # like qkv: 1 if real, else 0
        mask = window_partition(real, 1, M)[0].transpose(-2, -1) > 0                    # (B·windows, 1, 1, M²)
        z = attention(q, k, v, q.shape[-1] ** -0.5, mask)                              # (B·windows, heads, M², d) (4)
        return window_merge(z, H, W, M)


class SWSA(WSA):
    """WSA with windows shifted by half a window, as in Swin (Table 5(a)).

    Padding the top and left by M - M//2 shifts the grid (Swin rolls the map).  An axis of one window is not shifted.
    """

    def forward(self, x):
        top, left = (-(self.window // 2) % self.window if n > self.window else 0 for n in x.shape[1:3])
        qkv = F.pad(self.qkv(x), (0, 0, left, 0, top, 0))                               # (B, top + H, left + W, 3C)
        return self.proj(self.attend(qkv, top, left)[:, top:, left:])


class LEM(WSA):
    """WSA with the Local Enhanced Module (Section 3.3, Table 7): Z'_n = Z_n + F(V_n), window by window.

    The depthwise convolution F zero-pads every window, so no information crosses window borders.
    """

    def __init__(self, dim, heads, window=7):
        super().__init__(dim, heads, window)
        self.lem = depthwise(dim)

    def forward(self, x):
        _, H, W, C = x.shape
        M = min(self.window, max(H, W))
        qkv = self.qkv(x)                                                               # (B, H, W, 3C)
        v = window_partition(qkv, 1, M)[2].unflatten(2, (M, M)).squeeze(1)              # V_n (B·windows, M, M, C)
        y = convolve(self.lem, v).flatten(1, 2).unsqueeze(1)                            # (B·windows, 1, M², C)
        return self.proj(self.attend(qkv) + window_merge(y, H, W, M))


class IWSA(WSA):
    """Interactive Window-based Self-Attention: WSA with the Local Interactive Module (LIM), Section 3.3.

    Z' = Z + F(V)                                                                           (5)

    F is a depthwise convolution of the whole value map V, not cut into windows, so it connects neighboring windows.
    """

    def __init__(self, dim, heads, window=7):
        super().__init__(dim, heads, window)
        self.lim = depthwise(dim)

    def forward(self, x):
        qkv = self.qkv(x)                                                               # (B, H, W, 3C)
        v = qkv.chunk(3, dim=-1)[2]                                                     # V (B, H, W, C), the whole map
        return self.proj(self.attend(qkv) + convolve(self.lim, v))                      # (5)


# ---------------------------------------------------------------------------- 3.4 Position encoding
class PEG(nn.Module):
    """Position Encoding Generator (3.4): x + DWConv(x).  Zero padding reveals positions; as LIM, it joins windows."""

    def __init__(self, dim):
        super().__init__()
        self.conv = depthwise(dim)              # learned, as in the published code; the paper says fixed weights

    def forward(self, x):
        return x + convolve(self.conv, x)


# ---------------------------------------------------------------------------- 3.5 Architecture variants
class Block(nn.Module):
    """Pre-norm Transformer block with one of the attention modules above: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, attn, dim, mlp_ratio, drop_path_rate):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, hidden), gelu=nn.GELU(), fc2=nn.Linear(hidden, dim)))
        self.drop_path_rate = drop_path_rate

    def drop_path(self, x):
        """Stochastic depth: in training, drop each sample's residual branch with probability drop_path_rate."""
        if not self.training or self.drop_path_rate == 0:
            return x
        keep = 1 - self.drop_path_rate
        return x * (x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep) / keep)

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """Patch embedding, first block, PEG, remaining blocks (Figure 2)."""

    def __init__(self, embed, blocks, peg):
        super().__init__()
        self.embed = embed
        self.blocks = nn.ModuleList(blocks)
        self.peg = peg
        self.grad_checkpointing = False

    def forward(self, x):
        x = self.embed(x)
        for i, block in enumerate(self.blocks):
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing else block(x)
            if i == 0 and self.peg is not None:
                x = self.peg(x)
        return x


ATTENTION = {"wsa": WSA, "swsa": SWSA, "lem": LEM, "iwsa": IWSA, "ssa": SSA}


class ScalableViT(nn.Module):
    """The network (Section 3.5, Table 1): images (B, in_chans, H, W) of any size -> logits (B, num_classes).

    num_classes     0 for no classifier: the output is the pooled features (B, C of the last stage)
    dim             channels C of the first stage; they double with each stage
    depths, heads, rc, rn   per stage, as in Table 1: number of blocks, number of heads, SSA's r_c and r_n
    window, mlp_ratio       window size M in tokens; hidden width of the MLP as a multiple of C
    drop_path_rate  stochastic depth rate of the last block, rising linearly from 0 at the first
    peg             whether a PEG follows the first block of each stage (Table 5(b))
    pattern         the two kinds of attention that alternate in each stage (Tables 5(a) and 7)
    head_hidden     hidden width of the published models' two-layer head; None for a single linear layer

    ScalableViT(**model.config) rebuilds the same architecture.  Arguments that do not fit together raise ValueError.
    """

    def __init__(self, in_chans=3, num_classes=1000, dim=64, depths=(2, 2, 20, 2), heads=(2, 4, 8, 16),
                 rc=(1.25, 1.25, 1.25, 1.0), rn=(1 / 64, 1 / 16, 1 / 4, 1), window=7, mlp_ratio=4.0,
                 drop_path_rate=0.0, peg=True, pattern=("iwsa", "ssa"), head_hidden=4096):
        super().__init__()
        self.config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        check_arguments(**self.config)
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()     # one per block
        self.stages = nn.ModuleList()
        for i, depth in enumerate(depths):
            C = dim * 2 ** i
            embed = PatchEmbed(in_chans, C, 7, 4) if i == 0 else PatchEmbed(C // 2, C, 3, 2)
            blocks = []
            for j in range(depth):
                kind = pattern[j % 2]
                attn = SSA(C, heads[i], rc[i], rn[i]) if kind == "ssa" else ATTENTION[kind](C, heads[i], window)
                blocks.append(Block(attn, C, mlp_ratio, rates.pop(0)))
            self.stages.append(Stage(embed, blocks, PEG(C) if peg else None))
        self.num_features = C
        self.norm = nn.LayerNorm(C, eps=1e-6)
        self.apply(init_weights)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes):
        """Replace the head by a freshly initialized one of the same kind for num_classes classes (0: no head)."""
        C, hidden = self.num_features, self.config["head_hidden"]
        if num_classes == 0:
            self.head = nn.Identity()
        elif hidden is None:
            self.head = nn.Linear(C, num_classes)
        else:
            self.head = nn.Sequential(nn.Linear(C, hidden), nn.LayerNorm(hidden, eps=1e-6), nn.GELU(),
                                      nn.Linear(hidden, num_classes))
        self.head.to(self.norm.weight.device, self.norm.weight.dtype).apply(init_weights)
        self.num_classes = self.config["num_classes"] = num_classes

    def forward_features(self, images):
        """Images (B, in_chans, H, W) -> one map per stage, (B, C_i, ⌈H/s⌉, ⌈W/s⌉) with s = 4, 8, 16, 32."""
        x, maps = images.permute(0, 2, 3, 1), []                                        # (B, H, W, in_chans)
        for stage in self.stages:
            x = stage(x)                                                                # (B, H_i, W_i, C_i)
            maps.append(x.permute(0, 3, 1, 2))
        return maps

    def forward(self, images):
        x = self.forward_features(images)[-1].permute(0, 2, 3, 1)                       # (B, H_4, W_4, C_4)
        return self.head(self.norm(x).mean(dim=(1, 2)))                                 # (B, num_classes)

    def no_weight_decay(self):
        """Names of the parameters exempt from weight decay, as published: one-dimensional ones and the PEG's."""
        return {name for name, p in self.named_parameters() if p.ndim == 1 or ".peg." in name}

    def set_grad_checkpointing(self, enable=True):
        """Recompute each block in the backward pass instead of keeping its activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable


def check_arguments(dim, depths, heads, rc, rn, window, drop_path_rate, pattern, **_):
    """Raise ValueError for arguments that would build a network that is wrong or fails later."""
    if not len(depths) == len(heads) == len(rc) == len(rn) > 0:
        raise ValueError(f"depths, heads, rc, rn must have one entry per stage, got {depths=}, {heads=}, {rc=}, {rn=}")
    if len(pattern) != 2 or not {*pattern} <= {*ATTENTION}:
        raise ValueError(f"pattern must be two of {', '.join(ATTENTION)} (or twice the same), got {pattern!r}")
    if min(dim, window, *depths, *heads) < 1:
        raise ValueError(f"dim, window, depths, heads must be at least 1, got {dim=}, {window=}, {depths=}, {heads=}")
    if not 0 <= drop_path_rate < 1:
        raise ValueError(f"drop_path_rate must be in [0, 1), got {drop_path_rate}")
    for i, (h, c, n) in enumerate(zip(heads, rc, rn)):
        if not 0 < n <= 1 or abs(round(n ** -0.5) ** 2 * n - 1) > 1e-6:
            raise ValueError(f"rn must be 1/integer² (1, 1/4, 1/9, 1/16, ...), got {n}")
        C, scaled = dim * 2 ** i, int(dim * 2 ** i * c)                                 # C'
        if C % h or not c > 0 or ("ssa" in pattern and n < 1 and (scaled < 1 or scaled % h)):
            raise ValueError(f"heads must divide C and C' = int(C·rc) > 0, got heads={h}, C={C}, rc={c}, C'={scaled}")


def init_weights(module):
    """Initialization of the published code; LayerNorm keeps PyTorch's default (weight 1, bias 0)."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels / module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        nn.init.zeros_(module.bias)


# Table 1.  All arguments of `ScalableViT` can be passed: scalablevit_s(num_classes=10).
scalablevit_s = partial(ScalableViT, dim=64, depths=(2, 2, 20, 2), heads=(2, 4, 8, 16), rc=(1.25, 1.25, 1.25, 1.0))
scalablevit_b = partial(ScalableViT, dim=96, depths=(2, 2, 14, 6), heads=(3, 6, 12, 24), rc=(2.0, 1.25, 1.25, 1.0))
scalablevit_l = partial(ScalableViT, dim=128, depths=(2, 6, 12, 4), heads=(4, 8, 16, 32), rc=(0.25, 0.5, 1.0, 1.0))
# Not in the paper: a small model for laptops and teaching, meant for images of 56 to 112 pixels.
scalablevit_tiny = partial(ScalableViT, dim=24, depths=(2, 2, 4, 2), heads=(1, 2, 4, 8), head_hidden=None)


# ---------------------------------------------------------------------------- Published weights
OFFICIAL_NAMES = [  # (published name, name here), both without the final .weight or .bias
    (r"patch_embeds\.(\d+)\.proj", r"stages.\1.embed.conv"),
    (r"patch_embeds\.(\d+)\.norm", r"stages.\1.embed.norm"),
    (r"pos_block\.(\d+)\.proj\.0", r"stages.\1.peg.conv"),
    (r"stages\.(\d+)\.(\d+)\.(norm1|norm2|mlp\.fc1|mlp\.fc2)", r"stages.\1.blocks.\2.\3"),
    (r"stages\.(\d+)\.(\d+)\.attn\.(qkv|q|k|v|kv|proj)", r"stages.\1.blocks.\2.attn.\3"),
    (r"stages\.(\d+)\.(\d+)\.attn\.lim_func", r"stages.\1.blocks.\2.attn.lim"),
    (r"stages\.(\d+)\.(\d+)\.attn\.reduction\.([01])", r"stages.\1.blocks.\2.attn.reduce.\3"),
    (r"stages\.(\d+)\.(\d+)\.attn\.norm_act\.0", r"stages.\1.blocks.\2.attn.norm"),
    (r"(norm|head|head\.[013])", r"\1"),                                        # single-layer and two-layer head
]


def convert_official(state_dict):
    """Rename a published model's parameters to the names used here, and split `kv` into `k` and `v`.

    Raises ValueError for a name that no published model has.
    """
    converted = {}
    for key, tensor in state_dict.items():
        layer, _, parameter = key.rpartition(".")
        names = [re.sub(theirs, ours, layer) for theirs, ours in OFFICIAL_NAMES if re.fullmatch(theirs, layer)]
        if not names or parameter not in ("weight", "bias"):
            raise ValueError(f"{key!r} is not a parameter of a published ScalableViT")
        if names[0].endswith(".kv"):
            k, v = tensor.chunk(2)
            converted |= {f"{names[0][:-2]}k.{parameter}": k, f"{names[0][:-2]}v.{parameter}": v}
        else:
            converted[f"{names[0]}.{parameter}"] = tensor
    return converted


def official_kwargs(state_dict):
    """Constructor arguments in which a published checkpoint differs from scalablevit_s, _b or _l.

    S, B and L have the two-layer head, the default here.  A second S (`small_0` in the published code) has a single
    linear layer as its head, and r_c = 1.25 in all four stages.
    """
    return dict(head_hidden=None, rc=(1.25, 1.25, 1.25, 1.25)) if "head.weight" in state_dict else {}


# ---------------------------------------------------------------------------- Cost
def count_macs(model, size):
    """Multiply-accumulates for one image of `size` (H, W), counted by PyTorch on the meta device.

    {"modules": convolutions and linear layers, the paper's FLOPs of B and L; "attention": Q K^T and A V, which those
    leave out}.  Padded tokens count too, in windows as in SSA's cells.
    """
    meta = {name: t.to("meta") for name, t in [*model.named_parameters(), *model.named_buffers()]}
    image = torch.empty(1, model.config["in_chans"], *size, device="meta", dtype=model.norm.weight.dtype)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        torch.func.functional_call(model, meta, image)
    macs = {str(op): flops // 2 for op, flops in counter.get_flop_counts()["Global"].items()}
    attention = macs.pop("aten.bmm", 0)                             # matrix products of two activations
    return {"modules": sum(macs.values()), "attention": attention}


def main():
    parser = argparse.ArgumentParser(description="Parameters and cost of the ScalableViT models.")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), default=(224, 224), help="image size")
    H, W = parser.parse_args().size
    if min(H, W) < 1:
        parser.error(f"--size must be two positive integers, got {H} {W}")
    print(f"{f'image of {H}x{W}':18}{'parameters':>12}{'MACs':>11}{'with QK^T, AV':>16}{'Table 2, at 224x224':>22}")
    for build, name, table2 in ((scalablevit_tiny, "tiny", "-"), (scalablevit_s, "s", "32M, 4.2G"),
                                (scalablevit_b, "b", "81M, 8.6G"), (scalablevit_l, "l", "104M, 14.7G")):
        with torch.device("meta"):                                                      # shapes without memory
            model = build()
        cost = count_macs(model, (H, W))
        print(f"{f'scalablevit_{name}':18}{sum(p.numel() for p in model.parameters()):>12,}"
              f"{cost['modules'] / 1e9:>10.3f}G{sum(cost.values()) / 1e9:>15.3f}G{table2:>22}")


if __name__ == "__main__":
    main()
