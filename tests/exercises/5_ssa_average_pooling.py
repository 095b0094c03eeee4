"""Exercise 5: SSA with average pooling.

Why     Equation (3) leaves f_k and f_v open.  The strided convolution learns to summarize a cell of s x s tokens; the
        mean needs no parameters.  Is the difference worth them?  `docs/ablation.py --results mine.jsonl` measures it
        (120 runs of about two minutes).
Where   scalablevit.py: a class `PooledSSA(SSA)`, in which the first layer of `self.reduce` is another one.
"""
import pytest
import torch
from torch import nn

import scalablevit
from helpers import random_tokens, randomised
from report import same_numbers


def pooled(rc, s):
    return scalablevit.PooledSSA(8, 2, rc, 1 / s ** 2)


@pytest.mark.parametrize("s", [2, 3, 4])
def test_the_order_of_tokens_in_a_cell_does_not_matter(s):
    """Keys and values only depend on a cell's mean: permuting its tokens permutes their outputs and nothing else."""
    module, x = randomised(pooled(1.25 if s == 2 else 1.0, s)), random_tokens(1, 2 * s, 3 * s, 8)
    mixed = x.clone()
    mixed[:, :s, s:2 * s] = x[:, :s, s:2 * s].flip(1, 2)
    expected = module(x)
    expected[:, :s, s:2 * s] = expected[:, :s, s:2 * s].flip(1, 2).clone()
    same_numbers(module(mixed), expected)


def test_pooling_has_no_parameters():
    layers = [layer for layer in pooled(1.0, 4).modules() if isinstance(layer, nn.Conv2d)]
    assert [layer.kernel_size for layer in layers] == [(1, 1)]


@pytest.mark.parametrize("H, W", [(7, 9), (1, 1)])
def test_cells_cut_off_by_the_border_are_zero_padded(H, W):
    module, x = randomised(pooled(1.0, 4)), random_tokens(1, H, W, 8)
    cells = torch.zeros(1, -(-H // 4) * 4, -(-W // 4) * 4, 8, dtype=x.dtype)
    cells[:, :H, :W] = x
    same_numbers(module(x), module(cells)[:, :H, :W])


def test_a_map_that_is_not_reduced_is_left_alone():
    module = scalablevit.PooledSSA(8, 2, 1.0, 1)
    assert module(torch.randn(1, 3, 5, 8)).shape == (1, 3, 5, 8)
