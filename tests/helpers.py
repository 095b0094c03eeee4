"""Random networks, weights and operator calls, and attention written with loops.

The functions "by hand" are references.  They use a module's weights but none of its code: slices, sums,
one softmax per head, in the dtype of the weights (float64 in the tests).
"""
import math

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from scalablevit import ATTENTION, ScalableViT, merge_heads, split_heads, window_merge, window_partition

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ROUNDING = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}


# ---------------------------------------------------------------------------- random networks and inputs
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


def small(**changes):
    """Two stages with windows cut off by the border, r_n < 1 and r_n = 1; always the same weights."""
    torch.manual_seed(0)
    return ScalableViT(**dict(dim=8, depths=(2, 2), heads=(1, 2), rc=(1.25, 1.0), rn=(1 / 4, 1), window=3,
                              num_classes=5, head_hidden=16) | changes)


def randomised(module, seed=0):
    """The module in float64 and eval mode, with parameters large enough for uneven attention weights."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for p in module.parameters():
            fan_in = max(p[0].numel(), 1) if p.ndim > 1 else 1
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * (2 / fan_in ** 0.5))
    return module


def random_tokens(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------------- windows of the file
def to_windows(qkv, heads, M):
    """(B, H, W, 3C) -> (3, B·windows, heads, M², d), as the operator window_partition."""
    thirds = window_partition(qkv, M).unflatten(2, (3, -1)).movedim(2, 0)    # (3, B·windows, M², C)
    return split_heads(thirds, heads)


def from_windows(z, H, W, M):
    """(B·windows, heads, M², d) -> (B, H, W, C)"""
    return window_merge(merge_heads(z), H, W, M)


# ---------------------------------------------------------------------------- by hand
def linear_by_hand(x, layer):
    return x @ layer.weight.T + layer.bias


def softmax_attention(q, k, v, heads, scale):
    """q (…, n, C'), k (…, m, C'), v (…, m, C) -> (…, n, C), head by head."""
    out = []
    for q_h, k_h, v_h in zip(*(t.chunk(heads, dim=-1) for t in (q, k, v))):
        scores = q_h @ k_h.transpose(-2, -1) * scale
        weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
        out.append(weights / weights.sum(dim=-1, keepdim=True) @ v_h)
    return torch.cat(out, dim=-1)


def depthwise_by_hand(x, weight, bias):
    """Zero-padded depthwise convolution of maps (B, H, W, C), as a sum of shifted maps."""
    B, H, W, C = x.shape
    k = weight.shape[-1]
    r = k // 2
    padded = x.new_zeros(B, H + 2 * r, W + 2 * r, C)
    padded[:, r:r + H, r:r + W] = x
    return bias + sum(weight[:, 0, i, j] * padded[:, i:i + H, j:j + W] for i in range(k) for j in range(k))


def plain_pieces(n, M):
    """The windows along an axis of n tokens, as slices; the last one is cut off at the border."""
    return [slice(i, min(i + M, n)) for i in range(0, n, M)]


def shifted_pieces(n, M):
    """The windows of a grid that starts at token M//2; the tokens before it form a window, too."""
    if n <= M:
        return plain_pieces(n, M)
    starts = [0, *range(M // 2, n, M)] if M > 1 else range(n)
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], n])]


def attend_by_hand(qkv, heads, M, pieces=plain_pieces, local=None, interactive=None):
    """Attention in every piece of the maps (B, H, W, 3C), without linear layers.

    `local` are the weight and bias of LEM's convolution, applied to the values of each piece;
    `interactive` are LIM's, applied to the whole value map.
    """
    q, k, v = qkv.chunk(3, dim=-1)
    out = torch.zeros_like(v) if interactive is None else depthwise_by_hand(v, *interactive)
    for rows in pieces(v.shape[1], M):
        for cols in pieces(v.shape[2], M):
            crop = v[:, rows, cols]
            tokens = [t[:, rows, cols].flatten(1, 2) for t in (q, k, v)]
            z = softmax_attention(*tokens, heads, (v.shape[3] / heads) ** -0.5).view_as(crop)
            out[:, rows, cols] += z if local is None else z + depthwise_by_hand(crop, *local)
    return out


def windows_by_hand(module, x, *args, **kwargs):
    qkv = linear_by_hand(x, module.qkv)
    return linear_by_hand(attend_by_hand(qkv, module.heads, module.window, *args, **kwargs), module.proj)


def ssa_by_hand(module, x, rc, s):
    """SSA of x (B, H, W, C) with r_n = 1/s²: equations (2) and (3), cell by cell."""
    B, H, W, C = x.shape
    tokens = reduced = x.reshape(B, H * W, C)
    if s > 1:
        depthwise, pointwise = module.reduce
        cells = []
        for i in range(0, H, s):
            for j in range(0, W, s):
                cell = depthwise.bias.expand(B, C)
                for di in range(min(s, H - i)):                     # beyond the border: zeros
                    for dj in range(min(s, W - j)):
                        cell = cell + depthwise.weight[:, 0, di, dj] * x[:, i + di, j + dj]
                cells.append(cell)
        reduced = torch.stack(cells, dim=1) @ pointwise.weight[:, :, 0, 0].T + pointwise.bias
        centred = reduced - reduced.mean(dim=-1, keepdim=True)
        reduced = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        reduced = reduced * module.norm.weight + module.norm.bias
        reduced = reduced * 0.5 * (1 + torch.erf(reduced / 2 ** 0.5))                   # GELU
    q, k, v = (linear_by_hand(t, layer) for t, layer in
               ((tokens, module.q), (reduced, module.k), (reduced, module.v)))
    z = softmax_attention(q, k, v, module.heads, (rc * C / module.heads) ** -0.5)
    return linear_by_hand(z, module.proj).reshape(B, H, W, C)


