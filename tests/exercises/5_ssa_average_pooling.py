"""Exercise 5: SSA that averages.

Why     Equation (3) leaves f_k and f_v open.  A strided convolution learns how to sum up a cell of s x s tokens; the
        mean has nothing to learn: is the difference worth its weights?  `docs/ablation.py --results mine.jsonl` can
        tell.
Where   `SSA` in scalablevit.py: the first layer of `self.reduce`.
"""
import pytest
import torch
from torch import nn

from helpers import random_tokens, randomised
from scalablevit import SSA


@pytest.mark.parametrize("s", [2, 3, 4])
def test_tokens_of_a_cell_may_trade_places(s):
    """Keys and values know a cell's mean only: reordering its tokens reorders their outputs and changes no others."""
    module, x = randomised(SSA(8, 2, 1.25 if s == 2 else 1.0, 1 / s ** 2)), random_tokens(1, 2 * s, 3 * s, 8)
    mixed = x.clone()
    mixed[:, :s, s:2 * s] = x[:, :s, s:2 * s].flip(1, 2)
    expected = module(x)
    expected[:, :s, s:2 * s] = expected[:, :s, s:2 * s].flip(1, 2).clone()
    torch.testing.assert_close(module(mixed), expected)


def test_there_is_nothing_to_learn_in_it():
    layers = [layer for layer in SSA(8, 2, 1.0, 1 / 16).modules() if isinstance(layer, nn.Conv2d)]
    assert [layer.kernel_size for layer in layers] == [(1, 1)]


@pytest.mark.parametrize("H, W", [(7, 9), (1, 1)])
def test_cells_that_the_border_cuts_are_filled_up_with_zeros(H, W):
    module, x = randomised(SSA(8, 2, 1.0, 1 / 16)), random_tokens(1, H, W, 8)
    cells = torch.zeros(1, -(-H // 4) * 4, -(-W // 4) * 4, 8, dtype=x.dtype)
    cells[:, :H, :W] = x
    torch.testing.assert_close(module(x), module(cells)[:, :H, :W])
