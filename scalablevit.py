"""ScalableViT in one file, to be read alongside the paper.  MIT license.

    ScalableViT: Rethinking the Context-oriented Generalization of Vision Transformer
    Rui Yang, Hailong Ma, Jie Wu, Yansong Tang, Xuefeng Xiao, Min Zheng, Xiu Li.  ECCV 2022.

The order is the paper's.  Tokens have shape (B, H, W, C): batch, rows, columns, channels; N = H W.

    M   window size (7 x 7 tokens)       r_n   SSA's spatial scale: N_rn = N r_n keys and values
    d   channels per head                r_c   SSA's channel scale: C' = int(C r_c)
"""
import argparse
import copy
import math
import re
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode


def convolve(conv, x):
    """Apply a convolution, which expects (B, C, H, W), to tokens (B, H, W, C), without a copy."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def layer_norm(dim):
    """LayerNorm as the published code sets it, everywhere but inside SSA."""
    return nn.LayerNorm(dim, eps=1e-6)


def pad_to_multiple(x, n):
    """Pad (B, H, W, C) with zeros on the right and bottom until n divides H and W."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % n, 0, -x.shape[1] % n))


def depthwise(dim, kernel_size=3):
    """Depthwise convolution (one filter per channel), zero-padded to keep the size."""
    return nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)


# ---------------------------------------------------------------------------- 3.1 Overall architecture
class PatchEmbed(nn.Module):
    """(B, H, W, C_in) -> (B, ⌈H/stride⌉, ⌈W/stride⌉, C): a strided convolution, then LayerNorm."""
    def __init__(self, in_dim, dim, kernel_size, stride):
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, kernel_size, stride, padding=kernel_size // 2)
        self.norm = layer_norm(dim)

    def forward(self, x):
        return self.norm(convolve(self.conv, x))


# ---------------------------------------------------------------------------- 3.2 Scalable Self-Attention
def attention(q, k, v, scale, mask=None):
    """Softmax(Q K^T · scale) V: equation (1), with scale = 1/sqrt(d_k); mask is True for the keys seen."""
    # q (…, n, d), k (…, m, d), v (…, m, d_v), mask (…, n or 1, m) -> (…, n, d_v)
    scores = (q * scale) @ k.transpose(-2, -1)                      # (…, n, m)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1) @ v


