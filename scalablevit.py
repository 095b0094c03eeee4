"""ScalableViT in one file, to be read beside the paper.

    ScalableViT: Rethinking the Context-oriented Generalization of Vision Transformer
    Rui Yang, Hailong Ma, Jie Wu, Yansong Tang, Xuefeng Xiao, Min Zheng, Xiu Li.  ECCV 2022.

In its order: patch embedding (3.1), SSA (3.2), window attention and LIM (3.3), PEG (3.4), the network (3.5, Table 1).
Tokens are (B, H, W, C) from the first patch embedding to the head: batch, rows, columns, channels; N = H W.

    M   side of a window (7)             r_n   SSA's spatial scale: N_rn = N r_n keys
    d   channels of one head             r_c   SSA's channel scale: C' = int(C r_c)
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
    """conv, which takes (B, C, H, W), of tokens (B, H, W, C).  Permuting makes views: nothing is copied."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def depthwise(dim, kernel_size=3):
    """A depthwise convolution, one filter per channel; zero padding keeps the size.  LIM, LEM and PEG are each one."""
    return nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)


# ---------------------------------------------------------------------------- 3.1 Overall architecture
class PatchEmbed(nn.Module):
    """Convolutional patch embedding (Section 3.1): (B, H, W, C_in) -> (B, ceil(H/stride), ceil(W/stride), C).

    7x7 with stride 4 before the first stage, 3x3 with stride 2 between stages; LayerNorm follows.
    """

    def __init__(self, in_dim, dim, kernel_size, stride):
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, kernel_size, stride, padding=kernel_size // 2)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x):
        return self.norm(convolve(self.conv, x))


# ---------------------------------------------------------------------------- 3.2 Scalable Self-Attention
def attention(q, k, v, scale, mask=None):
    """Softmax(Q K^T · scale) V, equation (1) with scale = 1/sqrt(d): q (…, n, d), k (…, m, d), v (…, m, d_v).

    mask (…, n or 1, m) is True where a query may see a key.  Returns (…, n, d_v).
    """
    scores = (q * scale) @ k.transpose(-2, -1)                                          # (…, n, m)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1) @ v


class SSA(nn.Module):
    """Scalable (multi-head) Self-Attention, Section 3.2: every token attends to a map scaled by r_n and r_c.

    Z' = Softmax(Q' K'^T / sqrt(d_k')) V',  d_k' = C r_c / heads                            (2)
    Q' = f_q(X): N x C',   K' = f_k(X): N_rn x C',   V' = f_v(X): N_rn x C                  (3)

    Why r_n: neighbouring tokens say much the same, one patch of sky what the next one says.  One key and one value for
    each cell of s x s tokens, r_n = 1/s², keep attention global at a fraction of its cost.  Deeper stages have fewer
    and less redundant tokens, so r_n grows to 1.
    Why r_c: the number of channels in which Q and K compare tokens need not follow from the input.  With more of them,
    r_c > 1 (S, B), they make up for the detail that cells lose; L has many to begin with and saves cost, r_c < 1.

    f_k and f_v share one reduction, a depthwise s x s convolution of stride s and a 1x1 convolution to C' channels,
    LayerNorm and GELU; a linear layer each follows.  (The paper prints f_v(V); its text and code take X.)  Zeros right
    and bottom fill up cells.  With r_n = 1, as published, C' = C and r_c is left in the scale of (2) alone.

    Cost of (2): N N_rn (C + C').  The paper calls this linear in N, as it is for a fixed N_rn; with Table 1's fixed
    ratio it is r_n N² (C + C'), quadratic with a small constant.
    """

    def __init__(self, dim, heads, rc=1.0, rn=1.0):
        super().__init__()
        self.heads, self.s = heads, round(rn ** -0.5)
        self.scale = (dim * rc / heads) ** -0.5                                         # 1/sqrt(d_k')
        scaled = int(dim * rc) if self.s > 1 else dim                                   # C'
        self.q = nn.Linear(dim, scaled)
        if self.s > 1:
            self.reduce = nn.Sequential(nn.Conv2d(dim, dim, self.s, stride=self.s, groups=dim),
                                        nn.Conv2d(dim, scaled, kernel_size=1))
            self.norm = nn.LayerNorm(scaled)           # the one LayerNorm with PyTorch's eps of 1e-5, as published
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
        q, k, v = (t.flatten(1, 2).unflatten(2, (self.heads, -1)).transpose(1, 2)       # (B, heads, N, C'/heads) and
                   for t in (q, k, v))                                                  # (B, heads, N_rn, …)
        z = attention(q, k, v, self.scale)                                              # (B, heads, N, C/heads)  (2)
        return self.proj(z.transpose(1, 2).reshape(B, H, W, C))


