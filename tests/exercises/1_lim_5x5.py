"""Exercise 1: LIM with a 5x5 kernel.

Why     LIM carries information one token across a window's border; a 5x5 kernel carries it two.
Where   `IWSA.__init__` in scalablevit.py, the line of `self.lim`.  The kernels take any odd size.
"""
import torch

from helpers import random_tokens, randomised
from scalablevit import IWSA
from test_cost import counted
from test_receptive_field import field, same_window, where, within


def test_a_token_sees_two_tokens_across_the_border():
    assert torch.equal(field(IWSA(4, 2, 4), 9, 10), where(9, 10, same_window(4)) | where(9, 10, within(2)))


def test_the_cost_follows():
    module, x = randomised(IWSA(8, 2, 4)), random_tokens(1, 8, 12, 8)
    assert module.lim.weight.shape == (8, 1, 5, 5)
    assert module.macs(8, 12) == counted(module, x)