# ---------------------------------------------------------------------------- the operators of the extension
OPERATORS = {  # name: (arguments, outputs) as they are named in a case
    "window_partition": ("qkv heads M", "windows"),
    "window_partition_backward": ("windows H W M", "qkv"),
    "window_merge_lim": ("z qkv weight bias M", "grad"),
    "window_merge_lim_backward": ("grad qkv weight heads M", "z qkv weight bias"),
    "iwsa": ("qkv weight bias heads M", "grad"),
    "iwsa_backward": ("grad qkv weight heads M", "qkv weight bias"),
}


def operator_case(B, H, W, heads, d, M, k=3, dtype=torch.float32, weights=None, make=torch.randn):
    """Numbers and tensors that the operators take and return; `weights` is the dtype of LIM's, if another."""
    windows, C = B * math.ceil(H / M) * math.ceil(W / M), heads * d
    shapes = dict(qkv=(B, H, W, 3 * C), grad=(B, H, W, C), z=(windows, heads, M * M, d),
                  windows=(3, windows, heads, M * M, d))
    return dict(H=H, W=W, heads=heads, M=M, weight=make(C, 1, k, k, dtype=weights or dtype),
                bias=make(C, dtype=weights or dtype),
                **{key: make(*shape, dtype=dtype) for key, shape in shapes.items()})


def arguments(name, case):
    return [case[key] for key in OPERATORS[name][0].split()]


LAYOUTS = [  # how an equal tensor lies in memory
    *[lambda t: t] * 5,
    lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    lambda t: t.swapdims(t.ndim // 4, t.ndim // 2).contiguous().swapdims(t.ndim // 4, t.ndim // 2),
    lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
    lambda t: F.pad(t, (1, 0))[..., 1:],                            # odd strides
    lambda t: F.pad(t.flatten(), (1, 0))[1:].view(t.shape),         # 16 bytes do not divide the address
]


@st.composite
def operator_cases(draw, sizes=(1, 3, 3, 3, 5, 7)):
    """Maps that windows divide or not, or smaller than one; tensors in many layouts; `sizes` are LIM's."""
    choose = draw(st.randoms(use_true_random=True)).choice          # uniform, unlike Hypothesis's own
    dtype = choose(DTYPES)
    generator = torch.Generator().manual_seed(choose(range(1000)))

    def make(*shape, dtype):
        return choose(LAYOUTS)(torch.randn(shape, generator=generator).to(dtype))

    B, H, W, M = choose([0, 1, 1, 2, 2]), choose(range(1, 14)), choose(range(1, 14)), choose(range(1, 10))
    heads, d = choose([1, 2, 3]), choose([1, 2, 3, 4, 8, 8, 12, 16, 20, 24, 32, 33, 40])
    k, weights = choose(sizes), choose([dtype, torch.promote_types(dtype, torch.float32)])
    return operator_case(B, H, W, heads, d, M, k, dtype, weights, make)


def close(got, exact, factor=1):
    """Equal up to rounding in got's dtype, relative to the largest element; exact is float64."""
    assert got.shape == exact.shape
    error = (got.cpu().double() - exact).abs() / exact.abs().max().clamp_min(1) if exact.numel() else exact
    assert (error <= factor * ROUNDING[got.dtype]).all(), f"off by {error.max()}"        # false for NaN


def check_operators(call, case):
    """call(name) -> the outputs of partition and merge, forward and backward, compared with float64."""
    keys = "z", "qkv", "weight", "bias"
    z, qkv, weight, bias = (case[key].detach().double().requires_grad_() for key in keys)
    windows = to_windows(qkv, case["heads"], case["M"])
    lim = depthwise_by_hand(qkv.chunk(3, dim=-1)[2], weight, bias)
    merged = from_windows(z, case["H"], case["W"], case["M"]) + lim
    dqkv = torch.autograd.grad(windows, qkv, case["windows"].double())
    gradients = torch.autograd.grad(merged, (z, qkv, weight, bias), case["grad"].double())
    exact = {"window_partition": [windows], "window_partition_backward": dqkv,
             "window_merge_lim": [merged], "window_merge_lim_backward": gradients}
    for name, results in exact.items():
        for output, result, like in zip(call(name), results, OPERATORS[name][1].split(), strict=True):
            assert output.dtype == case[like].dtype
            if "partition" in name:                                 # copies numbers
                assert torch.equal(output.cpu().double(), result)
            close(output, result)
