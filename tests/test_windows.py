"""Window attention and SSA against loops in float64, for map sizes divisible by the window or not."""
import math

import pytest
import torch
from hypothesis import given, strategies as st

from helpers import (plain_pieces, random_tokens, randomised, shifted_pieces, softmax_attention, ssa_by_hand,
                     windows_by_hand)
from scalablevit import IWSA, LEM, SSA, SWSA, WSA, attention, depthwise, window_merge, window_partition

sides = st.integers(1, 14)
windows = st.integers(1, 8)
heads_and_width = st.tuples(st.integers(1, 3), st.integers(1, 4))   # heads, channels per head


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind, pieces, convolution", [
    (WSA, plain_pieces, {}), (SWSA, shifted_pieces, {}), (LEM, plain_pieces, {"local": "lem"}),
    (IWSA, plain_pieces, {"interactive": "lim"})])
@given(sides, sides, windows, heads_and_width, st.integers(1, 2), st.sampled_from([3, 3, 1, 5, 7]))
def test_windows_attend_separately(kind, pieces, convolution, H, W, M, hd, B, kernel):
    """SWSA shifts windows; LEM adds the convolution of each window's values, IWSA that of the whole map."""
    heads, d = hd
    module = kind(heads * d, heads, M)
    if kind is IWSA and kernel != 3:
        module.lim = depthwise(heads * d, kernel)
    module, x = randomised(module), random_tokens(B, H, W, heads * d)
    added = {place: [*getattr(module, name).parameters()] for place, name in convolution.items()}
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


@given(sides, sides, st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from([0.25, 0.5, 1.0, 1.25, 1.35, 2.0]),
       st.sampled_from([1, 2]), st.integers(1, 2))
def test_ssa_attends_to_the_reduced_map(H, W, s, rc, heads, B):
    """With r_c = 1.35, C' = int(10.8) while the scale stays 1/sqrt(10.8 / heads)."""
    module = randomised(SSA(8, heads, rc, 1 / s ** 2))
    assert module.q.out_features == module.k.out_features == (8 if s == 1 else math.floor(8 * rc))
    x = random_tokens(B, H, W, 8)
    close(module(x), ssa_by_hand(module, x, rc, s))


@given(st.integers(1, 9), st.integers(1, 20), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_attention_is_equation_1_over_the_keys_seen(n, m, d, d_v, a_row_for_each):
    q, k, v = random_tokens(n, d), random_tokens(m, d, seed=2), random_tokens(m, d_v, seed=3)
    seen = torch.rand(n if a_row_for_each else 1, m) < 0.7
    seen[:, 0] = True                                               # every query has a key
    by_hand = [softmax_attention(q[i:i + 1], k[row], v[row], 1, 0.3) for i, row in enumerate(seen.expand(n, m))]
    close(attention(q, k, v, 0.3, seen), torch.cat(by_hand))
