"""Window attention, SSA and PEG against loops in float64, for map sizes divisible by the window or not."""
import math

import pytest
import torch
from hypothesis import given, strategies as st

from helpers import (depthwise_by_hand, plain_pieces, random_tokens, randomised, shifted_pieces, ssa_by_hand,
                     windows_by_hand)
from scalablevit import (IWSA, LEM, PEG, SSA, SWSA, WSA, attention, depthwise, merge_heads, split_heads,
                         window_merge, window_partition)

sides = st.integers(1, 14)
windows = st.integers(1, 8)
heads_and_width = st.tuples(st.integers(1, 3), st.integers(1, 4))   # heads, channels per head


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def parameters(conv):
    return conv.weight, conv.bias


@pytest.mark.parametrize("kind, pieces, convolution", [
    (WSA, plain_pieces, None), (SWSA, shifted_pieces, None), (LEM, plain_pieces, "local"),
    (IWSA, plain_pieces, "interactive")])
@given(sides, sides, windows, heads_and_width, st.integers(1, 2), st.sampled_from([3, 3, 1, 5, 7]))
def test_windows_attend_separately(kind, pieces, convolution, H, W, M, hd, B, kernel):
    """SWSA shifts windows; LEM adds the convolution of each window's values, IWSA that of the whole map."""
    heads, d = hd
    module = kind(heads * d, heads, M)
    if kind is IWSA and kernel != 3:
        module.lim = depthwise(heads * d, kernel)
    module, x = randomised(module), random_tokens(B, H, W, heads * d)
    names = {"local": "lem", "interactive": "lim"}
    added = {convolution: parameters(getattr(module, names[convolution]))} if convolution else {}
    close(module(x), windows_by_hand(module, x, pieces, **added))


@given(sides, sides, windows, st.integers(1, 6), st.integers(1, 3))
def test_merge_inverts_partition(H, W, M, C, B):
    x = random_tokens(B, H, W, C)
    parts = window_partition(x, M)
    assert parts.shape == (B * len(plain_pieces(H, M)) * len(plain_pieces(W, M)), M * M, C)
    assert torch.equal(window_merge(parts, H, W, M), x)
    window = x.new_zeros(M, M, C)                                   # the last window, zero-padded
    corner = x[-1, plain_pieces(H, M)[-1], plain_pieces(W, M)[-1]]
    window[:corner.shape[0], :corner.shape[1]] = corner
    assert torch.equal(parts[-1], window.reshape(M * M, C))


@given(st.integers(1, 5), st.integers(1, 9), heads_and_width)
def test_a_head_has_d_adjacent_channels(B, n, hd):
    heads, d = hd
    x = random_tokens(B, n, heads * d)
    split = split_heads(x, heads)
    assert torch.equal(split, torch.stack(x.split(d, dim=-1), dim=1))
    assert torch.equal(merge_heads(split), x)


@given(sides, sides, st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from([0.25, 0.5, 1.0, 1.25, 1.35, 2.0]),
       st.sampled_from([1, 2]), st.integers(1, 2))
def test_ssa_attends_to_the_reduced_map(H, W, s, rc, heads, B):
    """With r_c = 1.35, C' = int(10.8) while the scale stays 1/sqrt(10.8 / heads)."""
    module = randomised(SSA(8, heads, rc, 1 / s ** 2))
    assert module.q.out_features == module.k.out_features == (8 if s == 1 else math.floor(8 * rc))
    x = random_tokens(B, H, W, 8)
    close(module(x), ssa_by_hand(module, x, rc, s))


@given(sides, sides, st.integers(1, 2))
def test_peg_adds_the_convolution_of_the_map(H, W, B):
    module, x = randomised(PEG(6)), random_tokens(B, H, W, 6)
    close(module(x), x + depthwise_by_hand(x, *parameters(module.conv)))


@given(n=st.integers(1, 9), m=st.integers(1, 20), d=st.integers(1, 9), d_v=st.integers(1, 9),
       mask=st.sampled_from([None, "one row for all queries", "a row for each"]), seed=st.integers(0, 99))
def test_attention_is_equation_1(n, m, d, d_v, mask, seed):
    """Forward and backward, against a loop over the queries."""
    torch.manual_seed(seed)
    sizes = [(n, d), (m, d), (m, d_v)]
    q, k, v = (torch.randn(1, 2, *size, dtype=torch.float64, requires_grad=True) for size in sizes)
    seen = torch.rand(1, 1, n if mask == "a row for each" else 1, m) < 0.7
    seen[..., 0] = True                                             # every query has a key
    z = attention(q, k, v, 0.3, None if mask is None else seen)
    seen, rows = torch.ones(n, m).bool() if mask is None else seen[0, 0].expand(n, m), []
    for head in range(2):
        for i in range(n):
            weight = torch.exp(0.3 * k[0, head, seen[i]] @ q[0, head, i])
            rows.append(weight @ v[0, head, seen[i]] / weight.sum())
    expected = torch.stack(rows).view(1, 2, n, d_v)
    torch.testing.assert_close(z, expected)
    gradients = (torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (z, expected))
    torch.testing.assert_close(*gradients)
