"""Exercise 3: a new kind of attention.

Why     Axial attention is a compromise between windows and the whole map: every token attends to its row and its
        column, which reaches every border in one layer and every token in two layers.
Where   A class `Axial(dim, heads, window)` in scalablevit.py, after `IWSA`, with `qkv`, `proj` and `forward` as in
        `WSA` (`window` is ignored), and "axial" in `ATTENTION`.  `attention` accepts any number of leading dimensions;
        `count_macs` needs no change.
        Z = (Softmax(Q K^T / sqrt(d)) V over the row + the same over the column) / 2, with heads as in `WSA`.
"""
import torch

import scalablevit
from helpers import linear_by_hand, random_tokens, randomised, softmax_attention
from report import same_numbers, same_tokens
from scalablevit import ScalableViT, count_macs
from test_receptive_field import field


def axial(dim=8):
    return randomised(scalablevit.ATTENTION["axial"](dim, 2, 7))


def test_a_token_sees_its_row_and_its_column():
    same_row = torch.eye(5).bool()[:, None, :, None]
    same_column = torch.eye(8).bool()[None, :, None, :]
    same_tokens(field(axial(4), 5, 8), same_row | same_column)


def test_it_is_the_mean_of_two_attentions():
    module, x = axial(), random_tokens(1, 5, 6, 8)
    q, k, v = linear_by_hand(x[0], module.qkv).split(8, dim=-1)                         # (H, W, C) each
    z = torch.empty_like(q)
    for y in range(5):
        z[y] = softmax_attention(q[y], k[y], v[y], 2, 4 ** -0.5) / 2
    for i in range(6):
        z[:, i] += softmax_attention(q[:, i], k[:, i], v[:, i], 2, 4 ** -0.5) / 2
    same_numbers(module(x)[0], linear_by_hand(z, module.proj))


def test_it_works_in_a_network_and_its_cost_is_n_times_row_and_column():
    model = ScalableViT(dim=8, depths=(2,), heads=(2,), rc=(1,), rn=(1,), pattern=("axial", "ssa"), num_classes=5)
    assert model(torch.randn(2, 3, 37, 50)).shape == (2, 5)
    H, W, C = 10, 13, 8
    axial_macs = 2 * H * W * (H + W) * C
    ssa_macs = 2 * (H * W) ** 2 * C
    assert count_macs(model, (37, 50))["attention"] == axial_macs + ssa_macs
