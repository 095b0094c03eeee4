"""Window attention, SSA and PEG against loops in float64, for map sizes divisible by the window or not."""
import math

import pytest
import torch
from hypothesis import given, strategies as st

from helpers import (depthwise_by_hand, plain_pieces, random_tokens, randomised, shifted_pieces, ssa_by_hand,
                     windows_by_hand)
from scalablevit import (IWSA, LEM, PEG, SSA, SWSA, WSA, attention, depthwise, merge_heads, split_heads, window_merge,
                         window_partition)

sides = st.integers(1, 14)
windows = st.integers(1, 8)
heads_and_width = st.tuples(st.integers(1, 3), st.integers(1, 4))                       # heads, channels per head


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind, pieces, local, interactive", [
    (WSA, plain_pieces, None, None), (SWSA, shifted_pieces, None, None), (LEM, plain_pieces, "lem", None),
    (IWSA, plain_pieces, None, "lim")])
@given(sides, sides, windows, heads_and_width, st.integers(1, 2))
def test_windows_attend_separately(kind, pieces, local, interactive, H, W, M, hd, B):
    """SWSA shifts the windows; LEM adds the convolution of each window's values, IWSA that of the whole value map."""
    heads, d = hd
    module = randomised(kind(heads * d, heads, M))
    x = random_tokens(B, H, W, heads * d)
    local, interactive = (name and getattr(module, name) for name in (local, interactive))
    close(module(x), windows_by_hand(module, x, pieces, local, interactive))


@given(sides, sides, st.sampled_from([1, 5, 7]))
def test_lim_works_with_other_kernel_sizes(H, W, kernel):
    module = IWSA(6, 2, 3)
    module.lim = depthwise(6, kernel)
    module, x = randomised(module), random_tokens(1, H, W, 6)
    close(module(x), windows_by_hand(module, x, plain_pieces, interactive=module.lim))


@pytest.mark.parametrize("kind", [WSA, LEM])
@given(sides, sides, windows)
def test_a_window_cut_off_by_the_border_equals_attention_over_its_tokens(kind, H, W, M):
    """The bottom right window gives the same output when passed to the module as a separate map."""
    module = randomised(kind(4, 2, M))
    x = random_tokens(1, H, W, 4)
    rows, cols = plain_pieces(H, M)[-1], plain_pieces(W, M)[-1]
    close(module(x)[:, rows, cols], module(x[:, rows, cols]))


def test_lim_connects_windows_and_lem_does_not():
    """With the same weights, LIM and LEM agree exactly at the tokens that are not next to a window border."""
    lem, iwsa = randomised(LEM(4, 2, 4)), randomised(IWSA(4, 2, 4))
    x = random_tokens(1, 8, 8, 4)
    differs = (lem(x) - iwsa(x)).abs().amax(dim=(0, 3)) > 1e-9
    inner = torch.tensor([True, True, True, False, False, True, True, True])
    assert torch.equal(differs, ~(inner[:, None] & inner[None, :]))


@given(sides, sides, windows, st.integers(1, 6), st.integers(1, 3))
def test_merge_inverts_partition(H, W, M, C, B):
    x = random_tokens(B, H, W, C)
    parts = window_partition(x, M)
    h, w = len(plain_pieces(H, M)), len(plain_pieces(W, M))
    assert parts.shape == (B * h * w, M * M, C)
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
    assert split.shape == (B, heads, n, d)
    for head in range(heads):
        assert torch.equal(split[:, head], x[:, :, head * d:(head + 1) * d])
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
    module = randomised(PEG(6))
    x = random_tokens(B, H, W, 6)
    close(module(x), x + torch.stack([depthwise_by_hand(sample, module.conv) for sample in x]))


@given(n=st.integers(1, 9), m=st.integers(1, 20), d=st.integers(1, 9), d_v=st.integers(1, 9),
       mask=st.sampled_from([None, "one row for all queries", "a row for each"]), seed=st.integers(0, 99))
def test_attention_is_equation_1(n, m, d, d_v, mask, seed):
    """Forward and backward, against a loop over the queries."""
    torch.manual_seed(seed)
    q, k, v = (torch.randn(1, 2, *size, dtype=torch.float64, requires_grad=True) for size in ((n, d), (m, d), (m, d_v)))
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