# ---------------------------------------------------------------------------- 3.3 Interactive window-based attention
def window_partition(qkv, heads, M):
    """Cut (B, H, W, 3C) into M x M windows, zeros beyond the right and bottom border: (3, B·windows, heads, M², d)."""
    H, W = qkv.shape[1:3]
    qkv = F.pad(qkv, (0, 0, 0, -W % M, 0, -H % M))                                      # (B, h·M, w·M, 3C)
    qkv = qkv.unflatten(3, (3, heads, -1)).unflatten(2, (-1, M)).unflatten(1, (-1, M))  # (B, h, M, w, M, 3, heads, d)
    qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7)                                           # (3, B, h, w, heads, M, M, d)
    return qkv.flatten(5, 6).flatten(1, 3)


def window_merge(z, H, W, M):
    """Put windows (B·windows, heads, M², d) back in place and cut off what is beyond the border: (B, H, W, C)."""
    z = z.unflatten(2, (M, M)).unflatten(0, (-1, -(-H // M), -(-W // M)))               # (B, h, w, heads, M, M, d)
    z = z.permute(0, 1, 4, 2, 5, 3, 6)                                                  # (B, h, M, w, M, heads, d)
    return z.flatten(5, 6).flatten(3, 4).flatten(1, 2)[:, :H, :W]


class WSA(nn.Module):
    """Window-based Self-Attention: every M x M window attends within itself.

    Z_n = Softmax(Q_n K_n^T / sqrt(d_k)) V_n                                                (4)

    A window that the border cuts attends over its real tokens only, as if that smaller window stood alone.
    Cost of (4): 2 M² N C, linear in N.  The three classes below differ from this one in one thing each.
    """

    def __init__(self, dim, heads, window=7):
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        return self.proj(self.attend(self.qkv(x)))

    def attend(self, qkv, top=0, left=0):
        """Z (B, H, W, C), the Z_n of (4) merged; of qkv (B, H, W, 3C) `top` rows and `left` columns are padding."""
        B, H, W, _ = qkv.shape
        M = min(self.window, max(H, W))                             # not larger than the map
        q, k, v = window_partition(qkv, self.heads, M)                                  # (B·windows, heads, M², d) each
        real = F.pad(qkv.new_ones(B, H - top, W - left, 3), (0, 0, left, 0, top, 0))    # padding is not to be seen
        mask = window_partition(real, 1, M)[0].transpose(-2, -1) > 0                    # (B·windows, 1, 1, M²)
        z = attention(q, k, v, q.shape[-1] ** -0.5, mask)                               # (B·windows, heads, M², d)  (4)
        return window_merge(z, H, W, M)


class SWSA(WSA):
    """WSA on windows that are shifted by half a window, as in Swin (Table 5(a)).

    Padding at the top and on the left moves the grid of windows, unless one window spans the whole axis.
    """

    def forward(self, x):
        top, left = (-(self.window // 2) % self.window if n > self.window else 0 for n in x.shape[1:3])
        qkv = F.pad(self.qkv(x), (0, 0, left, 0, top, 0))                               # (B, top + H, left + W, 3C)
        return self.proj(self.attend(qkv, top, left)[:, top:, left:])


class LEM(WSA):
    """WSA with a Local Enhanced Module (Section 3.3, Table 7): F is applied to each window's V_n on its own.

    Z'_n = Z_n + F(V_n): the convolution pads with zeros at every window's border and crosses none.
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

    F, a depthwise convolution of the re-merged value map V, links neighbouring windows; it pads the map's border alone.
    """

    def __init__(self, dim, heads, window=7):
        super().__init__(dim, heads, window)
        self.lim = depthwise(dim)

    def forward(self, x):
        qkv = self.qkv(x)                                                               # (B, H, W, 3C)
        v = qkv.chunk(3, dim=-1)[2]                                                     # V (B, H, W, C), not yet cut
        return self.proj(self.attend(qkv) + convolve(self.lim, v))                      # (5)


# ---------------------------------------------------------------------------- 3.4 Position encoding
class PEG(nn.Module):
    """Position encoding generator (Section 3.4): x + depthwise convolution, whose zero padding tells positions."""

    def __init__(self, dim):
        super().__init__()
        self.conv = depthwise(dim)              # learned, as published; the paper speaks of fixed weights

    def forward(self, x):
        return x + convolve(self.conv, x)


# ---------------------------------------------------------------------------- 3.5 Architecture variants
class Block(nn.Module):
    """A pre-norm Transformer block around one of the attentions above: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, attn, dim, mlp_ratio, drop_path_rate):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, hidden), gelu=nn.GELU(), fc2=nn.Linear(hidden, dim)))
        self.drop_path_rate = drop_path_rate

    def drop_path(self, x):
        """Stochastic depth: in training, a sample's residual branch is left out with probability drop_path_rate."""
        if not self.training or self.drop_path_rate == 0:
            return x
        keep = 1 - self.drop_path_rate
        return x * (x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep) / keep)

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


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
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing else block(x)
            if i == 0 and self.peg is not None:
                x = self.peg(x)
        return x


ATTENTION = {"wsa": WSA, "swsa": SWSA, "lem": LEM, "iwsa": IWSA, "ssa": SSA}


class ScalableViT(nn.Module):
    """The network (Section 3.5, Table 1): images (B, in_chans, H, W) of any size -> logits (B, num_classes).

    num_classes     0: no classifier, the pooled features (B, C of the last stage) come out
    dim             channels C of the first stage; they double from stage to stage
    depths, heads, rc, rn   one entry per stage, as in Table 1: blocks, heads, and SSA's two scales
    window, mlp_ratio       M, the side of a window in tokens; hidden channels of the MLP over C
    drop_path_rate  stochastic depth, rising linearly from 0 at the first block to this at the last
    peg             whether a PEG follows the first block of each stage (Table 5(b))
    pattern         two kinds of attention that take turns over a stage; with `peg` and `rc`: Tables 5(a), 5(b), 7
    head_hidden     width of the two-layer head that the published models have; None: a single linear layer

    ScalableViT(**model.config) builds the same network anew.  Raises ValueError: see `check_arguments`.
    """

    def __init__(self, in_chans=3, num_classes=1000, dim=64, depths=(2, 2, 20, 2), heads=(2, 4, 8, 16),
                 rc=(1.25, 1.25, 1.25, 1.0), rn=(1 / 64, 1 / 16, 1 / 4, 1), window=7, mlp_ratio=4.0,
                 drop_path_rate=0.0, peg=True, pattern=("iwsa", "ssa"), head_hidden=4096):
        super().__init__()
        self.config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        check_arguments(**self.config)
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()     # one for each block
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
        """Put a freshly initialised head of the same form in place, for num_classes classes (0: none)."""
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
        """Names of the parameters that the recipe leaves out of weight decay: biases, norms and the PEG."""
        return {name for name, p in self.named_parameters() if p.ndim == 1 or ".peg." in name}

    def set_grad_checkpointing(self, enable=True):
        """Recompute each block in the backward pass instead of keeping its activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable


def check_arguments(dim, depths, heads, rc, rn, window, drop_path_rate, pattern, **_):
    """Raises ValueError for what would build another network than was meant, without a word from PyTorch."""
    if not len(depths) == len(heads) == len(rc) == len(rn) > 0:
        raise ValueError(f"depths, heads, rc, rn must have one entry per stage, got {depths=}, {heads=}, {rc=}, {rn=}")
    if len(pattern) != 2 or not {*pattern} <= {*ATTENTION}:
        raise ValueError(f"pattern must be two of {', '.join(ATTENTION)}, got {pattern!r}")
    if min(dim, window, *depths, *heads) < 1:
        raise ValueError(f"dim, window, depths, heads must be at least 1, got {dim=}, {window=}, {depths=}, {heads=}")
    if not 0 <= drop_path_rate < 1:
        raise ValueError(f"drop_path_rate must be in [0, 1), got {drop_path_rate}")
    for i, (h, c, n) in enumerate(zip(heads, rc, rn)):
        if not 0 < n <= 1 or abs(round(n ** -0.5) ** 2 * n - 1) > 1e-6:
            raise ValueError(f"rn must be 1/integer² (1, 1/4, 1/9, 1/16, ...), got {n}")
        C, scaled = dim * 2 ** i, int(dim * 2 ** i * c)                                 # C'
        if C % h or not c > 0 or "ssa" in pattern and n < 1 and (scaled < 1 or scaled % h):
            raise ValueError(f"heads must divide C and C' = int(C·rc) > 0, got heads={h}, C={C}, rc={c}, C'={scaled}")


def init_weights(module):
    """The published initialisation; LayerNorm keeps PyTorch's 1 and 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels / module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        nn.init.zeros_(module.bias)


# Table 1.  They take every argument of `ScalableViT`: scalablevit_s(num_classes=10).
scalablevit_s = partial(ScalableViT, dim=64, depths=(2, 2, 20, 2), heads=(2, 4, 8, 16), rc=(1.25, 1.25, 1.25, 1.0))
scalablevit_b = partial(ScalableViT, dim=96, depths=(2, 2, 14, 6), heads=(3, 6, 12, 24), rc=(2.0, 1.25, 1.25, 1.0))
scalablevit_l = partial(ScalableViT, dim=128, depths=(2, 6, 12, 4), heads=(4, 8, 16, 32), rc=(0.25, 0.5, 1.0, 1.0))
# Not in the paper: a small one for laptops and lessons, good at 64 to 112 pixels.
scalablevit_tiny = partial(ScalableViT, dim=24, depths=(2, 2, 4, 2), heads=(1, 2, 4, 8), head_hidden=None)


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
    """A published model's state dict, with either head, under the names used here; `kv` becomes `k` and `v`.

    Raises ValueError for a name that the published models do not have.
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
    """What a published model was built with besides Table 1.

    S, B and L have the two-layer head, the default here.  One more S (`small_0` in their code) has the plain head, and
    r_c = 1.25 in all four stages.
    """
    return dict(head_hidden=None, rc=(1.25, 1.25, 1.25, 1.25)) if "head.weight" in state_dict else {}


# ---------------------------------------------------------------------------- Cost
def count_macs(model, size):
    """Multiply-accumulates of one image of `size` (H, W), counted by PyTorch without computing anything.

    {"modules": convolutions and linear layers, the paper's FLOPs; "attention": Q K^T and A V, which it leaves out}.
    What is computed is counted: where the border cuts a window or a cell of SSA's, the padding too.
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
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), default=(224, 224), help="of an image")
    H, W = parser.parse_args().size
    if min(H, W) < 1:
        parser.error(f"--size takes two positive integers, got {H} {W}")
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