def split_heads(x, heads):
    """Give each head its d = C/heads channels: (…, n, C) -> (…, heads, n, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def merge_heads(z):
    """Undo `split_heads`: (…, heads, n, d) -> (…, n, C)."""
    return z.transpose(-3, -2).flatten(-2)


class SSA(nn.Module):
    """Scalable Self-Attention: all tokens attend to N_rn = ⌈H/s⌉·⌈W/s⌉ cells of the map.

    Z' = Softmax(Q' K'^T / sqrt(d_k')) V',  d_k' = C r_c / heads                            (2)
    Q' = f_q(X): N x C',   K' = f_k(X): N_rn x C',   V' = f_v(X): N_rn x C                  (3)

    Why r_n: neighboring tokens are redundant; one patch of sky looks like the next.  One key and
    one value for a cell of s x s tokens (r_n = 1/s²) keep attention global at a fraction of the
    cost.  Deeper stages have fewer, less redundant tokens: r_n grows to 1.  Why r_c: Q and K need
    not be as wide as the input.  Extra channels (r_c > 1 in S and B) make up for the detail lost in
    cells; L is wide already, with r_c < 1 in its first two stages.

    f_k and f_v share a depthwise s x s convolution with stride s, a 1x1 convolution to C' channels,
    LayerNorm and GELU; each adds a linear layer.  (So the published code; the paper does not name the
    layers, and its f_v(V) must be f_v(X).)  Cells cut off by the edge of the map are filled with zeros,
    without a mask.  If r_n = 1, Q' and K' have C channels; r_c then only enters the scale, as published.
    MACs of (2): N N_rn (C + C').  The paper calls this linear in N, which is true for a fixed
    number of keys.  With a fixed r_n it is r_n N² (C + C'): quadratic with a small constant.
    """
    def __init__(self, dim, heads, rc=1.0, rn=1.0):
        super().__init__()
        self.heads = heads
        self.s = round(rn ** -0.5)                                  # r_n = 1/s²
        self.scale = (dim * rc / heads) ** -0.5                     # 1/sqrt(d_k')
        scaled = int(dim * rc) if self.s > 1 else dim               # C'
        self.q = nn.Linear(dim, scaled)
        if self.s > 1:
            self.reduce = nn.Sequential(nn.Conv2d(dim, dim, self.s, self.s, groups=dim), nn.Conv2d(dim, scaled, 1))
            self.norm = nn.LayerNorm(scaled)    # PyTorch's eps; why only here, nobody has said
        self.k = nn.Linear(scaled, scaled)
        self.v = nn.Linear(scaled, dim)
        self.proj = nn.Linear(dim, dim)

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


# ---------------------------------------------------------------------------- 3.3 Interactive window-based attention
def window_partition(x, M):
    """Cut a map (B, H, W, C) into windows of M x M tokens, the last ones padded: (B·windows, M², C)."""
    x = pad_to_multiple(x, M)                                       # (B, h·M, w·M, C)
    x = x.unflatten(2, (-1, M)).unflatten(1, (-1, M))               # (B, h, M, w, M, C)
    x = x.transpose(2, 3).clone(memory_format=torch.contiguous_format)  # (B, h, w, M, M, C)
    return x.flatten(3, 4).flatten(0, 2)


def window_merge(windows, H, W, M):
    """Undo the partition: (B·windows, M², C) -> (B, H, W, C), with the padding cropped."""
    x = windows.unflatten(1, (M, M)).unflatten(0, (-1, -(-H // M), -(-W // M)))     # h = ⌈H/M⌉, w = ⌈W/M⌉
    x = x.transpose(2, 3).clone(memory_format=torch.contiguous_format)  # (B, h, M, w, M, C)
    return x.flatten(3, 4).flatten(1, 2)[:, :H, :W]


class WSA(nn.Module):
    """Window-based Self-Attention: tokens attend only within their own M x M window.

    Z_n = Softmax(Q_n K_n^T / sqrt(d_k)) V_n,  2 M² N C MACs in all: linear in N            (4)

    Padding is masked: a window cut off by the map's border attends over its real tokens only.
    """
    def __init__(self, dim, heads, window=7):
        super().__init__()
        self.heads = heads
        self.window = window
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        return self.proj(self.attend(self.qkv(x)))

    def attend(self, qkv, top=0, left=0):
        """qkv (B, H, W, 3C), with `top` rows and `left` columns of padding -> merged Z_n of (4)."""
        B, H, W, _ = qkv.shape
        M = min(self.window, max(H, W))                             # small map: one square window
        qkv_n = window_partition(qkv, M).unflatten(2, (3, -1)).movedim(2, 0)    # (3, B·windows, M², C)
        q, k, v = split_heads(qkv_n, self.heads).contiguous()       # (B·windows, heads, M², d) each
        real = F.pad(qkv.new_ones(B, H - top, W - left, 1), (0, 0, left, 0, top, 0))
        mask = window_partition(real, M).transpose(-2, -1) > 0      # (B·windows, 1, M²)
        z = attention(q, k, v, q.shape[-1] ** -0.5, mask[:, None])  # (4), for each window and head
        return window_merge(merge_heads(z), H, W, M)


class SWSA(WSA):
    """WSA with windows shifted by half a window, as in Swin (Table 5(a)); not along an axis of one window."""
    def forward(self, x):
        shift = math.ceil(self.window / 2)      # padding; Swin rolls the map instead
        top = shift if x.shape[1] > self.window > 1 else 0
        left = shift if x.shape[2] > self.window > 1 else 0
        qkv = F.pad(self.qkv(x), (0, 0, left, 0, top, 0))           # (B, top + H, left + W, 3C)
        return self.proj(self.attend(qkv, top, left)[:, top:, left:])


class LEM(WSA):
    """WSA with the Local Enhanced Module (Table 7): Z'_n = Z_n + F(V_n).

    F, a depthwise convolution, pads every window with zeros, so nothing crosses window borders.  It
    runs over padded tokens too: where the map does not fill its windows it costs more than LIM.
    """
    def __init__(self, dim, heads, window=7):
        super().__init__(dim, heads, window)
        self.lem = depthwise(dim)

    def forward(self, x):
        H, W = x.shape[1:3]
        M = min(self.window, max(H, W))                             # as in attend
        qkv = self.qkv(x)                                           # (B, H, W, 3C)
        v = qkv.chunk(3, -1)[2]                                     # V (B, H, W, C)
        v_n = window_partition(v, M).unflatten(1, (M, M))           # V_n (B·windows, M, M, C)
        y_n = convolve(self.lem, v_n).flatten(1, 2)                 # F(V_n) (B·windows, M², C)
        return self.proj(self.attend(qkv) + window_merge(y_n, H, W, M))


class IWSA(WSA):
    """Interactive Window-based Self-Attention: the Local Interactive Module (LIM) joins windows.

    Z' = Z + F(V),  where F is a depthwise convolution of the whole value map V             (5)
    """
    def __init__(self, dim, heads, window=7):
        super().__init__(dim, heads, window)
        self.lim = depthwise(dim)

    def forward(self, x):
        qkv = self.qkv(x)                                           # (B, H, W, 3C)
        v = qkv.chunk(3, -1)[2]                                     # V (B, H, W, C), the whole map
        return self.proj(self.attend(qkv) + convolve(self.lim, v))  # (5)


# ---------------------------------------------------------------------------- 3.4 Position encoding
class PEG(nn.Module):
    """Position Encoding Generator: x + DWConv(x).  Zero padding reveals where a token is."""
    def __init__(self, dim):
        super().__init__()
        self.conv = depthwise(dim)          # learned, as in the published code; the paper: fixed

    def forward(self, x):
        return x + convolve(self.conv, x)


# ---------------------------------------------------------------------------- 3.5 Architecture variants
class Block(nn.Module):
    """Pre-norm Transformer block with one of the attention modules above: (B, H, W, C) -> same."""
    def __init__(self, attn, dim, mlp_ratio, drop_path_rate):
        super().__init__()
        self.norm1 = layer_norm(dim)
        self.attn = attn
        self.norm2 = layer_norm(dim)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, hidden), gelu=nn.GELU(), fc2=nn.Linear(hidden, dim)))
        self.drop_path_rate = drop_path_rate

    def drop_path(self, x):
        """Stochastic depth: in training, drop each sample's branch with this block's rate."""
        if not self.training or self.drop_path_rate == 0:
            return x
        return x * F.dropout(x.new_ones(x.shape[0], 1, 1, 1), self.drop_path_rate)  # one per sample

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
            if i == 0 and self.peg:
                x = self.peg(x)
        return x


ATTENTION = {"wsa": WSA, "swsa": SWSA, "lem": LEM, "iwsa": IWSA, "ssa": SSA}


class ScalableViT(nn.Module):
    """The network (Table 1): images (B, in_chans, H, W) -> logits (B, num_classes).

    num_classes     0 for no classifier: the output is the pooled features (B, C of the last stage)
    dim             channels C of the first stage; they double with each stage
    depths, heads, rc, rn   per stage, as in Table 1: numbers of blocks and heads, SSA's r_c and r_n
    window, mlp_ratio       window size M in tokens; hidden width of the MLP as a multiple of C
    drop_path_rate  stochastic depth rate of the last block, rising linearly from 0 at the first
    peg             whether a PEG follows the first block of each stage (Table 5(b))
    pattern         the two kinds of attention that alternate in each stage (Tables 5(a) and 7)
    head_hidden     hidden width of the published models' two-layer head; None for a linear layer

    Images may have any size.  ScalableViT(**model.config) builds the same architecture again;
    model.channels are the stages' C.  Arguments that do not fit together raise ValueError.
    """
    def __init__(self, in_chans=3, num_classes=1000, dim=64, depths=(2, 2, 20, 2), heads=(2, 4, 8, 16),
                 rc=(1.25, 1.25, 1.25, 1.0), rn=(1 / 64, 1 / 16, 1 / 4, 1), window=7, mlp_ratio=4.0,
                 drop_path_rate=0.0, peg=True, pattern=("iwsa", "ssa"), head_hidden=4096):
        super().__init__()
        self.config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        check_arguments(**self.config)
        self.channels = [dim * 2 ** i for i in range(len(depths))]
        self.num_features = self.channels[-1]
        self.stages = nn.ModuleList()
        for i, C in enumerate(self.channels):
            embed = PatchEmbed(C // 2, C, 3, 2) if i else PatchEmbed(in_chans, C, 7, 4)
            blocks = []
            for j in range(depths[i]):
                kind = pattern[j % 2]
                attn = SSA(C, heads[i], rc[i], rn[i]) if kind == "ssa" else ATTENTION[kind](C, heads[i], window)
                rate = drop_path_rate * (sum(depths[:i]) + j) / max(sum(depths) - 1, 1)
                blocks.append(Block(attn, C, mlp_ratio, rate))
            self.stages.append(Stage(embed, blocks, PEG(C) if peg else None))
        self.norm = layer_norm(C)
        self.apply(init_weights)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes):
        """Replace the head by a fresh one of the same kind for num_classes classes (0: no head)."""
        hidden = self.config["head_hidden"]
        if not num_classes:
            self.head = nn.Identity()
        elif not hidden:
            self.head = nn.Linear(self.num_features, num_classes)
        else:
            self.head = nn.Sequential(nn.Linear(self.num_features, hidden), layer_norm(hidden), nn.GELU(),
                                      nn.Linear(hidden, num_classes))
        if hasattr(self, "num_classes"):                            # the model may have been moved
            self.head.to(self.norm.weight)
        self.head.apply(init_weights)
        self.num_classes = self.config["num_classes"] = num_classes

    def forward_features(self, images):
        """Images -> a list of one map per stage, (B, channels[i], ⌈H/s⌉, ⌈W/s⌉), s = 4, 8, 16, 32."""
        x = images.permute(0, 2, 3, 1)                              # (B, H, W, in_chans)
        maps = []
        for stage in self.stages:
            x = stage(x)                                            # (B, H_i, W_i, C_i)
            maps.append(x.permute(0, 3, 1, 2))
        return maps

    def forward(self, images):
        x = self.forward_features(images)[-1].permute(0, 2, 3, 1)   # (B, H_4, W_4, C_4)
        return self.head(self.norm(x).mean((1, 2)))                 # (B, num_classes)

    def no_weight_decay(self):
        """Names of biases, norms and the PEG's parameters: by custom, position encodings are exempt."""
        return {name for name, p in self.named_parameters() if p.ndim == 1 or ".peg." in name}  # not LIM

    def set_grad_checkpointing(self, enable=True):
        """Recompute each block in the backward pass instead of keeping its activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable


def check_arguments(in_chans, num_classes, dim, depths, heads, rc, rn, window, drop_path_rate,
                    pattern, head_hidden, **_):
    """Raise ValueError for arguments that would build a network that is wrong or fails later."""
    if not len(depths) == len(heads) == len(rc) == len(rn) > 0:
        raise ValueError(f"depths, heads, rc, rn must have one entry per stage, got {depths=}, {heads=}, {rc=}, {rn=}")
    integers = [in_chans, num_classes or 1, dim, *depths, *heads, window, head_hidden or 1]
    if not all(type(n) is int and n >= 1 for n in integers):        # NumPy's would not load again
        raise ValueError(f"expected integers of at least 1, got {in_chans=}, {num_classes=}, {dim=}, "
                         f"{depths=}, {heads=}, {window=}, {head_hidden=}")
    if len(pattern) != 2 or not set(pattern) <= set(ATTENTION):
        raise ValueError(f"pattern must be two of {', '.join(ATTENTION)} (or twice the same), got {pattern!r}")
    if not 0 <= drop_path_rate < 1:
        raise ValueError(f"drop_path_rate must be in [0, 1), got {drop_path_rate}")
    for i, (h, r_c, r_n) in enumerate(zip(heads, rc, rn)):
        if not 0 < r_n <= 1 or abs(round(r_n ** -0.5) ** 2 * r_n - 1) > 1e-6:
            raise ValueError(f"rn must be 1/integer² (1, 1/4, 1/9, 1/16, ...), got {r_n}")
        C = dim * 2 ** i
        scaled = int(C * r_c)                                       # C'
        compared = scaled if "ssa" in pattern and r_n < 1 else C    # channels of Q and K
        if r_c <= 0 or compared == 0 or C % h or compared % h:
            raise ValueError(f"heads must divide C and C' = int(C·rc) > 0, got heads={h}, {C=}, rc={r_c}, C'={scaled}")


def init_weights(module):
    """Initialization of the published code; LayerNorm keeps PyTorch's default (weight 1, bias 0)."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)    # published: truncated, at 100 deviations
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.weight.numel() / module.in_channels        # k·k·C_out / groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
        nn.init.zeros_(module.bias)


# Table 1.  Any argument of `ScalableViT` can be given: scalablevit_b(num_classes=10).
TINY = dict(dim=24, depths=(2, 2, 4, 2), heads=(1, 2, 4, 8), head_hidden=None)
BASE = dict(dim=96, depths=(2, 2, 14, 6), heads=(3, 6, 12, 24), rc=(2.0, 1.25, 1.25, 1.0))
LARGE = dict(dim=128, depths=(2, 6, 12, 4), heads=(4, 8, 16, 32), rc=(0.25, 0.5, 1.0, 1.0))


def scalablevit_tiny(**arguments):
    """Not in the paper: 1.9M parameters, 0.25 G MACs at 224 x 224; for images of 56 to 112 pixels."""
    return ScalableViT(**dict(TINY, **arguments))


def scalablevit_s(**arguments):
    """ScalableViT-S: 32.0M parameters, 4.1 G MACs at 224 x 224; the paper's Top-1: 83.1 %."""
    return ScalableViT(**arguments)             # its defaults are S


def scalablevit_b(**arguments):
    """ScalableViT-B: 81.9M parameters, 8.6 G MACs at 224 x 224; the paper's Top-1: 84.1 %."""
    return ScalableViT(**dict(BASE, **arguments))


def scalablevit_l(**arguments):
    """ScalableViT-L: 109.3M parameters, 14.7 G MACs at 224 x 224; the paper's Top-1: 84.4 %."""
    return ScalableViT(**dict(LARGE, **arguments))


# ---------------------------------------------------------------------------- Weights
OFFICIAL_NAMES = {  # published name: name here, both without the final .weight or .bias
    r"patch_embeds\.(\d+)\.proj": r"stages.\1.embed.conv",
    r"patch_embeds\.(\d+)\.norm": r"stages.\1.embed.norm",
    r"pos_block\.(\d+)\.proj\.0": r"stages.\1.peg.conv",
    r"stages\.(\d+)\.(\d+)\.(norm[12]|mlp\.fc[12]|attn\.(?:qkv|kv|[qkv]|proj))": r"stages.\1.blocks.\2.\3",
    r"stages\.(\d+)\.(\d+)\.attn\.lim_func": r"stages.\1.blocks.\2.attn.lim",
    r"stages\.(\d+)\.(\d+)\.attn\.reduction\.([01])": r"stages.\1.blocks.\2.attn.reduce.\3",
    r"stages\.(\d+)\.(\d+)\.attn\.norm_act\.0": r"stages.\1.blocks.\2.attn.norm",
    r"(norm|head|head\.[013])": r"\1",         # head: one linear layer; head.0, .1, .3: two
}


def convert_official(state_dict):
    """Rename a published model's parameters to the names used here; ValueError for an unknown name."""
    converted = {}
    for key, tensor in state_dict.items():
        for theirs, ours in OFFICIAL_NAMES.items():
            name, found = re.subn(rf"^{theirs}(?=\.(weight|bias)$)", ours, key)
            if found:
                break
        else:
            raise ValueError(f"{key!r} is not a parameter of a published ScalableViT")
        if ".kv." in name:
            k, v = tensor.chunk(2)
            converted[name.replace("kv", "k")] = k
            converted[name.replace("kv", "v")] = v
        else:
            converted[name] = tensor
    return converted


def load_model(file, **changes):
    """The model whose weights are in `file`, on the CPU and in eval mode, or a ValueError.

    `file` is from train_minimal.py, or published, or a state dict, also under "state_dict" or with
    "module." or "_orig_mod." before the names.  `changes` are arguments of `ScalableViT`; another
    num_classes makes a new head, 0 none.  A file without "config" is taken for tiny, S, B or L by
    its width; for another network give `changes`: heads and window leave no trace in the weights, so
    wrong ones load without an error.  Weights must be finite; all but float64 becomes float32.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):    # in some published files
            content = torch.load(file, map_location="cpu", weights_only=True)
        weights = content.get("model", content.get("state_dict", content))
        weights = {re.sub(r"^((module|_orig_mod)\.)+", "", name): weights[name] for name in weights}
        config = content.get("config", {})
        if "patch_embeds.0.norm.weight" in weights:
            weights = convert_official(weights)
            if "head.weight" in weights:                            # the S with a linear head
                config = dict(head_hidden=None, rc=(1.25,) * 4)
        first = weights.get("stages.0.embed.norm.weight", torch.empty(0))
        variant = {24: TINY, 96: BASE, 128: LARGE}.get(len(first), {})
        classes = len(weights.get("head.bias", weights.get("head.3.bias", ())))
        model = ScalableViT(**{**variant, **config, **changes, "num_classes": classes})
        if first.dtype == torch.float64:
            model.double()
        model.load_state_dict(weights)
        if changes.get("num_classes", classes) != classes:
            model.reset_classifier(changes["num_classes"])
    except Exception as error:                  # PyTorch's name the keys and shapes that differ
        reasons = [line[:200] for line in str(error).splitlines()[:3]]
        raise ValueError(f"{str(file)!a} cannot be loaded: {type(error).__name__}: {reasons}")
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise ValueError(f"{str(file)!a} cannot be loaded: {name} is not finite")
    return model.eval()


# ---------------------------------------------------------------------------- Cost
def count_macs(model, size):
    """Multiply-accumulates for one image of `size` (H, W), padding included.  "modules" are those of
    convolutions and linear layers, the paper's FLOPs; "attention" those of Q K^T and A V."""
    model = copy.deepcopy(model).to("meta")
    image = model.norm.weight.new_empty(1, model.config["in_chans"], *size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    attention = counter.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0) // 2   # Q K^T, A V
    return {"modules": counter.get_total_flops() // 2 - attention, "attention": attention}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, nargs=2, default=(224, 224))
    size = parser.parse_args().size
    if min(size) < 1:
        parser.error(f"--size must be two positive integers, got {size}")
    print(f"image of {size[0]}x{size[1]}     parameters       MACs   with QK^T, AV       Table 2")
    for build, table_2 in ((scalablevit_tiny, "-"), (scalablevit_s, "32M, 4.2G"),
                           (scalablevit_b, "81M, 8.6G"), (scalablevit_l, "104M, 14.7G")):
        with torch.device("meta"):                                  # shapes without memory
            model = build()
        cost = count_macs(model, size)
        print(f"{build.__name__:16} {sum(p.numel() for p in model.parameters()):12,} "
              f"{cost['modules'] / 1e9:10.3f}G "
              f"{sum(cost.values()) / 1e9:14.3f}G {table_2:>19}")


if __name__ == "__main__":
    main()
