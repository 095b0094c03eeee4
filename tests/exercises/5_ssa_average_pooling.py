"""Exercise 5: SSA with average pooling.

Why     Equation (3) leaves f_k and f_v open.  The strided convolution learns to summarize a cell of s x s tokens; the
        mean needs no parameters.  Is the difference worth them?  `docs/ablation.py --results mine.jsonl` measures it
        (120 runs of about 40 s).
Where   `SSA` in scalablevit.py: the first layer of `self.reduce`.
"""
import pytest
import torch
from torch import nn

from helpers import random_tokens, randomised
from scalablevit import SSA


@pytest.mark.parametrize("s", [2, 3, 4])
def test_the_order_of_tokens_in_a_cell_does_not_matter(s):
    """Keys and values only depend on a cell's mean: permuting its tokens permutes their outputs and nothing else."""
    module, x = randomised(SSA(8, 2, 1.25 if s == 2 else 1.0, 1 / s ** 2)), random_tokens(1, 2 * s, 3 * s, 8)
    mixed = x.clone()
    mixed[:, :s, s:2 * s] = x[:, :s, s:2 * s].flip(1, 2)
    expected = module(x)
    expected[:, :s, s:2 * s] = expected[:, :s, s:2 * s].flip(1, 2).clone()
    torch.testing.assert_close(module(mixed), expected)


def test_pooling_has_no_parameters():
    layers = [layer for layer in SSA(8, 2, 1.0, 1 / 16).modules() if isinstance(layer, nn.Conv2d)]
    assert [layer.kernel_size for layer in layers] == [(1, 1)]


@pytest.mark.parametrize("H, W", [(7, 9), (1, 1)])
def test_cells_cut_off_by_the_border_are_zero_padded(H, W):
    module, x = randomised(SSA(8, 2, 1.0, 1 / 16)), random_tokens(1, H, W, 8)
    cells = torch.zeros(1, -(-H // 4) * 4, -(-W // 4) * 4, 8, dtype=x.dtype)
    cells[:, :H, :W] = x
    torch.testing.assert_close(module(x), module(cells)[:, :H, :W])
