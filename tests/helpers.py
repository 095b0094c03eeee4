"""Shared by several test files: random architectures, random weights, and attention written with loops.

The functions under "by hand" are reference implementations of window attention and SSA.  They use a module's weights
but none of its code: slices, sums, one softmax per head, in the dtype of the weights (float64 in the tests).
"""
import torch
from hypothesis import strategies as st

from scalablevit import ATTENTION, merge_heads, split_heads, window_merge, window_partition


# ------------------------------------------------------------------------------------------------ random architectures
@st.composite
def architectures(draw, kinds=tuple(ATTENTION), max_stages=4, scales=(1, 2, 3, 4), max_window=7):
    """Arguments of a small `ScalableViT`.  `scales` are the sides s of SSA's reduction, r_n = 1/s²."""
    stages = draw(st.integers(1, max_stages))

    def per_stage(*values):
        return tuple(draw(st.lists(st.sampled_from(values), min_size=stages, max_size=stages)))

    return dict(dim=draw(st.sampled_from([8, 16])), depths=per_stage(1, 2, 3), heads=per_stage(1, 2),
                rc=per_stage(0.5, 1.0, 1.25, 2.0), rn=tuple(1 / s ** 2 for s in per_stage(*scales)),
                window=draw(st.integers(1, max_window)), mlp_ratio=draw(st.sampled_from([1.0, 2.5, 4.0])),
                peg=draw(st.booleans()), pattern=tuple(draw(st.sampled_from(kinds)) for _ in range(2)),
                in_chans=draw(st.integers(1, 4)), num_classes=draw(st.integers(0, 5)),
                head_hidden=draw(st.sampled_from([None, 8])))


def randomised(module, seed=0):
    """The module in float64 and eval mode, with random parameters large enough for uneven attention weights."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for p in module.parameters():
            fan_in = max(p[0].numel(), 1) if p.ndim > 1 else 1
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * (2 / fan_in ** 0.5))
    return module


def random_tokens(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ windows of the file
def to_windows(qkv, heads, M):
    """(B, H, W, 3C) -> (3, B·windows, heads, M², d), as the operator window_partition."""
    thirds = window_partition(qkv, M).unflatten(2, (3, -1)).movedim(2, 0)               # (3, B·windows, M², C)
    return split_heads(thirds, heads)


def from_windows(z, H, W, M):
    """(B·windows, heads, M², d) -> (B, H, W, C)"""
    return window_merge(merge_heads(z), H, W, M)


# ------------------------------------------------------------------------------------------------ by hand
def linear_by_hand(x, layer):
    return x @ layer.weight.T + layer.bias


def softmax_attention(q, k, v, heads, scale):
    """q (n, C'), k (m, C'), v (m, C) -> (n, C), head by head."""
    out = []
    for h in range(heads):
        a, b = q.shape[1] // heads, v.shape[1] // heads
        scores = q[:, h * a:(h + 1) * a] @ k[:, h * a:(h + 1) * a].T * scale
        weights = (scores - scores.max(dim=1, keepdim=True).values).exp()
        weights = weights / weights.sum(dim=1, keepdim=True)
        out.append(weights @ v[:, h * b:(h + 1) * b])
    return torch.cat(out, dim=1)


def depthwise_by_hand(x, conv):
    """Zero-padded depthwise convolution of one map (H, W, C), as a sum of shifted maps."""
    H, W, C = x.shape
    k = conv.weight.shape[-1]
    r = k // 2
    padded = x.new_zeros(H + 2 * r, W + 2 * r, C)
    padded[r:r + H, r:r + W] = x
    return conv.bias + sum(conv.weight[:, 0, i, j] * padded[i:i + H, j:j + W] for i in range(k) for j in range(k))


def plain_pieces(n, M):
    """The windows along an axis of n tokens, as slices; the last one is cut off at the border."""
    return [slice(i, min(i + M, n)) for i in range(0, n, M)]


def shifted_pieces(n, M):
    """The windows of a grid that starts at token M//2; the tokens before it form a window, too."""
    if n <= M:
        return plain_pieces(n, M)
    starts = [0, *range(M // 2, n, M)] if M > 1 else range(n)
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], n])]


def windows_by_hand(module, x, pieces, local=None, interactive=None):
    """Window attention on x (B, H, W, C), separately for every piece of the map.

    `local` is LEM's convolution, applied to the values of each piece; `interactive` is LIM's, applied to the whole
    value map.
    """
    B, H, W, C = x.shape
    out = torch.empty_like(x)
    for b in range(B):
        q, k, v = linear_by_hand(x[b], module.qkv).split(C, dim=-1)                     # (H, W, C) each
        for rows in pieces(H, module.window):
            for cols in pieces(W, module.window):
                crop = v[rows, cols]
                z = softmax_attention(q[rows, cols].reshape(-1, C), k[rows, cols].reshape(-1, C), crop.reshape(-1, C),
                                      module.heads, (C / module.heads) ** -0.5).reshape(crop.shape)
                if local is not None:
                    z = z + depthwise_by_hand(crop, local)
                out[b, rows, cols] = z
        if interactive is not None:
            out[b] += depthwise_by_hand(v, interactive)
    return linear_by_hand(out, module.proj)


def ssa_by_hand(module, x, rc, s):
    """SSA of x (B, H, W, C) with r_n = 1/s²: equations (2) and (3), cell by cell."""
    B, H, W, C = x.shape
    out = torch.empty_like(x)
    for b in range(B):
        tokens = x[b].reshape(-1, C)
        reduced = tokens
        if s > 1:
            depthwise, pointwise = module.reduce
            cells = []
            for i in range(0, H, s):
                for j in range(0, W, s):
                    cell = depthwise.bias.clone()
                    for di in range(min(s, H - i)):                                     # beyond the border: zeros
                        for dj in range(min(s, W - j)):
                            cell = cell + depthwise.weight[:, 0, di, dj] * x[b, i + di, j + dj]
                    cells.append(cell)
            reduced = torch.stack(cells) @ pointwise.weight[:, :, 0, 0].T + pointwise.bias
            centred = reduced - reduced.mean(dim=1, keepdim=True)
            reduced = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
            reduced = reduced * module.norm.weight + module.norm.bias
            reduced = reduced * 0.5 * (1 + torch.erf(reduced / 2 ** 0.5))               # GELU
        d = rc * C / module.heads
        z = softmax_attention(linear_by_hand(tokens, module.q), linear_by_hand(reduced, module.k),
                              linear_by_hand(reduced, module.v), module.heads, d ** -0.5)
        out[b] = linear_by_hand(z, module.proj).reshape(H, W, C)
    return out
