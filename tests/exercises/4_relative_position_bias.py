"""Exercise 4: a relative position bias in window attention.

Why     PEG encodes positions by convolution; Swin instead adds a learned bias per head and offset to every score.
        With `peg=False` the two can be compared.
Where   scalablevit.py: a class `BiasedWSA(WSA)` with a parameter `table` (heads, 2M-1, 2M-1), initialized to zero, and
        "biasedwsa" in `ATTENTION`.  Its own `attend` needs the biases for M tokens, where M can be smaller than the
        parameter's if the map is small; `attention` needs an argument for a bias that is added to the scores.
        Z_n = Softmax(Q_n K_n^T / sqrt(d_k) + b) V_n, where b is table[head, M-1 + y_k - y_q, M-1 + x_k - x_q].
"""
import pytest
import torch

import scalablevit
from helpers import linear_by_hand, plain_pieces, random_tokens, randomised
from report import same_numbers


def by_hand(module, x):
    """Query by query; x (H, W, C)."""
    H, W, C = x.shape
    M, d, out = module.window, C // module.heads, torch.empty_like(x)
    q, k, v = linear_by_hand(x, module.qkv).unflatten(-1, (3, module.heads, d)).unbind(2)   # (H, W, heads, d) each
    for rows in plain_pieces(H, M):
        for cols in plain_pieces(W, M):
            places = [(y, x) for y in range(rows.start, rows.stop) for x in range(cols.start, cols.stop)]
            for y, x_ in places:
                scores = torch.stack([(q[y, x_] * k[r, c]).sum(-1) * d ** -0.5
                                      + module.table[:, M - 1 + r - y, M - 1 + c - x_] for r, c in places])
                values = torch.stack([v[r, c] for r, c in places])                      # (keys, heads, d)
                out[y, x_] = (scores.softmax(0)[..., None] * values).sum(0).flatten()
    return linear_by_hand(out, module.proj)


@pytest.mark.parametrize("H, W", [(3, 6), (4, 5), (2, 2), (1, 7)])
def test_by_hand(H, W):
    module, x = randomised(scalablevit.BiasedWSA(8, 2, 3)), random_tokens(1, H, W, 8)
    same_numbers(module(x)[0], by_hand(module, x[0]))


def test_the_bias_is_zero_at_first_and_learns():
    module = scalablevit.ATTENTION["biasedwsa"](8, 2, 3)
    assert module.table.shape == (2, 5, 5)
    assert not module.table.any()
    module(torch.randn(2, 7, 8, 8)).square().sum().backward()
    assert module.table.grad.ne(0).all()
